"""A store's objects in object storage (s3://, gs://, az://, http(s):// read-only), through obstore.

Nothing is overwritten: every object but the manifest is created by a conditional write (create if absent), and carries
the id of its write, so that a write whose answer was lost, and which was therefore tried again, is not mistaken for
somebody else's. Servers that ignore the condition are found out by `probe`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from compodistill.errors import StoreError, UsageError

WRITE_ID = "cdist-write"
PROBE = ".probe"
READ_AHEAD = 4 * 2**20
SCHEMES = ("s3", "s3a", "gs", "az", "adl", "abfs", "abfss", "http", "https")
RETRIES = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}


class RemoteFile:
    """An object read by ranges; reads that follow one another fetch some way ahead."""

    def __init__(self, storage: ObjectStorage, path: str, meta: Any) -> None:
        self._storage, self._path = storage, path
        self.size: int = meta["size"]
        self.version: str = str(meta.get("e_tag") or meta.get("last_modified"))
        self._start, self._window, self._next = 0, b"", 0

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            sequential = offset == self._next and offset > 0
            wanted = min(max(length, READ_AHEAD if sequential else 0), self.size - offset)
            data = self._storage.get_range(self._path, offset, wanted) if wanted else b""
            self._start, self._window, at = offset, data, 0
        self._next = offset + length
        return self._window[at : at + length]

    def close(self) -> None:
        self._window = b""


class ObjectStorage:
    """A prefix of a bucket, or a directory of a web server."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connect()

    def _connect(self) -> None:
        try:
            from obstore.store import from_url
        except ModuleNotFoundError as e:
            remedy = "pip install 'compodistill[s3]'"
            raise UsageError("reading and writing object storage needs obstore", where=self.url, remedy=remedy) from e
        self._pid = os.getpid()
        options = {"allow_http": True} if _plain_http(self.url) else {}
        try:
            self._store = from_url(self.url, client_options=options, retry_config=RETRIES)
        except Exception as e:  # obstore raises its own class for each of its configurations
            raise UsageError(f"not a place object storage can be at: {e}", where=self.url) from e

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url = state["url"]
        self._connect()

    @property
    def read_only(self) -> bool:
        return self.url.startswith("http")

    def where(self, path: str) -> str:
        return f"{self.url}/{path}"

    def exists(self, path: str) -> bool:
        return self._head(path) is not None

    def open(self, path: str) -> RemoteFile:
        meta = self._head(path)
        if meta is None:
            raise StoreError("an object is missing", where=self.where(path))
        return RemoteFile(self, path, meta)

    def read(self, path: str, limit: int) -> bytes:
        """A whole object; refused unread if larger than `limit` bytes."""
        file = self.open(path)
        if file.size > limit:
            raise StoreError(f"an object has {file.size} bytes, at most {limit} expected", where=self.where(path))
        return file.read(0, file.size)

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        with self._errors(path):
            return bytes(self._obstore.get_range(self._store, path, start=offset, length=length))

    def names(self, path: str) -> list[str] | None:
        """Names of the prefixes right below `path`; None where the server cannot list."""
        if self.read_only:
            return None
        with self._errors(path):
            found = self._obstore.list_with_delimiter(self._store, prefix=path)
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])

    def is_empty(self) -> bool:
        with self._errors(""):
            found = (meta["path"] for chunk in self._obstore.list(self._store, chunk_size=2) for meta in chunk)
            return all(path == PROBE for path in islice(found, 2))

    def create(self, path: str, data: bytes) -> bool:
        """Create an object with this content; False (and nothing changed) if there is one already."""
        from obstore.exceptions import AlreadyExistsError

        self._writable()
        if self.exists(path):  # also on servers that ignore the condition
            return False
        write = secrets.token_hex(16)
        with self._errors(path):
            try:
                attributes = {WRITE_ID: write}
                self._obstore.put(self._store, path, data, mode="create", attributes=attributes, use_multipart=False)
            except AlreadyExistsError:
                there = self._obstore.get(self._store, path)
                # ours after all: the first try arrived, its answer did not
                if WRITE_ID in there.attributes:
                    return there.attributes[WRITE_ID] == write
                return bytes(there.bytes()) == data  # a server that keeps no metadata
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Create an object or replace it whole."""
        self._writable()
        with self._errors(path):
            self._obstore.put(self._store, path, data, use_multipart=False)

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """A local directory to build in."""
        with tempfile.TemporaryDirectory(prefix=f"cdist-{name[:8]}-") as directory:
            yield Path(directory)

    def publish(self, directory: Path, path: str) -> bool:
        """Upload a finished directory, each object created and read back, its zarr.json last: that one publishes it.

        Returns:
            False if there is one already.

        Raises:
            StoreError: what is there is not what was built, and not published either.
        """
        root = f"{path}/zarr.json"
        if self.exists(root):
            return False
        for file in sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / "zarr.json"):
            name = f"{path}/{file.relative_to(directory).as_posix()}"
            data = file.read_bytes()
            self.create(name, data)
            if self._sha256(name) != hashlib.sha256(data).hexdigest():
                if self.exists(root):
                    return False
                raise StoreError(
                    "another result for this shard was being written here, and was not finished",
                    where=self.where(name),
                    remedy="if no other writer is at work, remove the unfinished fragment and run precompute again",
                )
        return self.create(root, (directory / "zarr.json").read_bytes())

    def clean(self) -> None:
        """Nothing to do: builds are local, and objects of unfinished uploads serve the next try."""

    def probe(self) -> bool:
        """Whether the server honours create-if-absent: two writers at once are safe only then."""
        from obstore.exceptions import AlreadyExistsError, NotSupportedError

        self._writable()
        with self._errors(PROBE):
            for _ in range(2):  # the second finds the first one's object, and so does every later probe's first
                try:
                    self._obstore.put(self._store, PROBE, b"", mode="create", use_multipart=False)
                except AlreadyExistsError:
                    return True
                except (NotSupportedError, NotImplementedError):
                    return False
        return False

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._errors(path):
            for chunk in self._obstore.get(self._store, path).stream(min_chunk_size=2**22):
                digest.update(chunk)
        return digest.hexdigest()

    def _head(self, path: str) -> Any | None:
        with self._errors(path):
            try:
                return self._obstore.head(self._store, path)
            except FileNotFoundError:
                return None

    def _writable(self) -> None:
        if self.read_only:
            raise UsageError("a store on a web server can only be read", where=self.url, remedy="use s3://, gs:// ...")

    @property
    def _obstore(self) -> Any:
        if os.getpid() != self._pid:  # its threads are not in the child: every call would wait forever
            raise UsageError(
                "a remote store cannot be used in a forked process",
                where=self.url,
                remedy="start workers by spawn: DataLoader(..., multiprocessing_context='spawn')",
            )
        import obstore

        return obstore

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """obstore's errors as ours, with the object's name; credentials do not appear in them."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as e:
            raise StoreError("an object is missing", where=self.where(path)) from e
        except PermissionError as e:
            raise UsageError("access is denied", where=self.where(path), remedy="check the credentials") from e
        except (BaseError, OSError) as e:
            if isinstance(e, FileExistsError):
                raise
            first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise StoreError(f"object storage did not answer: {first}", where=self.where(path)) from e


def _plain_http(url: str) -> bool:
    return url.startswith("http://") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
