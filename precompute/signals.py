"""From a shard to its samples' signals: read, tokenize, forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from compodistill.errors import DataError
from compodistill.models import VisionLanguageModel
from compodistill.precompute.capture import CaptureSettings, capture
from compodistill.precompute.options import PassOptions
from compodistill.precompute.overlap import ahead
from compodistill.precompute.plan import Skipped, reason_of, usable_entries
from compodistill.shards import ShardEntry, read_sample
from compodistill.store.signals import SampleSignals
from compodistill.tokens import BUCKET, Tokens, tokenize


def signals_of_shard(
    teacher: VisionLanguageModel,
    shard: Path,
    settings: CaptureSettings,
    options: PassOptions,
    on_skip: Callable[[Skipped], None] = lambda skipped: None,
) -> Iterator[tuple[SampleSignals, int]]:
    """The signals of a shard's samples, in the shard's order, each with its number of tokens.

    Batches are made of samples with one padded length, within a window of a few batches, and always of the same
    number, so a sample's signals depend on nothing but itself.

    Args:
        on_skip: told of each sample left out, if `options.on_error` is `skip`.

    Raises:
        DataError: a sample that cannot be used, unless skipped; names shard and key.
    """
    n = options.samples_at_once
    for window in _batched(tokens_of_shard(teacher, shard, options, on_skip), 4 * n):
        done: dict[int, SampleSignals] = {}
        for indices in same_length(window, n):
            filled = [window[i] for i in indices] + [window[indices[-1]]] * (n - len(indices))
            done.update(zip(indices, capture(teacher, filled, settings), strict=False))  # fillers fall off the end
        for i, t in enumerate(window):
            yield done[i], len(t.input_ids)


def tokens_of_shard(
    teacher: VisionLanguageModel,
    shard: Path,
    options: PassOptions,
    on_skip: Callable[[Skipped], None] = lambda skipped: None,
) -> Iterator[Tokens]:
    """The tokenized samples of a shard that can be used, in its order, read ahead if `options` says so."""

    def read(entry: ShardEntry) -> Tokens | Skipped:
        try:
            sample = read_sample(shard, entry)
            return tokenize(teacher.processor, sample, teacher.image_token_id, options.max_length)
        except OSError as error:
            raise DataError(f"the shard cannot be read: {error.strerror}", where=f"shard {shard}") from error
        except DataError as error:
            if options.on_error == "stop":
                raise
            return Skipped(entry.key, reason_of(error))

    entries, skipped = usable_entries(shard, options.on_error)
    for left_out in skipped:
        on_skip(left_out)
    for result in ahead(read, entries, options.samples_ahead):
        if isinstance(result, Skipped):
            on_skip(result)
        else:
            yield result


def same_length(window: Sequence[Tokens], batch_size: int) -> Iterable[tuple[int, ...]]:
    """Indices of the window in batches of one padded length."""
    by_length: dict[int, list[int]] = {}
    for i, t in enumerate(window):
        by_length.setdefault(-(-len(t.input_ids) // BUCKET), []).append(i)
    for indices in by_length.values():
        yield from _batched(indices, batch_size)


def _batched(items: Iterable[Any], n: int) -> Iterator[tuple[Any, ...]]:
    """itertools.batched, which Python 3.11 does not have yet."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, n)):
        yield batch
