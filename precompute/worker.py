"""One task of the pass: one shard, from reading to the published fragment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compodistill.errors import DataError, StoreError
from compodistill.precompute.overlap import behind
from compodistill.precompute.plan import ShardTask, Skipped
from compodistill.precompute.signals import signals_of_shard
from compodistill.precompute.teacher import Job, capture_settings, teacher_of
from compodistill.shards import shard_digest
from compodistill.store.writer import StoreWriter, create_store


@dataclass(frozen=True)
class Receipt:
    """What a task hands back: counts, never tensors.

    Attributes:
        n_samples: stored; `tokens` and `visual_tokens` are theirs, `supervised_tokens` those with logits.
        n_bytes: of the fragment.
        seconds: of the task, loading the teacher left out.
        skipped: samples of the shard that have no signals.
        was_finished: the fragment was there already and nothing was done.
    """

    shard: Path
    digest: str
    n_samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    visual_tokens: int = 0
    n_bytes: int = 0
    seconds: float = 0.0
    skipped: tuple[Skipped, ...] = ()
    was_finished: bool = False


def run_shard(task: ShardTask, job: Job, on_sample: Callable[[int], None] = lambda tokens: None) -> Receipt:
    """Run the teacher over one shard and publish its fragment; does nothing if that is there already.

    Args:
        on_sample: called after each sample with its number of tokens.

    Raises:
        DataError: the shard is not the one of the plan, or has a sample that cannot be used (unless skipped).
        StoreError: the store cannot be written, or holds another result for this shard.
    """
    try:
        writer = create_store(job.store, job.spec)
        if writer.finished(task.digest):
            return Receipt(task.path, task.digest, was_finished=True)
        with teacher_of(job) as teacher:
            started = time.monotonic()
            before = _identity(task.path)
            if shard_digest(task.path) != task.digest:
                raise _changed(task)
            skipped: list[Skipped] = []
            samples = signals_of_shard(
                teacher, task.path, capture_settings(teacher, job.options), job.options, skipped.append
            )
            n = tokens = supervised = visual = 0
            with writer.fragment(task.path.name, task.digest) as fragment:
                with behind(fragment.add, job.options.samples_ahead) as add:
                    for signals, length in samples:
                        add(signals)
                        n, tokens = n + 1, tokens + length
                        supervised += len(signals.supervised_positions)
                        visual += len(signals.visual_positions)
                        on_sample(length)
                if n == 0:
                    raise DataError(
                        "the shard has no sample that can be used", where=str(task.path), remedy="leave it out"
                    )
                if _identity(task.path) != before:
                    raise _changed(task)
                for left_out in skipped:
                    fragment.skip(left_out.key, left_out.reason)
            seconds = time.monotonic() - started
            return Receipt(
                task.path, task.digest, n, tokens, supervised, visual, fragment.n_bytes, seconds, tuple(skipped)
            )
    except OSError as error:  # the shard's are DataErrors by now
        raise cannot_write(job.store, error) from error


def cannot_write(store: str, error: OSError) -> StoreError:
    """What the operating system says of a store that takes no more: full disk, read-only, quota."""
    return StoreError(
        f"the store cannot be written: {error.strerror or error}",
        where=str(error.filename or store),
        remedy="make room or give write permission, then run the same command again: it goes on where it stopped",
    )


def check_published(writer: StoreWriter, receipt: Receipt) -> None:
    """Refuse a worker that wrote its fragment where nobody else sees it.

    Raises:
        StoreError: the fragment of the receipt is not in the store.
    """
    if not writer.finished(receipt.digest):
        raise StoreError(
            "a worker says the shard is finished, but its fragment is not in the store",
            where=f"shard {receipt.shard}",
            remedy="the store's place must be the same for all workers: a shared file system or object storage",
        )


def _identity(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _changed(task: ShardTask) -> DataError:
    return DataError(
        "the shard changed since the plan was made",
        where=f"shard {task.path}",
        remedy="run the same command again once nobody writes to it",
    )
