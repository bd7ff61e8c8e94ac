"""Writes shards: the same bytes from the same input on every machine, and never half of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from compodistill.errors import UsageError
from compodistill.images import decode_image, image_suffix
from compodistill.tools.shards.source import SourceRecord

DEFAULT_SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class BuildReport:
    """What was written."""

    shards: tuple[Path, ...]
    samples: int
    images: int
    text_only: int
    bytes: int


def build_shards(
    records: Sequence[SourceRecord],
    out: Path,
    *,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    max_bytes: int | None = None,
    prefix: str = "shard",
    advance: Callable[[int], None] = lambda n: None,
) -> BuildReport:
    """Writes `OUT/PREFIX-000000.tar`, ...; image files are copied byte for byte after having been decoded once.

    A new shard begins after `samples_per_shard` samples, or before a sample that would take it past `max_bytes`
    of content (a larger sample stands alone). `out` appears complete or not at all.

    Raises:
        UsageError: `out` exists and is not an empty folder.
        DataError: an image that cannot be decoded; names record and file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the output folder is not empty", where=str(out), remedy="choose a new one, or remove it")
    with _published(out) as folder:
        writer = _RollingWriter(folder, prefix, samples_per_shard, max_bytes)
        try:
            for source in records:
                writer.write(source.key, _members(source))
                advance(1)
        finally:
            writer.close()
    shards = tuple(sorted(out.glob("*.tar")))
    return BuildReport(
        shards=shards,
        samples=len(records),
        images=sum(len(source.images) for source in records),
        text_only=sum(not source.images for source in records),
        bytes=sum(path.stat().st_size for path in shards),
    )


def _members(source: SourceRecord) -> dict[str, bytes]:
    members = {"json": json.dumps(source.record, ensure_ascii=False, sort_keys=True).encode()}
    for i, path in enumerate(source.images):
        data = path.read_bytes()
        where = f"{source.where}, image {path}"
        decode_image(data, where=where)
        suffix = image_suffix(data, where=where)
        members[f"{i}.{suffix}" if len(source.images) > 1 else suffix] = data
    return members


class _RollingWriter:
    """`webdataset.TarWriter` with fixed owner and time, on to the next file when one is full."""

    def __init__(self, folder: Path, prefix: str, max_samples: int, max_bytes: int | None) -> None:
        self._folder, self._prefix, self._max_samples, self._max_bytes = folder, prefix, max_samples, max_bytes
        self._shards = self._samples = self._bytes = 0
        self._tar: TarWriter | None = None

    def write(self, key: str, members: dict[str, bytes]) -> None:
        size = sum(len(data) for data in members.values())
        too_large = self._max_bytes is not None and self._bytes + size > self._max_bytes
        if self._tar is None or self._samples >= self._max_samples or (self._samples and too_large):
            self._next()
        assert self._tar is not None
        self._tar.write({"__key__": key, **members})
        self._samples += 1
        self._bytes += size

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = None

    def _next(self) -> None:
        self.close()
        self._file = open(self._folder / f"{self._prefix}-{self._shards:06d}.tar", "wb")  # noqa: SIM115
        self._tar = TarWriter(
            self._file, encoder=False, user="cdist", group="cdist", mtime=0, compress=False, format="PAX_FORMAT"
        )
        self._shards += 1
        self._samples = self._bytes = 0


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` if the block succeeds, and vanishes if it does not."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(f"the output folder cannot be made: {error.strerror}", where=str(out)) from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folder is its owner's alone
        temporary.rename(out)  # replaces an empty folder, fails on any other
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
