"""Top-k logits as small integers.

`lossless` keeps int32 ids and float32 values. `fine` and `compact` keep log-probabilities l on a grid that is finer
where the probability p = exp(l) is larger: an error d costs about p d^2 / 2 of KL divergence, so steps grow as
FINEST / sqrt(p) up to COARSEST. With l0 = 2 ln(FINEST / COARSEST) and c0 = 2 / FINEST - 2 / COARSEST,

    code = round(2 / FINEST * (1 - exp(l / 2)))   if l >= l0,   round(c0 + (l0 - l) / COARSEST)   otherwise

The log-sum-exp and the log of the kept mass stay float32, so the mass of the tail is exact: the decoder shifts each
row until its probabilities sum to the kept mass again.

Rows are kept in the order of their ids, which are indices into the sorted list of the sample's distinct ids; the order
by probability follows from the codes, with ties by id. Integers are kept as planes of bytes, the lowest first and only
as many as the largest needs, which zstd codes better than wider integers. Sections, in order:

    lse     (4, A)     planes of float32
    mass    (4, A)     planes of float32, the log of the kept probability
    least   (P, A)     the largest code of each row, of its least likely token
    n       ()         uint32, length of the list
    list    (P, n)     differences of the listed ids, which ascend; the first from 0
    gaps    (P, A, K)  differences of each row's indices, which ascend, less 1; the first from -1
    values  (P, A, K)  the row's largest code less the code
"""

from __future__ import annotations

import numpy as np

from compodistill.errors import StoreError
from compodistill.store.payload import joined, pack, planes, typed, unpack
from compodistill.store.signals import Logits

FINEST = {"compact": 1 / 420, "fine": 1 / 1800}
COARSEST = {"compact": 1 / 12, "fine": 1 / 64}


def encode(logits: Logits, codec: str) -> bytes:
    """Payload of a sample's top-k; rows must be sorted by (log-probability descending, id ascending)."""
    if codec == "lossless":
        return pack([logits.ids.astype("<i4"), logits.logprobs.astype("<f4"), logits.lse.astype("<f4")])
    by_id = np.argsort(logits.ids, axis=1)
    codes_AK = to_grid(np.take_along_axis(logits.logprobs, by_id, 1), codec)
    listed, index_AK = np.unique(np.take_along_axis(logits.ids, by_id, 1), return_inverse=True)
    index_AK = index_AK.reshape(codes_AK.shape)
    least_A = codes_AK.max(1)
    return pack(
        [
            planes(logits.lse.astype("<f4").view("<u4"), 4),
            planes(kept_mass(logits.logprobs).astype("<f4").view("<u4"), 4),
            planes(least_A),
            np.array([len(listed)], "<u4"),
            planes(np.diff(listed, prepend=0)),
            planes(np.diff(index_AK, axis=1, prepend=-1) - 1),
            planes(least_A[:, None] - codes_AK),
        ]
    )


def to_grid(logprobs_AK: np.ndarray, codec: str) -> np.ndarray:
    """int64 codes of log-probabilities, ascending as they descend; see the module's description."""
    finest, coarsest, l0, c0 = _grid(codec)
    l_AK = np.minimum(logprobs_AK.astype(np.float64), 0)
    fine_AK = 2 / finest * -np.expm1(np.maximum(l_AK, l0) / 2)
    return np.rint(np.where(l_AK >= l0, fine_AK, c0 + (l0 - l_AK) / coarsest)).astype(np.int64)


def from_grid(codes_AK: np.ndarray, codec: str) -> np.ndarray:
    """float32 log-probabilities of codes."""
    finest, coarsest, l0, c0 = _grid(codec)
    fine_AK = 2 * np.log1p(-finest / 2 * np.minimum(codes_AK, c0))
    return np.where(codes_AK <= c0, fine_AK, l0 - coarsest * (codes_AK - c0)).astype(np.float32)


def _grid(codec: str) -> tuple[float, float, float, float]:
    finest, coarsest = FINEST[codec], COARSEST[codec]
    return finest, coarsest, 2 * float(np.log(finest / coarsest)), 2 / finest - 2 / coarsest


def decode(payload: bytes | np.ndarray, shape: tuple[int, int], codec: str, vocab_size: int) -> Logits:
    """The top-k of a payload.

    Args:
        shape: (A, K).
        vocab_size: every id must be below it.

    Raises:
        StoreError: the payload contradicts itself, the shape or the vocabulary.
    """
    n = shape[0]
    if codec == "lossless":
        ids, values, lse = unpack(payload, 3)
        logits = Logits(
            typed(ids, "<i4", shape, "ids").astype(np.int32),
            typed(values, "<f4", shape, "logprobs").astype(np.float32),
            typed(lse, "<f4", (n,), "lse").astype(np.float32),
        )
    else:
        logits = _decode_grid(payload, shape, codec)
    if logits.ids.min() < 0 or logits.ids.max() >= vocab_size:
        raise StoreError(f"the logits name ids beyond the vocabulary of {vocab_size}")
    if not (np.isfinite(logits.logprobs).all() and np.isfinite(logits.lse).all()):
        raise StoreError("the logits contain NaN or infinity")
    return logits


def _decode_grid(payload: bytes | np.ndarray, shape: tuple[int, int], codec: str) -> Logits:
    n = shape[0]
    lse, mass, least, count, listed, gaps, values = unpack(payload, 7)
    n_listed = int(typed(count, "<u4", (1,), "n")[0])
    ids = joined(listed, (n_listed,), "list").cumsum()
    index_AK = (joined(gaps, shape, "gaps") + 1).cumsum(1) - 1
    if index_AK[:, -1].max() >= n_listed or ids[-1] >= 2**31:
        raise StoreError("the logits name ids that are not in the sample's list")
    codes_AK = joined(least, (n,), "least")[:, None] - joined(values, shape, "values")
    if codes_AK.min() < 0:
        raise StoreError("the logits have a probability above 1")
    order = np.argsort(codes_AK, axis=1, kind="stable")
    ids_AK = np.take_along_axis(ids[index_AK], order, 1)
    logprobs_AK = from_grid(np.take_along_axis(codes_AK, order, 1), codec)
    mass_A, lse_A = (joined(x, (n,), name).astype("<u4").view("<f4") for x, name in ((mass, "mass"), (lse, "lse")))
    logprobs_AK += (mass_A - kept_mass(logprobs_AK))[:, None]
    return Logits(ids_AK.astype(np.int32), logprobs_AK, lse_A.astype(np.float32))


def kept_mass(logprobs_AK: np.ndarray) -> np.ndarray:
    """(A,) float32: log of the probability mass of the kept tokens, at most 0."""
    most_A1 = logprobs_AK.max(1, keepdims=True)
    mass_A = np.log(np.exp(logprobs_AK - most_A1, dtype=np.float64).sum(1)) + most_A1[:, 0]
    return np.asarray(mass_A, dtype=np.float32)
