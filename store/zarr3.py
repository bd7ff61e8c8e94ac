"""Zarr v3 on disk: array metadata, whole-array objects, and shards of one sample a chunk.

Only what the store writes, and only codecs every Zarr v3 reader has: `bytes`, `zstd` with checksum,
`sharding_indexed`, `crc32c`. Shards are written frame by frame, so a fragment larger than memory is no problem,
and read by following the shard's own index (zarr-python takes several times as long for one chunk).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import google_crc32c
import numpy as np
import zstandard

from compodistill.errors import StoreError

ABSENT = 2**64 - 1  # offset and length of a chunk that is not in a shard


def dump(metadata: dict[str, Any]) -> bytes:
    """JSON with one spelling, so equal metadata are equal bytes."""
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def group_metadata(attributes: dict[str, Any], members: dict[str, Any] | None = None) -> dict[str, Any]:
    """A group's zarr.json; `members` are repeated in it, so readers need not list the group."""
    metadata: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    if members is not None:
        metadata["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
    return metadata


def array_metadata(
    shape: Sequence[int], dtype: str, fill: int, dimensions: Sequence[str], level: int, *, sharded: bool
) -> dict[str, Any]:
    """An array's zarr.json: one object; inner chunks of one row each if sharded."""
    little: dict[str, Any] = {"name": "bytes"}
    if dtype != "uint8":
        little["configuration"] = {"endian": "little"}
    codecs: list[dict[str, Any]] = [
        little,
        {"name": "zstd", "configuration": {"level": level, "checksum": True}},
    ]
    if sharded:
        configuration = {
            "chunk_shape": [1, *shape[1:]],
            "codecs": codecs,
            "index_codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "dimension_names": list(dimensions),
        "attributes": {},
    }


def compress(data: bytes, level: int, cuts: Sequence[int] = ()) -> bytes:
    """One zstd frame with content size and checksum; a block starts at each cut, where another kind of data does."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    if not cuts:
        return compressor.compress(data)
    frame = compressor.compressobj(size=len(data))
    parts = []
    for start, end in pairwise([0, *cuts, len(data)]):
        parts += [frame.compress(data[start:end]), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, frame.flush()])


def decompress(
    frame: bytes | memoryview, expected: int, decompressor: zstandard.ZstdDecompressor | None = None
) -> bytes:
    """The content of one frame of known size; refused before anything is allocated if the frame says otherwise.

    Raises:
        StoreError: no frame, another size, no checksum, or the checksum does not match.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != expected or not parameters.has_checksum or parameters.dict_id:
            raise StoreError(
                f"a compressed chunk declares {parameters.content_size} bytes, {expected} expected"
                if parameters.content_size != expected
                else "a compressed chunk has no checksum"
            )
        decompressor = decompressor or zstandard.ZstdDecompressor(max_window_size=2**31 - 2**20)
        return decompressor.decompress(frame, max_output_size=expected, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise StoreError(f"a compressed chunk is damaged ({e})") from e


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: bytes, /) -> int: ...


class ShardWriter:
    """Writes a shard object frame by frame: frames in order of arrival, then the index, then its crc32c."""

    def __init__(self, file: Sink) -> None:
        self._file, self._at = file, 0
        self._index: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._index)

    def append(self, frame: bytes) -> None:
        self._file.write(frame)
        self._index.append((self._at, len(frame)))
        self._at += len(frame)

    def finish(self) -> None:
        index = np.asarray(self._index, dtype="<u8").tobytes()
        self._file.write(index + google_crc32c.value(index).to_bytes(4, "little"))


def index_length(n: int) -> int:
    """Bytes of the index at the end of a shard of n chunks."""
    return 16 * n + 4


def parse_index(data: bytes, object_size: int) -> np.ndarray:
    """(n, 2) int64 offsets and lengths of a shard's chunks.

    Raises:
        StoreError: the crc32c does not match, a chunk is absent, or one reaches outside the object.
    """
    body, crc = data[:-4], data[-4:]
    if google_crc32c.value(body) != int.from_bytes(crc, "little"):
        raise StoreError("the shard index is damaged (crc32c)")
    index = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
    if (index == ABSENT).any():
        raise StoreError("a sample is missing in the shard (it would read as fill values)")
    frames = object_size - len(data)
    # compared without adding first: offsets near 2**64 would wrap around
    if (index > frames).any() or (index[:, 0] > frames - index[:, 1]).any():
        raise StoreError("the shard index points outside the object")
    return index.astype(np.int64)
