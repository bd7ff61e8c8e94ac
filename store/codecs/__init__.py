"""Codecs: a sample's signal as a payload of plain integers, one module a signal.

Each module offers `encode(..., codec) -> bytes` and `decode(payload, shape, codec)`; docs/format.md describes the
bytes well enough to write a decoder in another language.
"""
