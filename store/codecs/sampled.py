"""Ids drawn from the teacher's distribution, with counts: exact in every codec.

Rows are kept in the order of their ids, which are indices into the sorted list of the sample's distinct ids; integers
as planes of bytes, as in `logits`. With D distinct draws in all of the sample's rows together:

    lse       (4, A)  planes of float32
    distinct  (P, A)  distinct ids of each row
    n         ()      uint32, length of the list
    list      (P, n)  differences of the listed ids, which ascend; the first from 0
    gaps      (P, D)  differences of each row's indices, which ascend, less 1; the first of a row from -1
    counts    (P, D)  how often each was drawn, less 1
"""

from __future__ import annotations

import numpy as np

from compodistill.errors import StoreError
from compodistill.store.payload import joined, pack, planes, typed, unpack
from compodistill.store.signals import SampledLogits


def encode(logits: SampledLogits) -> bytes:
    """Payload of a sample's draws."""
    drawn = logits.counts > 0
    by_id = np.argsort(np.where(drawn, logits.ids, np.iinfo(np.int32).max), axis=1, kind="stable")
    ids_AN, counts_AN, drawn = (np.take_along_axis(x, by_id, 1) for x in (logits.ids, logits.counts, drawn))
    distinct_A = drawn.sum(1)
    listed, index = np.unique(ids_AN[drawn], return_inverse=True)
    gaps = np.diff(index, prepend=0) - 1
    first = np.concatenate([[0], distinct_A[:-1].cumsum()])
    gaps[first] = index[first]
    return pack(
        [
            planes(logits.lse.astype("<f4").view("<u4"), 4),
            planes(distinct_A),
            np.array([len(listed)], "<u4"),
            planes(np.diff(listed, prepend=0)),
            planes(gaps),
            planes(counts_AN[drawn] - 1),
        ]
    )


def decode(payload: bytes | np.ndarray, n_supervised: int, draws: int, vocab_size: int) -> SampledLogits:
    """The draws of a payload.

    Args:
        n_supervised: A.
        draws: how many were drawn for each of the A tokens.
        vocab_size: every id must be below it.

    Raises:
        StoreError: the payload contradicts itself, the draws or the vocabulary.
    """
    lse, distinct, n, listed, gaps, counts = unpack(payload, 6)
    distinct_A = joined(distinct, (n_supervised,), "distinct")
    if distinct_A.min() < 1 or distinct_A.max() > draws:
        raise StoreError(f"the draws name more or fewer distinct ids than {draws} draws can have")
    n_listed, total = int(typed(n, "<u4", (1,), "n")[0]), int(distinct_A.sum())
    ids = joined(listed, (n_listed,), "list").cumsum()
    steps = joined(gaps, (total,), "gaps") + 1
    ends = distinct_A.cumsum()
    before = np.concatenate([[0], steps.cumsum()])[ends - distinct_A]
    index = steps.cumsum() - np.repeat(before, distinct_A) - 1
    if not n_listed or index.max() >= n_listed or ids[-1] >= vocab_size:
        raise StoreError(f"the draws name ids beyond the sample's list or the vocabulary of {vocab_size}")
    drawn = np.arange(distinct_A.max()) < distinct_A[:, None]
    ids_AN, counts_AN = np.full(drawn.shape, -1, np.int32), np.zeros(drawn.shape, np.int32)
    ids_AN[drawn] = ids[index]
    counts_AN[drawn] = joined(counts, (total,), "counts") + 1
    if (counts_AN.sum(1) != draws).any():
        raise StoreError(f"the counts of a row do not add up to {draws} draws")
    order = np.argsort(-counts_AN, axis=1, kind="stable")
    lse_A = joined(lse, (n_supervised,), "lse").astype("<u4").view("<f4").astype(np.float32)
    if not np.isfinite(lse_A).all():
        raise StoreError("the logits contain NaN or infinity")
    return SampledLogits(np.take_along_axis(ids_AN, order, 1), np.take_along_axis(counts_AN, order, 1), lse_A)
