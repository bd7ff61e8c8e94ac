"""Reading a store from anything fsspec knows, such as hf://datasets/OWNER/NAME (the hub's own client does the rest)."""

from __future__ import annotations

from typing import Any

from compodistill.errors import StoreError, UsageError


class FsspecFile:
    """An object read by ranges."""

    def __init__(self, fs: Any, path: str, size: int, version: str) -> None:
        self._fs, self._path, self.size, self.version = fs, path, size, version

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        return bytes(self._fs.cat_file(self._path, start=offset, end=end)) if end > offset else b""

    def close(self) -> None:
        """Nothing is held open."""


class FsspecStorage:
    """A directory of an fsspec filesystem, read-only."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as e:
            raise UsageError(f"nothing here reads this URL: {e}", where=url, remedy="check the scheme") from e

    def where(self, path: str) -> str:
        return f"{self.url}/{path}"

    def exists(self, path: str) -> bool:
        return bool(self._fs.isfile(f"{self._root}/{path}"))

    def open(self, path: str) -> FsspecFile:
        full = f"{self._root}/{path}"
        try:
            info = self._fs.info(full)
        except FileNotFoundError as e:
            raise StoreError("an object is missing", where=self.where(path)) from e
        version = next((str(info[k]) for k in ("ETag", "etag", "blob_id", "mtime", "created") if info.get(k)), "")
        return FsspecFile(self._fs, full, info["size"], version)

    def read(self, path: str, limit: int) -> bytes:
        """A whole object; refused unread if larger than `limit` bytes."""
        file = self.open(path)
        if file.size > limit:
            raise StoreError(f"an object has {file.size} bytes, at most {limit} expected", where=self.where(path))
        return file.read(0, file.size)

    def names(self, path: str) -> list[str] | None:
        """Names of the directories right below `path`."""
        try:
            found = self._fs.ls(f"{self._root}/{path}", detail=True)
        except FileNotFoundError:
            return []
        return sorted(i["name"].rstrip("/").rpartition("/")[2] for i in found if i["type"] == "directory")
