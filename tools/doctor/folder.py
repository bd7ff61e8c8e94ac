"""Whether a folder keeps the promises publication needs: create-if-absent, fsync of file and folder, rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from compodistill.errors import UsageError


def folder_checks(folder: Path) -> dict[str, str]:
    """Check name -> "ok" or what went wrong. Works in a temporary folder inside `folder` and leaves nothing.

    Raises:
        UsageError: `folder` is no folder one can write to.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder), remedy="name an existing folder, for instance the parent")
    try:
        with tempfile.TemporaryDirectory(prefix=".cdist-doctor-", dir=folder) as temporary:
            return {name: _verdict(check, Path(temporary)) for name, check in _CHECKS.items()}
    except OSError as error:
        raise UsageError(f"the folder cannot be written to: {error.strerror}", where=str(folder)) from error


def _verdict(check: Callable[[Path], None], folder: Path) -> str:
    try:
        check(folder)
    except OSError as error:
        return f"no: {error.strerror}"
    except AssertionError as error:
        return f"no: {error}"
    return "ok"


def _create_if_absent(folder: Path) -> None:
    path = folder / "once"
    _write(path, b"first", os.O_EXCL)
    try:
        _write(path, b"second", os.O_EXCL)
    except FileExistsError:
        return
    raise AssertionError("a second create-if-absent replaced the first")


def _link_if_absent(folder: Path) -> None:
    for name in ("one", "two"):
        _write(folder / name, name.encode(), os.O_EXCL)
    os.link(folder / "one", folder / "published")
    try:
        os.link(folder / "two", folder / "published")
    except FileExistsError:
        return
    raise AssertionError("a second link replaced the first")


def _rename(folder: Path) -> None:
    _write(folder / "new", b"new", os.O_EXCL)
    _write(folder / "old", b"old", os.O_EXCL)
    os.replace(folder / "new", folder / "old")
    if (folder / "old").read_bytes() != b"new" or (folder / "new").exists():
        raise AssertionError("rename did not replace the file")


def _fsync_file(folder: Path) -> None:
    _write(folder / "synced", b"x", os.O_EXCL)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_CHECKS: dict[str, Callable[[Path], None]] = {
    "create-if-absent": _create_if_absent,
    "link-if-absent": _link_if_absent,
    "rename": _rename,
    "fsync-file": _fsync_file,
    "fsync-folder": _fsync_folder,
}
