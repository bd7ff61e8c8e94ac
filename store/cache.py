"""A cache directory before a remote store: blocks of its objects, kept up to a limit, the least recently used go first.

Many processes may share one. What is read from it is checked like everything a reader reads, so a damaged block is
found; an object that was replaced has another version, and so other blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

from compodistill.store.storage import File, Reading

BLOCK = 2**20
DEFAULT_LIMIT = 20 * 2**30
COUNT_AGAIN = 64  # blocks written between two looks at the directory's size


class CachedFile:
    """An object whose blocks are kept in the cache's directory."""

    def __init__(self, cache: CachedStorage, path: str, file: File) -> None:
        self._cache, self._file, self.size = cache, file, file.size
        identity = f"{cache.url}\0{path}\0{file.size}\0{getattr(file, 'version', '')}"
        self._name = hashlib.sha256(identity.encode()).hexdigest()

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if end <= offset:
            return b""
        first, last = offset // BLOCK, (end - 1) // BLOCK
        data = b"".join(self._block(i) for i in range(first, last + 1))
        return data[offset - first * BLOCK : end - first * BLOCK]

    def close(self) -> None:
        self._file.close()

    def _block(self, i: int) -> bytes:
        name = f"{self._name}.{i}"
        expected = min(BLOCK, self.size - i * BLOCK)
        data = self._cache.get(name)
        if data is None or len(data) != expected:
            data = self._file.read(i * BLOCK, expected)
            self._cache.put(name, data)
        return data


class CachedStorage:
    """Reads through a cache.

    Args:
        storage: the remote place.
        directory: where blocks are kept; made if it does not exist.
        limit: bytes the directory may take (each process may exceed it by a few blocks).
    """

    def __init__(self, storage: Reading, directory: str | Path, limit: int = DEFAULT_LIMIT) -> None:
        self._storage, self._directory, self._limit = storage, Path(directory).absolute(), limit
        self.url = storage.url
        self._written = 0
        self._directory.mkdir(parents=True, exist_ok=True)

    def where(self, path: str) -> str:
        return self._storage.where(path)

    def exists(self, path: str) -> bool:
        return self._storage.exists(path)

    def names(self, path: str) -> list[str] | None:
        return self._storage.names(path)

    def open(self, path: str) -> CachedFile:
        return CachedFile(self, path, self._storage.open(path))

    def read(self, path: str, limit: int) -> bytes:
        return self._storage.read(path, limit)  # small, read once when a store or fragment is opened

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while being unpickled
            raise AttributeError(name)
        return getattr(self._storage, name)

    def get(self, name: str) -> bytes | None:
        path = self._directory / name
        try:
            data = path.read_bytes()
            os.utime(path)  # used just now
        except FileNotFoundError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        temporary = self._directory / f".{name}.{secrets.token_hex(4)}"
        temporary.write_bytes(data)
        os.replace(temporary, self._directory / name)
        if self._written % COUNT_AGAIN == 0 or self._limit < COUNT_AGAIN * BLOCK:
            self._evict()
        self._written += 1

    def _evict(self) -> None:
        found = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process evicts, too
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in found) - self._limit
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size
