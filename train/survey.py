"""Which samples of the shards the store has signals for: looked through once, before anything is trained.

A shard is known by the sha256 of its bytes, so each is read as a whole; the ranks of a run share the work, and what was
found is remembered by path, size and modification time while the run lasts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

from accelerate.utils import gather_object
from torch import distributed

from compodistill.errors import CdistError, MismatchError, UsageError
from compodistill.shards import index_shard, shard_digest
from compodistill.store.reader import Store

OnMissing = Literal["error", "skip"]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Shard:
    """A shard and how much of it can be trained on.

    Attributes:
        samples: those the store has signals for.
        missing: keys of the others, in the shard's order.
    """

    path: Path
    digest: str
    samples: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """The shards of a run, ordered by digest: the numbering of samples follows from content, not from names."""

    shards: tuple[Shard, ...]

    @property
    def missing(self) -> list[tuple[Path, str]]:
        """(shard, key) of every sample without signals."""
        return [(s.path, key) for s in self.shards for key in s.missing]

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.shards)


class Remembered:
    """Digests of files by path, size and modification time, in a JSON file of the run."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            self._known = {} if path is None else json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def digest(self, path: Path) -> str:
        """The sha256 of a shard, from memory where the file has not been touched since."""
        stat = path.stat() if path.is_file() else None
        known = self._known.get(str(path)) if stat else None
        if stat and isinstance(known, dict) and (known["size"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return str(known["sha256"])
        return shard_digest(path)

    def save(self, shards: Sequence[Shard]) -> None:
        if self._path is not None:
            stats = [(s, s.path.stat()) for s in shards]
            self._path.write_text(
                json.dumps(
                    {str(s.path): {"sha256": s.digest, "size": t.st_size, "mtime_ns": t.st_mtime_ns} for s, t in stats}
                )
            )


def survey(
    store: Store, paths: Sequence[Path], *, on_missing: OnMissing = "error", remembered: Remembered | None = None
) -> Survey:
    """Match shards with the store's fragments.

    Args:
        on_missing: what to do about samples without signals: refuse, or leave them out (the result lists them).

    Raises:
        UsageError: two shards are the same file.
        MismatchError: a shard that changed since the teacher's pass; missing samples where they are refused, or
            where nothing else is left.
    """
    remembered = remembered or Remembered(None)
    shards = sorted(shared(lambda path: _look(store, path, remembered), paths), key=lambda s: s.digest)
    for one, other in pairwise(shards):
        if one.digest == other.digest:
            raise UsageError(
                "two shards have the same content", where=f"{one.path}, {other.path}", remedy="pass each shard once"
            )
    found = Survey(tuple(shards))
    if found.missing and (on_missing == "error" or not found.samples):
        raise _refusal(found)
    return found


def _look(store: Store, path: Path, remembered: Remembered) -> Shard:
    digest = remembered.digest(path)
    names = {name: known for known, name, _ in store.fragments}
    held = {known for known, _, _ in store.fragments}
    if digest not in held and path.name in names:
        raise MismatchError(
            f"the shard changed since the teacher's pass: sha256 {digest} here, {names[path.name]} in the store",
            where=str(path),
            remedy="take the shard the store was made of, or run cdist precompute with this one",
        )
    keys = index_shard(path).keys
    there = set(store.keys(digest)) if digest in held else set()
    missing = tuple(k for k in keys if k not in there)
    return Shard(path, digest, len(keys) - len(missing), missing)


def _refusal(found: Survey) -> MismatchError:
    missing = found.missing
    total = found.samples + len(missing)
    whole = [s for s in found.shards if not s.samples]
    remedy = "run cdist precompute with these shards, or leave the samples out: --on-missing skip"
    if whole:
        shown = ", ".join(f"{s.path} (sha256 {s.digest[:12]}...)" for s in whole[:3])
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        plural = "this shard" if len(whole) == 1 else f"{len(whole)} of {len(found.shards)} shards"
        return MismatchError(f"the store has no signals for {plural}", where=shown + more, remedy=remedy)
    shown = ", ".join(f"shard {path}, key {key}" for path, key in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return MismatchError(
        f"the store has no signals for {len(missing)} of {total} samples", where=shown + more, remedy=remedy
    )


def shared(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[work(i) for i in items]`, the items divided among the ranks; an error on one rank is raised on all."""
    if not distributed.is_initialized():
        return [work(item) for item in items]
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    mine: list[tuple[int, R | CdistError]] = []
    try:
        for i in range(rank, len(items), ranks):
            mine.append((i, work(items[i])))
    except CdistError as error:
        mine.append((i, error))
    everyone = sorted(gather_object(mine), key=lambda pair: pair[0])
    for _, result in everyone:
        if isinstance(result, CdistError):
            raise result
    return [result for _, result in everyone]
