"""Where a store's objects are: the few operations the store needs, and these on the local disk.

Paths are relative, with `/`. Nothing is ever overwritten by `create` and `publish`; what they made is on the disk
(fsync of file and directory) when they return.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from compodistill.errors import StoreError, UsageError

BUILDING = ".building"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")


class File(Protocol):
    """An open object, read at any offset."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...

    def close(self) -> None: ...


class Reading(Protocol):
    """What reading a store needs of the place it is at; `LocalStorage` says what each operation does."""

    url: str

    def where(self, path: str) -> str: ...

    def exists(self, path: str) -> bool: ...

    def open(self, path: str) -> File: ...

    def read(self, path: str, limit: int) -> bytes: ...

    def names(self, path: str) -> list[str] | None: ...


class Storage(Reading, Protocol):
    """What writing needs beyond."""

    def is_empty(self) -> bool: ...

    def create(self, path: str, data: bytes) -> bool: ...

    def replace(self, path: str, data: bytes) -> None: ...

    def building(self, name: str) -> AbstractContextManager[Path]: ...

    def publish(self, directory: Path, path: str) -> bool: ...

    def clean(self) -> None: ...

    def probe(self) -> bool: ...


def writable_storage(url: str | Path) -> Storage:
    """The place a URL names, for writing: a local path or object storage.

    Raises:
        UsageError: the scheme is unknown or can only be read.
    """
    from compodistill.store import remote

    scheme = scheme_of(url)
    if not scheme:
        return LocalStorage(url)
    if scheme in remote.SCHEMES and not scheme.startswith("http"):
        return remote.ObjectStorage(str(url))
    raise UsageError(
        f"a store cannot be written to {scheme}://", where=str(url), remedy="use a local path, s3://, gs:// or az://"
    )


def readable_storage(url: str | Path) -> Reading:
    """The place a URL names, for reading: also web servers, and what fsspec knows, such as hf://."""
    from compodistill.store import remote
    from compodistill.store.fsspec_storage import FsspecStorage

    scheme = scheme_of(url)
    if not scheme:
        return LocalStorage(url)
    return remote.ObjectStorage(str(url)) if scheme in remote.SCHEMES else FsspecStorage(str(url))


def scheme_of(url: str | Path) -> str:
    """s3 of s3://bucket/store; empty for paths."""
    head, separator, _ = str(url).partition("://")
    return head if separator else ""


class LocalFile:
    """An open object, read at any offset; safe to share between forked processes (pread keeps no position)."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


class LocalStorage:
    """A directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.url = str(root)

    def where(self, path: str) -> str:
        return f"{self.root}/{path}"

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def open(self, path: str) -> LocalFile:
        try:
            return LocalFile(self.root / path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
            raise StoreError("an object is missing", where=self.where(path)) from e

    def read(self, path: str, limit: int) -> bytes:
        """A whole object; refused unread if larger than `limit` bytes."""
        file = self.open(path)
        with contextlib.closing(file):
            if file.size > limit:
                raise StoreError(f"an object has {file.size} bytes, at most {limit} expected", where=self.where(path))
            return file.read(0, file.size)

    def names(self, path: str) -> list[str]:
        """Names of the directories right below `path`; empty if there is none."""
        try:
            with os.scandir(self.root / path) as entries:
                return sorted(e.name for e in entries if e.is_dir())
        except FileNotFoundError:
            return []

    def is_empty(self) -> bool:
        """Whether nothing is there, or nothing but builds and the root object another writer is about to make.

        Raises:
            UsageError: the place is a file.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UsageError("the store's place is a file", where=self.url, remedy="name another place")
        if not self.root.is_dir():
            return True
        return all(p.name == BUILDING or p.name.startswith(".zarr.json.") for p in self.root.iterdir())

    def probe(self) -> bool:
        """Whether create-if-absent holds between several writers: it does where hard links can be made."""
        return True

    def create(self, path: str, data: bytes) -> bool:
        """Create an object with this content; False (and nothing changed) if there is one already."""
        target = self.root / path
        with self._written_beside(target, data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        fsync_directory(target.parent)
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Create an object or replace it whole: a reader sees the old or the new one."""
        target = self.root / path
        with self._written_beside(target, data) as temporary:
            os.replace(temporary, target)
        fsync_directory(target.parent)

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """A directory to build in; removed at the end unless it was published.

        Its lock tells builds of living processes from leftovers of killed ones.
        """
        base = self.root / BUILDING
        lock = None
        while lock is None:
            base.mkdir(exist_ok=True)
            directory = base / f"{name}.{secrets.token_hex(6)}"
            with contextlib.suppress(FileNotFoundError):  # `clean` of another process removed `base`
                lock = _created_locked(Path(f"{directory}.lock"))
        try:
            directory.mkdir()
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            Path(f"{directory}.lock").unlink(missing_ok=True)
            os.close(lock)

    def publish(self, directory: Path, path: str) -> bool:
        """Move a finished directory to `path`; False (and nothing changed) if there is one already."""
        target = self.root / path
        fsync_tree(directory)
        try:
            os.rename(directory, target)
        except OSError as e:
            if target.exists():
                return False
            raise StoreError(f"cannot publish: {e}", where=str(target)) from e
        fsync_directory(target.parent)
        return True

    def clean(self) -> None:
        """Remove what killed builds left behind."""
        for lock in (self.root / BUILDING).glob("*.lock"):
            try:
                with lock.open() as f:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink(missing_ok=True)
            except (BlockingIOError, FileNotFoundError):
                continue  # alive, or cleaned by somebody else
        with contextlib.suppress(OSError):  # other builds go on in it
            (self.root / BUILDING).rmdir()
        places = self.root.glob("*"), (self.root / "fragments").glob("*"), (self.root / "teacher").rglob("*")
        for path in itertools.chain(*places):
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                with contextlib.suppress(BlockingIOError, FileNotFoundError), path.open() as f:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written_beside(self, target: Path, data: bytes) -> Iterator[Path]:
        """A temporary file with this content. Its lock tells it from the leftover of a killed process."""
        target.parent.mkdir(parents=True, exist_ok=True)
        fd = None
        while fd is None:
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
            fd = _created_locked(temporary)
        with open(fd, "wb") as f:
            try:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)


def _created_locked(path: Path) -> int | None:
    """A new file, locked; None if another process's `clean` took it for a leftover before the lock was ours."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    fcntl.flock(fd, fcntl.LOCK_EX)
    if path.exists():
        return fd
    os.close(fd)
    return None


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Every file and directory below a root, and itself, to the disk."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            fsync_directory(Path(directory) / name)
        fsync_directory(Path(directory))
