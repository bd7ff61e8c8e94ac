import subprocess
import sys
from itertools import chain

import numpy as np
import pytest

from compodistill.errors import UsageError
from compodistill.train.order import NOTHING, MicroBatches, epoch_order

SIZES = [7, 1, 12, 30, 5, 9]


@pytest.mark.parametrize("window", [1, 10, 10_000])
def test_every_sample_once_an_epoch(window):
    assert sorted(epoch_order(SIZES, 3, 1, window)) == list(range(sum(SIZES)))


def test_order_depends_on_seed_and_epoch_and_on_nothing_of_the_process():
    same, epoch, seed = epoch_order(SIZES, 3, 1), epoch_order(SIZES, 3, 2), epoch_order(SIZES, 4, 1)
    assert not np.array_equal(same, epoch)
    assert not np.array_equal(same, seed)
    script = f"from compodistill.train.order import epoch_order; print(epoch_order({SIZES}, 3, 1).tolist())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(same.tolist())


def test_order_is_the_one_this_version_began_with():
    """Another order would silently break the resumption of runs begun before."""
    assert epoch_order([4, 3, 5], 0, 0).tolist() == PINNED


PINNED = [4, 7, 8, 6, 1, 10, 11, 2, 9, 0, 5, 3]


def test_samples_of_a_window_come_from_a_window_of_whole_shards():
    sizes = [100] * 50
    order = epoch_order(sizes, 0, 0, window=1000)
    shards = order // 100
    for start in range(0, len(order), 1000):
        assert len(set(shards[start : start + 1000])) == 10
    assert len(set(shards[:1000])) < len(set(shards))


def batches(ranks, accumulate, batch_size=8, sizes=SIZES):
    """Step by step the samples of all ranks."""
    streams = [
        list(MicroBatches(sizes, seed=1, batch_size=batch_size, accumulate=accumulate, rank=r, ranks=ranks))
        for r in range(ranks)
    ]
    assert len({len(s) for s in streams}) == 1
    steps = range(0, len(streams[0]), accumulate)
    return [[i for a in range(accumulate) for s in streams for i in s[step + a] if i != NOTHING] for step in steps]


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 2), (4, 1), (2, 4)])
def test_sequence_of_batches_is_the_same_for_any_ranks_and_pieces(ranks, accumulate):
    whole = batches(1, 1)
    assert batches(ranks, accumulate) == whole
    assert sorted(chain(*whole)) == list(range(sum(SIZES)))


def test_rank_without_a_sample_in_the_last_batch_still_gets_a_turn():
    last = [list(MicroBatches([9], seed=0, batch_size=8, rank=r, ranks=4))[-1] for r in range(4)]
    assert sorted(map(len, last)) == [1, 1, 1, 1]
    assert sum(b == [NOTHING] for b in last) == 3


def test_batch_that_cannot_be_cut_is_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"batch of 8 .* 3 equal pieces on each of 2 ranks"):
        MicroBatches(SIZES, seed=0, batch_size=8, accumulate=3, ranks=2)
