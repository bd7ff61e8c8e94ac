"""Attention slices (G, Q, V) as small integers.

`lossless` keeps float32. `fine` and `compact` quantise each row with a step proportional to its L2 norm, which
bounds the loss of its cosine whatever its scale: code = floor(x / (step * norm) + 1 - .65), so everything under
.65 steps becomes zero (dead zone), and each code below `N_CENTROIDS` is given back as the mean of what it stands
for in this sample (centroid), larger ones as code + .15, the middle of their interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compodistill.errors import StoreError
from compodistill.store.payload import pack, typed, unpack

STEP = {"compact": 0.01, "fine": 0.005}
ROUNDING = 0.35
N_CENTROIDS = 16
MAX_CODE = 255


def encode(attention_GQV: np.ndarray, codec: str) -> bytes:
    """Payload of a sample's slices; see the module's description."""
    if codec == "lossless":
        return pack([attention_GQV.astype("<f4", copy=False)])
    norms_GQ = np.sqrt(np.einsum("gqv,gqv->gq", attention_GQV, attention_GQV)).astype("<f4")
    step = STEP[codec]
    inverse_GQ = np.divide(1.0, norms_GQ * np.float32(step), out=np.zeros_like(norms_GQ), where=norms_GQ > 0)
    codes = np.empty(attention_GQV.shape, np.uint8)
    sums = np.zeros(N_CENTROIDS)
    counts = np.zeros(N_CENTROIDS)
    for g, slice_QV in enumerate(attention_GQV):  # a group at a time stays in the cache
        scaled_QV = slice_QV * inverse_GQ[g, :, None]
        codes[g] = np.minimum(scaled_QV + ROUNDING, MAX_CODE)
        sums += np.bincount(codes[g].ravel(), scaled_QV.ravel(), 256)[:N_CENTROIDS]
        counts += np.bincount(codes[g].ravel(), minlength=256)[:N_CENTROIDS]
    centroids = np.arange(N_CENTROIDS, dtype=np.float32) + np.float32(0.5 - ROUNDING)
    np.divide(sums, counts, out=centroids, where=counts > 0, casting="unsafe")
    centroids[0] = 0  # zeros stay zeros: the causal half must not glow
    return pack([norms_GQ, centroids.astype("<f4"), codes])


def decode(payload: bytes | np.ndarray, shape: tuple[int, int, int], codec: str) -> np.ndarray:
    """(G, Q, V) float32 of a payload."""
    if codec == "lossless":
        return typed(unpack(payload, 1)[0], "<f4", shape, "values").astype(np.float32)
    norms_GQ, centroids, codes_GQV = sections(payload, shape)
    return _lookup(centroids)[codes_GQV] * (norms_GQ * np.float32(STEP[codec]))[:, :, None]


def decode_torch(payload: bytes | np.ndarray, shape: tuple[int, int, int], codec: str, device: Any) -> Any:
    """(G, Q, V) float32 tensor of a payload; what crosses to the device are the codes."""
    import torch

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)  # a copy: torch wants memory it may write to

    if codec == "lossless":
        return to_device(typed(unpack(payload, 1)[0], "<f4", shape, "values"))
    norms_GQ, centroids, codes_GQV = sections(payload, shape)
    table = to_device(_lookup(centroids))
    values = torch.index_select(table, 0, to_device(codes_GQV).flatten().int()).view(shape)
    return values.mul_(to_device(norms_GQ).mul_(STEP[codec])[:, :, None])


def sections(payload: bytes | np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """norms (G, Q) float32, centroids (N_CENTROIDS,) float32, codes (G, Q, V) uint8 of a lossy payload."""
    norms, centroids, codes = unpack(payload, 3)
    norms_GQ = typed(norms, "<f4", shape[:2], "norms")
    table = typed(centroids, "<f4", (N_CENTROIDS,), "centroids")
    if not (np.isfinite(norms_GQ).all() and np.isfinite(table).all()):
        raise StoreError("the attention payload contains NaN or infinity")
    return norms_GQ, table, typed(codes, "u1", shape, "codes")


def _lookup(centroids: np.ndarray) -> np.ndarray:
    table = np.arange(256, dtype=np.float32) + np.float32(0.5 - ROUNDING)
    table[:N_CENTROIDS] = centroids
    return table
