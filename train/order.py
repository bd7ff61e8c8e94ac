"""The order of samples: a pure function of seed, epoch and what the shards hold, whoever reads it.

Samples are numbered shard by shard. An epoch shuffles the shards, takes them in windows and shuffles the samples of a
window, so that at any time only a window's shards are read: storage that hates seeking sees whole shards go by,
and whatever fits into one window is permuted as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from compodistill.errors import UsageError

WINDOW = 16_384  # samples; rather more than an optimizer step ever sees, rather less than a page cache holds
NOTHING = -1  # a micro batch no sample is left for: its rank goes through the motions, at no weight


def epoch_order(sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW) -> np.ndarray:
    """Every sample once, (N,) int64 numbers below sum(sizes).

    Args:
        sizes: samples of each shard, shards in an order that follows from their content.
        window: whole shards are gathered until they hold this many samples, then shuffled together.
    """
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    order: list[np.ndarray] = []
    gathered: list[np.ndarray] = []
    for shard in _shuffled(np.arange(len(sizes)), seed, epoch, 0):
        gathered.append(np.arange(starts[shard], starts[shard + 1]))
        if sum(map(len, gathered)) >= window:
            order.append(_shuffled(np.concatenate(gathered), seed, epoch, len(order) + 1))
            gathered = []
    if gathered:
        order.append(_shuffled(np.concatenate(gathered), seed, epoch, len(order) + 1))
    return np.concatenate(order) if order else np.zeros(0, np.int64)


def _shuffled(items: np.ndarray, *entropy: int) -> np.ndarray:
    """Sorted by raw random bits: numpy keeps those the same over its versions, but not what `permutation` does."""
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(len(items))
    return items[np.argsort(keys, kind="stable")]


class MicroBatches(Sampler[list[int]]):
    """One rank's micro batches of an epoch.

    A step's batch is the next `batch_size` samples of the epoch's order, however many ranks there are; it is cut
    into `ranks * accumulate` pieces. Every rank gets the same number of pieces, as collective operations need it: where
    an epoch's last batch is too small for that, the piece is `[NOTHING]`.

    Args:
        sizes: samples of each shard.
        batch_size: samples of one optimizer step, over all ranks.
        accumulate: pieces of a rank's share.
        epoch: asked anew whenever iteration begins.

    Raises:
        UsageError: the batch cannot be cut into equal pieces.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        ranks: int = 1,
        window: int = WINDOW,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        if batch_size % (ranks * accumulate):
            raise UsageError(
                f"a batch of {batch_size} cannot be cut into {accumulate} equal pieces on each of {ranks} ranks",
                where="batch_size, accumulate",
                remedy="batch_size counts the samples of one step over all ranks: make it a multiple of "
                f"{ranks * accumulate}, or change accumulate",
            )
        self._sizes, self._seed, self._window = list(sizes), seed, window
        self._batch_size, self._accumulate = batch_size, accumulate
        self._rank, self._ranks, self._epoch = rank, ranks, epoch

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-sum(self._sizes) // self._batch_size)

    def __len__(self) -> int:
        return self.steps * self._accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self._sizes, self._seed, self._epoch(), self._window)
        pieces = self._ranks * self._accumulate
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            bounds = [p * len(batch) // pieces for p in range(pieces + 1)]
            for turn in range(self._accumulate):
                p = turn * self._ranks + self._rank
                yield batch[bounds[p] : bounds[p + 1]].tolist() or [NOTHING]
