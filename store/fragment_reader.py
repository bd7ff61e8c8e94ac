"""Reads one published fragment: by the shard's own index, one pread and one zstd frame a payload."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from typing import Any

import numpy as np
import zstandard

from compodistill.errors import StoreError
from compodistill.store import zarr3
from compodistill.store.fragment import (
    DIGEST,
    MAX_METADATA,
    MAX_PAYLOAD,
    MAX_TABLE,
    array_name,
    chunk_path,
    path_of,
)
from compodistill.store.spec import FORMAT, FORMAT_VERSION
from compodistill.store.storage import File, Reading
from compodistill.store.table import COLUMNS, SIGNALS, Table

TABLE_ARRAYS = {"keys": ("uint8", 2), "digests": ("uint8", 3), "samples": ("int64", 2), "runs": ("int32", 2)}


PAYLOADS = re.compile(rf"({'|'.join(SIGNALS)})_[1-9][0-9]{{0,9}}")


class Fragment:
    """An open fragment.

    Args:
        storage: of the store.
        shard_digest: which fragment.
        vouched: (size, sha256) of its zarr.json according to the manifest; None trusts the file (partial stores).
        path: where its group is, if not where fragments are published.

    Raises:
        StoreError: an object is missing, has another size or content than vouched for, or contradicts itself.
    """

    def __init__(
        self,
        storage: Reading,
        shard_digest: str,
        vouched: tuple[int, str] | None = None,
        path: str | None = None,
    ) -> None:
        self.path = path or path_of(shard_digest)
        self._storage = storage
        data = storage.read(f"{self.path}/zarr.json", vouched[0] if vouched else MAX_METADATA)
        if vouched and (len(data), hashlib.sha256(data).hexdigest()) != vouched:
            raise self._damaged("zarr.json", "is not what the manifest vouches for (size or sha256)")
        self.metadata_size, self.metadata_sha256 = len(data), hashlib.sha256(data).hexdigest()
        self._members, attributes = self._parse(data)
        if attributes["shard_sha256"] != shard_digest:
            raise self._damaged("zarr.json", f"belongs to shard {attributes['shard_sha256']}")
        self.shard_digest, self.shard_name = shard_digest, attributes["shard_name"]
        self.spec, self.fidelity = attributes["spec"], attributes["fidelity"]
        self.skipped: list[tuple[str, str]] = attributes["skipped"]  # (key, reason) of samples without signals
        self.objects: dict[str, tuple[int, str]] = attributes["objects"]
        try:
            self.table = Table(**{name: self._whole(name) for name in TABLE_ARRAYS})
        except StoreError as e:
            raise e if e.where else self._damaged("", e.what) from e
        if len(self.table) != attributes["samples"]:
            raise self._damaged("zarr.json", "counts another number of samples than the table has")
        self._open: dict[str, tuple[File, np.ndarray]] = {}
        self._local = threading.local()

    @property
    def nbytes(self) -> int:
        """Bytes of all its objects."""
        return self.metadata_size + sum(size for size, _ in self.objects.values())

    def payload(self, i: int, signal: str) -> memoryview:
        """A sample's payload of a signal, decompressed and checked; empty if it has none."""
        place = self.table.place(i, signal)
        if place.bucket == 0:
            return memoryview(b"")
        name = array_name(signal, place.bucket)
        try:
            file, index = self._open.get(name) or self._open_shard(name)
            if place.row >= len(index) or place.size > place.bucket:
                raise StoreError("the sample table points outside the shard")
            offset, length = index[place.row].tolist()
            frame = file.read(offset, length)
            if len(frame) != length or int.from_bytes(frame[-4:], "little") != place.check:
                raise StoreError("a chunk is not the one the sample table names")
            return memoryview(zarr3.decompress(frame, place.bucket, self._decompressor()))[: place.size]
        except StoreError as e:
            where = f"{self._storage.where(self.path)}/{chunk_path(name, 2)}, key {self.table.keys[i]}"
            raise StoreError(e.what, where=e.where or where, remedy=e.remedy) from e

    def shard_index(self, array: str) -> np.ndarray:
        """(n, 2) int64 offsets and lengths of a payload array's frames in its object."""
        return (self._open.get(array) or self._open_shard(array))[1]

    def verify(self) -> None:
        """Read every object and compare its size and sha256.

        Raises:
            StoreError: names the first object that differs.
        """
        for path, (size, sha256) in self.objects.items():
            with contextlib.closing(self._storage.open(f"{self.path}/{path}")) as file:
                if file.size != size:
                    raise self._damaged(path, f"has {file.size} bytes, {size} expected")
                digest, at = hashlib.sha256(), 0
                while block := file.read(at, 1 << 22):
                    digest.update(block)
                    at += len(block)
            if digest.hexdigest() != sha256:
                raise self._damaged(path, "has another content than was written (sha256)")

    def close(self) -> None:
        for file, _ in self._open.values():
            file.close()
        self._open = {}

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        # one a thread: a context may not be shared, and making one for each frame costs more than a small frame
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = zstandard.ZstdDecompressor(max_window_size=2**31 - 2**20)
        return self._local.decompressor

    def _open_shard(self, name: str) -> tuple[File, np.ndarray]:
        path = chunk_path(name, 2)
        size, _ = self._object(path)
        n, bucket = self._members[name]["shape"]
        if bucket > MAX_PAYLOAD or zarr3.index_length(n) > size:
            raise StoreError("the array's shape does not fit its object")
        file = self._storage.open(f"{self.path}/{path}")
        if file.size != size:
            raise StoreError(f"the object has {file.size} bytes, {size} expected")
        tail = zarr3.index_length(n)
        index = zarr3.parse_index(file.read(size - tail, tail), size)
        self._open[name] = file, index
        return file, index

    def _whole(self, name: str) -> np.ndarray:
        """An array of the table; its object's sha256 is checked, as it is read whole."""
        dtype, dimensions = TABLE_ARRAYS[name]
        path = chunk_path(name, dimensions)
        size, sha256 = self._object(path)
        data = self._storage.read(f"{self.path}/{path}", size)
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise self._damaged(path, "has another content than was written (size or sha256)")
        shape, item = self._members[name]["shape"], np.dtype(dtype).newbyteorder("<")
        expected = item.itemsize * int(np.prod(shape, dtype=object))
        if self._members[name]["data_type"] != dtype or len(shape) != dimensions or expected > MAX_TABLE:
            raise self._damaged(f"{name}/zarr.json", "has another type or shape than the format says")
        try:
            content = zarr3.decompress(data, expected)
        except StoreError as e:
            raise self._damaged(path, e.what) from e
        return np.frombuffer(content, item).reshape(shape).astype(dtype, copy=False)

    def _object(self, path: str) -> tuple[int, str]:
        if path not in self.objects:
            raise self._damaged("zarr.json", f"does not list {path}")
        return self.objects[path]

    def _parse(self, data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            group = json.loads(data)
            attributes, members = group["attributes"]["cdist"], group["consolidated_metadata"]["metadata"]
            if attributes["format"] != FORMAT or attributes["format_version"] != FORMAT_VERSION:
                raise self._damaged("zarr.json", f"has format {attributes['format']} {attributes['format_version']}")
            if attributes["columns"] != list(COLUMNS):
                raise self._damaged("zarr.json", "names other columns than this version knows")
            for name, member in members.items():
                shape = member["shape"]
                known = name in TABLE_ARRAYS or PAYLOADS.fullmatch(name)
                if (
                    not known
                    or member["node_type"] != "array"
                    or not all(isinstance(n, int) and 0 <= n < 2**48 for n in shape)
                ):
                    raise self._damaged("zarr.json", f"describes an array {name!r} this version does not know")
                if name not in TABLE_ARRAYS and len(shape) != 2:
                    raise self._damaged("zarr.json", f"describes an array {name!r} of the wrong shape")
                if not _is_ours(name, member):
                    raise self._damaged("zarr.json", f"gives the array {name!r} codecs or a layout it may not have")
            paths = {chunk_path(n, len(m["shape"])) for n, m in members.items()} | {f"{n}/zarr.json" for n in members}
            objects = {path: (int(size), str(sha)) for path, (size, sha) in attributes["objects"].items()}
            if set(objects) != paths or not all(DIGEST.fullmatch(sha) for _, sha in objects.values()):
                raise self._damaged("zarr.json", "lists other objects than its arrays have")
            skipped = [(str(key), str(reason)) for key, reason in attributes.get("skipped", [])]
            return members, attributes | {"objects": objects, "skipped": skipped}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise self._damaged("zarr.json", f"is not a fragment's metadata ({type(e).__name__}: {e})") from e

    def _damaged(self, path: str, what: str) -> StoreError:
        place = f"{self.path}/{path}".rstrip("/")
        return StoreError(
            f"{path or 'the fragment'} {what}",
            where=self._storage.where(place),
            remedy="the store is damaged: fetch it again, or remove the fragment and run precompute for its shard",
        )


def _is_ours(name: str, member: dict[str, Any]) -> bool:
    """Whether an array's metadata are what a writer of this format writes, whatever its zstd level."""
    dtype, _ = TABLE_ARRAYS.get(name, ("uint8", 2))
    sharded = name not in TABLE_ARRAYS
    codecs = member["codecs"][0]["configuration"]["codecs"] if sharded else member["codecs"]
    level = codecs[1]["configuration"]["level"]
    names, fill = member["dimension_names"], member["fill_value"]
    return isinstance(level, int) and member == zarr3.array_metadata(
        member["shape"], dtype, fill, names, level, sharded=sharded
    )
