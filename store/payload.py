"""A sample's payload of one signal: a few byte sections behind a small header.

u8   layout = 1 (never 255, so a chunk that is missing and reads as the fill value is recognised)
u8   number of sections n
u16  zero
u32  length in bytes of each of the n sections, little-endian
...  the sections, each padded with zeros to a multiple of 4 bytes
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compodistill.errors import StoreError

LAYOUT = 1
FILL = 255
WORTH_A_CUT = 8192


def pack(sections: Sequence[np.ndarray]) -> bytes:
    """Join sections (any little-endian dtype, any shape) into one payload."""
    header = np.zeros(1 + len(sections), dtype="<u4")
    header[0] = LAYOUT | len(sections) << 8
    parts: list[bytes] = [b""]
    for i, section in enumerate(sections):
        data = np.ascontiguousarray(section).tobytes()
        header[1 + i] = len(data)
        parts += [data, bytes(-len(data) % 4)]
    parts[0] = header.tobytes()
    return b"".join(parts)


def cuts(payload: bytes) -> list[int]:
    """Offsets at which large sections of a payload start: a compressor does well to start anew there."""
    n_sections = payload[1]
    lengths = np.frombuffer(payload, "<u4", n_sections, 4).astype(np.int64)
    starts = 4 * (1 + n_sections) + np.concatenate([[0], (lengths + -lengths % 4).cumsum()])
    return [int(start) for start, n in zip(starts[:-1], lengths, strict=True) if n >= WORTH_A_CUT]


def unpack(payload: bytes | memoryview | np.ndarray, n_sections: int) -> list[np.ndarray]:
    """The sections of a payload as uint8 views, one after the other.

    Args:
        payload: exactly one payload.
        n_sections: how many the codec expects.

    Raises:
        StoreError: the payload is not of this layout, or its lengths do not add up.
    """
    data = np.frombuffer(payload, dtype=np.uint8)
    start = 4 * (1 + n_sections)
    if len(data) < start or data[0] != LAYOUT or data[1] != n_sections or data[2] or data[3]:
        missing = len(data) > 0 and data[0] == FILL
        raise StoreError("the payload is missing (fill value)" if missing else "the payload has another layout")
    sections = []
    for n in data[4:start].view("<u4").tolist():
        if start + n > len(data):
            raise StoreError("the payload is shorter than its sections")
        sections.append(data[start : start + n])
        start += n + -n % 4
    if start != len(data):
        raise StoreError("the payload is longer than its sections")
    return sections


def typed(section: np.ndarray, dtype: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A section as an array, after its length was checked against what the shape says."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(section) != expected:
        raise StoreError(f"section {name} has {len(section)} bytes, {expected} expected")
    return section.view(dtype).reshape(shape)


def planes(values: np.ndarray, n: int = 0) -> np.ndarray:
    """(P, ...) uint8: the bytes of integers from 0 to 2**32 - 1, the lowest first; as many as needed if n is 0."""
    n = n or max(1, (int(values.max()).bit_length() + 7) // 8)
    return np.stack([values >> 8 * i & 255 for i in range(n)]).astype("u1")


def joined(section: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """int64 of planes of bytes; how many there are follows from the section's length."""
    size = max(1, int(np.prod(shape)))
    planes = typed(section, "u1", (max(1, min(4, len(section) // size)), *shape), name)
    joined = planes[0].astype(np.int64)
    for i, plane in enumerate(planes[1:], start=1):
        joined |= plane.astype(np.int64) << 8 * i
    return joined
