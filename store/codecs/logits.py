"""Top-k logits as small integers.

`lossless` keeps int32 ids and float32 values. `fine` and `compact` keep ids as indices into the sorted list of the
sample's distinct ids, and log-probabilities on a grid of `STEP`, as differences along the row; the log-sum-exp and
the log of the kept mass stay float32, so the mass of the tail is exact: the decoder shifts each row until
its probabilities sum to the kept mass again.
"""

from __future__ import annotations

import numpy as np

from compodistill.errors import StoreError
from compodistill.store.payload import pack, typed, unpack
from compodistill.store.signals import Logits

STEP = {"compact": 1 / 64, "fine": 1 / 512}
ESCAPE = 255


def encode(logits: Logits, codec: str) -> bytes:
    """Payload of a sample's top-k; rows must be sorted by (log-probability descending, id ascending)."""
    if codec == "lossless":
        return pack([logits.ids.astype("<i4"), logits.logprobs.astype("<f4"), logits.lse.astype("<f4")])
    grid_AK = np.rint(logits.logprobs.astype(np.float64) * (-1 / STEP[codec])).astype(np.int64)
    grid_AK = np.maximum(grid_AK, 0)
    order = np.lexsort((logits.ids, grid_AK), axis=-1)  # the grid makes ties: ids ascend within them
    ids_AK = np.take_along_axis(logits.ids, order, -1)
    deltas_AK = np.diff(grid_AK, axis=1, prepend=0)
    escaped = deltas_AK >= ESCAPE
    distinct, indices = np.unique(ids_AK, return_inverse=True)
    indices = indices.reshape(ids_AK.shape)
    return pack(
        [
            logits.lse.astype("<f4"),
            kept_mass(logits.logprobs).astype("<f4"),
            np.diff(distinct, prepend=0).astype("<u4"),
            deltas_AK[escaped].astype("<u4"),
            np.minimum(deltas_AK, ESCAPE).astype("u1"),
            (indices & 255).astype("u1"),
            (indices >> 8 & 255).astype("u1"),
            (indices >> 16).astype("u1"),
        ]
    )


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
        logits = _decode_grid(payload, shape, STEP[codec])
    if logits.ids.min() < 0 or logits.ids.max() >= vocab_size:
        raise StoreError(f"the logits name ids beyond the vocabulary of {vocab_size}")
    if not (np.isfinite(logits.logprobs).all() and np.isfinite(logits.lse).all()):
        raise StoreError("the logits contain NaN or infinity")
    return logits


def _decode_grid(payload: bytes | np.ndarray, shape: tuple[int, int], step: float) -> Logits:
    n = shape[0]
    lse, mass, distinct, escapes, deltas, low, middle, high = unpack(payload, 8)
    deltas_AK = typed(deltas, "u1", shape, "deltas").astype(np.int64)
    escaped = deltas_AK == ESCAPE
    deltas_AK[escaped] = typed(escapes, "<u4", (int(escaped.sum()),), "escapes")
    logprobs_AK = (deltas_AK.cumsum(1) * -step).astype(np.float32)
    logprobs_AK += (typed(mass, "<f4", (n,), "mass") - kept_mass(logprobs_AK))[:, None]
    indices_AK = typed(low, "u1", shape, "ids").astype(np.int64)
    indices_AK += typed(middle, "u1", shape, "ids").astype(np.int64) << 8
    indices_AK += typed(high, "u1", shape, "ids").astype(np.int64) << 16
    ids = typed(distinct, "<u4", (len(distinct) // 4,), "distinct").cumsum(dtype=np.int64)
    if indices_AK.max() >= len(ids) or ids[-1] >= 2**31:
        raise StoreError("the logits name ids that are not in the sample's list")
    return Logits(ids[indices_AK].astype(np.int32), logprobs_AK, typed(lse, "<f4", (n,), "lse").astype(np.float32))


def kept_mass(logprobs_AK: np.ndarray) -> np.ndarray:
    """(A,) float32: log of the probability mass of the kept tokens, at most 0."""
    most_A1 = logprobs_AK.max(1, keepdims=True)
    mass_A = np.log(np.exp(logprobs_AK - most_A1, dtype=np.float64).sum(1)) + most_A1[:, 0]
    return np.asarray(mass_A, dtype=np.float32)
