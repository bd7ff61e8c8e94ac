"""Reads every sample and every image of shards, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compodistill.errors import CdistError, DataError, UsageError
from compodistill.shards import iter_shard


@dataclass
class CheckReport:
    """Totals over the shards read, and the faults found."""

    shards: int = 0
    samples: int = 0
    images: int = 0
    text_only: int = 0
    bytes: int = 0
    keys_in_several_shards: int = 0  # allowed: a sample is found by shard and key
    faults: list[CdistError] = field(default_factory=list)


def check_shards(
    paths: Sequence[Path], *, find_all: bool = False, advance: Callable[[int], None] = lambda n: None
) -> CheckReport:
    """Checks shards one after the other; without `find_all` it ends at the first fault."""
    report = CheckReport()
    seen: Counter[str] = Counter()
    for path in paths:
        report.shards += 1
        report.bytes += path.stat().st_size
        try:
            for sample in iter_shard(path, on_error=report.faults.append if find_all else "stop"):
                report.samples += 1
                report.images += len(sample.images)
                report.text_only += not sample.images
                seen[sample.key] += 1
        except (DataError, UsageError) as error:
            report.faults.append(error)
            if not find_all:
                break
        advance(1)
    report.keys_in_several_shards = sum(count > 1 for count in seen.values())
    return report
