"""Tar members from an untrusted file: only plain files, only names that stay inside, never fewer than there are.

`tarfile` ends silently at a header it cannot read, so a tar cut at a 512-byte boundary, or one with a second
archive behind its end, looks complete to it. Here an archive must end with its two zero blocks and nothing else.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from compodistill.errors import DataError

MAX_HEADER_BYTES = 2**20  # tarfile reads extended headers whole; no honest one comes near this
END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside the tar: `size` bytes from `offset` of the tar file."""

    name: str
    offset: int
    size: int


class ArchiveError(DataError):
    """The tar itself is damaged or unsafe: what comes after this point cannot be trusted."""


Fault = Callable[..., ArchiveError]


def members(file: io.BufferedReader, *, shard: str) -> Iterator[Member]:
    """The plain files of an uncompressed tar, in order; none for a file of no bytes.

    Args:
        file: seekable; its position may be moved between two members.
        shard: name for messages.

    Raises:
        ArchiveError: truncated, damaged, compressed, or with a member that is a link, a device, or
            named outside the archive. Names the last member read.
    """
    last = ""

    def fault(what: str, remedy: str = "") -> ArchiveError:
        where = f"shard {shard}" + (f", after {last}" if last else ", at its beginning")
        return ArchiveError(what, where=where, remedy=remedy)

    length = os.fstat(file.fileno()).st_size
    if not length:
        return
    end_of_last = 0
    try:
        archive = tarfile.open(fileobj=_Bounded(file), mode="r:", encoding="utf-8", errors="strict")  # noqa: SIM115
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header of the shard
            if info.size < 0 or info.offset_data < end_of_last:
                raise fault("a header that points backwards")
            if not info.isdir():
                _check_member(info, fault)
                if info.offset_data + info.size > length:
                    raise _truncated(fault, f"{info.name!r} ends beyond the file")
                name = info.name.removeprefix("./")
                yield Member(name, info.offset_data, info.size)
                last = name
            end_of_last = info.offset_data + (info.size if info.isreg() else 0)
        tail = archive.offset
    except tarfile.ReadError as error:
        if not end_of_last and length >= tarfile.BLOCKSIZE and "unexpected end" not in str(error):
            raise fault(f"not a plain tar file: {error}", "shards are uncompressed tar files") from error
        raise _truncated(fault, str(error)) from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise fault(f"damaged tar header: {type(error).__name__}: {error}") from error
    _check_end(file, tail, fault)


def _check_member(info: tarfile.TarInfo, fault: Fault) -> None:
    if not info.isreg() or info.issparse():
        raise fault(f"{info.name!r} is a link, a device or a sparse file", "shards hold plain files only")
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\\" in info.name or "\0" in info.name or not path.parts:
        raise fault(f"{info.name!r} is a name that leads outside the archive", "rebuild the shard: cdist shards build")


def _check_end(file: io.BufferedReader, tail: int, fault: Fault) -> None:
    file.seek(tail)
    block = file.read(len(END))
    if block[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise fault("damaged tar header")
    if len(block) < len(END):
        raise _truncated(fault, "no end-of-archive blocks")
    while block:
        if block.strip(b"\0"):
            raise fault("data behind the end of the archive", "tar files joined by `cat` are not one tar file")
        block = file.read(2**20)


def _truncated(fault: Fault, detail: str) -> ArchiveError:
    return fault(f"the tar is truncated ({detail})", "copy or build it again")


class _Bounded(io.RawIOBase):
    """Gives tarfile the file, but no read of a size that only a hostile header asks for."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"an extended header of {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
