"""Input shards: WebDataset tars of `KEY.json` and `KEY.{jpg,jpeg,png,webp}` (or `KEY.0.jpg`, `KEY.1.jpg`, ...).

    for sample in iter_shard("train-000000.tar"): ...        # a stream
    index = index_shard("train-000000.tar")                   # keys and offsets, nothing decoded
    sample = read_sample(index.path, index["000042"])         # the same sample, by random access

The files are untrusted: nothing in them executes, sizes are bounded, and a damaged archive never passes for a
shorter one.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from compodistill.archive import ArchiveError, Member, members
from compodistill.errors import DataError, UsageError
from compodistill.images import decode_image
from compodistill.records import MAX_JSON_BYTES, check_marks, parse_json, parse_record
from compodistill.samples import Sample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_PART = re.compile(r"(?:(?P<number>0|[1-9]\d{0,3})\.)?(?P<image>jpg|jpeg|png|webp)|json")
MAX_IMAGE_BYTES = 128 * 2**20
MAX_SHARDS = 1_000_000  # what one brace range may expand to

OnError = Callable[[DataError], None] | Literal["stop"]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One sample's members in the tar, images in their order."""

    key: str
    record: Member
    images: tuple[Member, ...] = ()


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard in their order; look-up by key."""

    path: Path
    entries: tuple[ShardEntry, ...]

    @property
    def keys(self) -> list[str]:
        return [entry.key for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> ShardEntry:
        return self._by_key[key]

    @cached_property
    def _by_key(self) -> dict[str, ShardEntry]:
        return {entry.key: entry for entry in self.entries}


def shard_digest(path: str | Path) -> str:
    """The sha256 of the file, in hexadecimal: a shard's identity, whatever it is called."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def iter_shard(path: str | Path, *, on_error: OnError = "stop") -> Iterator[Sample]:
    """The samples of one shard, in order.

    Args:
        path: a local, uncompressed tar.
        on_error: "stop" raises the first fault; a callable is given each fault and the sample is left out. After
            a fault of the archive itself (truncated, unsafe) the callable gets it and the stream ends.

    Raises:
        DataError: names shard, key and field.
        UsageError: no such file, or a shard without a single member.
    """
    with _open(path) as file:
        for entry in _entries(file, str(path), on_error):
            try:
                sample = _read(file, entry, str(path))
            except DataError as error:
                error.key = entry.key
                _handle(error, on_error)
            else:
                yield sample


def index_shard(path: str | Path, *, on_error: OnError = "stop") -> ShardIndex:
    """Keys and where their members stand; reads the tar's headers only. `on_error` as in `iter_shard`."""
    with _open(path) as file:
        return ShardIndex(Path(path), tuple(_entries(file, str(path), on_error)))


def read_sample(path: str | Path, entry: ShardEntry) -> Sample:
    """One sample by random access: equal to the one `iter_shard` yields."""
    with _open(path) as file:
        return _read(file, entry, str(path))


def expand_shards(patterns: str | Path | Iterable[str | Path]) -> list[Path]:
    """Paths of globs (`DIR/*.tar`) and braces (`DIR/{000..099}.tar`): patterns in the order given, each sorted.

    Raises:
        UsageError: a pattern, or one term of a brace range, that matches no file; a folder; an address that is
            not a local path.
    """
    paths: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        for path in _expand(str(pattern)):
            paths.setdefault(path)
    if not paths:
        raise UsageError("no shards given", remedy="for instance --shards 'DIR/*.tar'")
    return list(paths)


def _expand(pattern: str) -> list[Path]:
    if Path(pattern).is_file():  # a name that holds a brace or a star itself
        return [Path(pattern)]
    if re.match(r"[a-z0-9+.-]+:(//|[^\\/])", pattern):
        raise UsageError(
            "shards are read from local paths only", where=pattern, remedy="copy them to this machine, or mount them"
        )
    try:
        terms = list(itertools.islice(braceexpand(pattern), MAX_SHARDS + 1))
    except ValueError as error:
        raise UsageError(f"unbalanced braces: {error}", where=pattern) from error
    if len(terms) > MAX_SHARDS:
        raise UsageError(f"the braces expand to more than {MAX_SHARDS:,} shards", where=pattern)
    found = []
    for term in terms:
        matches = sorted(glob.glob(term, recursive=True)) if glob.has_magic(term) else [term]
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            folder = next((match for match in matches if Path(match).is_dir()), None)
            raise UsageError(
                "this is a folder, not a shard" if folder else "no such shard", where=term,
                remedy=f"for instance '{folder}/*.tar'" if folder else "check the path and its pattern",
            )  # fmt: skip
        found += files
    return found


def _entries(file: BufferedReader, shard: str, on_error: OnError) -> Iterator[ShardEntry]:
    """Groups neighbouring members of one key. Faults of a group leave it out; an archive's fault ends the stream."""
    seen: set[str] = set()
    empty = True
    stream = members(file, shard=shard)
    groups = itertools.groupby(stream, key=lambda member: _split_name(member.name)[0])
    try:
        for key, group in groups:
            empty = False
            try:
                entry = _entry(key, list(group), shard, seen)
            except ArchiveError:
                raise
            except DataError as error:
                error.key = key
                _handle(error, on_error)
            else:
                yield entry
    except ArchiveError as error:
        _handle(error, on_error)
        return
    if empty:
        raise UsageError("the shard is empty", where=f"shard {shard}", remedy="build it again: cdist shards build")


def _entry(key: str, group: list[Member], shard: str, seen: set[str]) -> ShardEntry:
    where = f"shard {shard}, key {key}"
    if key in seen:
        raise DataError("the key occurs twice, or its members do not stand together", where=where)
    seen.add(key)
    records: list[Member] = []
    images: dict[int | None, Member] = {}
    for member in group:
        part = _PART.fullmatch(_split_name(member.name)[1])
        if not key or key.endswith("/") or part is None:
            raise DataError(
                f"unknown kind of member {member.name!r}", where=where,
                remedy=f"KEY.json, KEY.SUFFIX and KEY.NUMBER.SUFFIX are read, with {', '.join(IMAGE_SUFFIXES)}",
            )  # fmt: skip
        limit = MAX_JSON_BYTES if part["image"] is None else MAX_IMAGE_BYTES
        if member.size > limit:
            raise DataError(f"{member.size:,} bytes, more than {limit:,}", where=f"{where}, member {member.name}")
        if part["image"] is None:
            records.append(member)
            continue
        number = int(part["number"]) if part["number"] else None
        if number in images:
            raise DataError("two images for one place", where=f"{where}, member {member.name}")
        images[number] = member
    if len(records) != 1:
        raise DataError(
            f"{len(records) or 'no'} JSON record{'s' * (len(records) > 1)} for the key", where=where,
            remedy="a key's members must stand together: tar --sort=name, or cdist shards build",
        )  # fmt: skip
    if set(images) not in ({None}, set(range(len(images)))):
        names = ", ".join(member.name for member in images.values())
        raise DataError(
            f"the images are not numbered 0, 1, ...: {names}", where=where,
            remedy="one image is KEY.jpg, several are KEY.0.jpg, KEY.1.jpg, ...",
        )  # fmt: skip
    return ShardEntry(key, records[0], tuple(images[number] for number in sorted(images, key=lambda n: n or 0)))


def _read(file: BufferedReader, entry: ShardEntry, shard: str) -> Sample:
    where = f"shard {shard}, key {entry.key}"
    record = parse_json(_bytes(file, entry.record, where), where=f"{where}, field json")
    turns = parse_record(record, where=where)
    check_marks(turns, len(entry.images), where=where)
    images = (decode_image(_bytes(file, m, where), where=f"{where}, member {m.name}") for m in entry.images)
    return Sample(entry.key, turns, tuple(images), shard)


def _bytes(file: BufferedReader, member: Member, where: str) -> bytes:
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:  # the file has changed under an index made earlier
        raise ArchiveError("the tar is shorter than its index says", where=f"{where}, member {member.name}")
    return data


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _open(path: str | Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"the shard cannot be opened: {error.strerror}", where=str(path)) from error


def _handle(error: DataError, on_error: OnError) -> None:
    if on_error == "stop":
        raise error
    on_error(error)
