"""The plan: which shards there are, how much is in them, what is finished already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from compodistill.errors import DataError, UsageError
from compodistill.precompute.options import OnError
from compodistill.shards import ShardEntry, index_shard, shard_digest


@dataclass(frozen=True)
class ShardTask:
    """One shard to be worked on.

    Attributes:
        digest: the shard's sha256: its identity, checked again by the worker.
        n_samples: by the tar's headers, those that cannot be used included.
    """

    path: Path
    digest: str
    n_samples: int


@dataclass(frozen=True)
class Skipped:
    """A sample left out. `key` is empty where the archive itself is at fault (what follows a cut has no name)."""

    key: str
    reason: str


@dataclass
class Plan:
    """All shards in the order given; `finished` are those whose fragment is published."""

    shards: list[ShardTask]
    finished: set[str] = field(default_factory=set)

    @property
    def todo(self) -> list[ShardTask]:
        return [s for s in self.shards if s.digest not in self.finished]

    @property
    def digests(self) -> list[str]:
        return [s.digest for s in self.shards]

    @property
    def n_samples(self) -> int:
        return sum(s.n_samples for s in self.shards)


def look_at_shard(path: Path, on_error: OnError) -> ShardTask:
    """Digest and count of a shard; decodes nothing.

    Raises:
        DataError: the archive is damaged, or a key's members are (unless skipped).
        UsageError: it cannot be opened, or has no member.
    """
    entries, skipped = usable_entries(path, on_error)
    return ShardTask(path, shard_digest(path), len(entries) + sum(1 for s in skipped if s.key))


def make_plan(found: Iterable[ShardTask], order: list[Path]) -> Plan:
    """Put the shards into their order.

    Raises:
        UsageError: two shards have the same content.
    """
    place = {path: i for i, path in enumerate(order)}
    shards = sorted(found, key=lambda s: place[s.path])
    by_digest: dict[str, ShardTask] = {}
    for shard in shards:
        twin = by_digest.setdefault(shard.digest, shard)
        if twin is not shard:
            raise UsageError(
                "two shards have the same content", where=f"{twin.path}, {shard.path}", remedy="pass each shard once"
            )
    return Plan(shards)


def mark_finished(plan: Plan, finished: Callable[[str], bool]) -> None:
    """Note which fragments are published already."""
    plan.finished = {d for d in plan.digests if finished(d)}


def usable_entries(path: Path, on_error: OnError) -> tuple[list[ShardEntry], list[Skipped]]:
    """A shard's samples by its headers, and those left out. Of a key that occurs twice, both are left out.

    Raises:
        DataError: a fault, unless skipped; names shard and key.
    """
    faults: list[DataError] = []
    index = index_shard(path, on_error="stop" if on_error == "stop" else faults.append)
    reasons = {f.key: f for f in reversed(faults)}
    skipped = [Skipped(key, reason_of(fault)) for key, fault in reversed(reasons.items())]
    return [e for e in index.entries if e.key not in reasons], skipped


def reason_of(error: DataError) -> str:
    """Why a sample is left out, without paths of this machine: the list is part of the store."""
    return error.what
