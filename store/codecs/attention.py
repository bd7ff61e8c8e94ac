"""Attention slices (G, Q, V) as small integers.

`lossless` keeps float32. `fine` and `compact` quantise each row with a step of its own: proportional to its L2 norm,
which bounds the loss of its cosine whatever its scale, and finer for diffuse rows, where many small errors add up.
code = floor(x / step + ROUNDING): what lies under 1 - ROUNDING steps becomes zero (dead zone). Each code below
N_CENTROIDS is given back as the mean of what it stands for in this sample, larger ones as the middle of their interval.

Most codes are zero and most others one, and a visual column changes slowly over the queries. So codes are kept column
by column as bits, eight queries a byte: whether a code is above 0; of those, whether it is above 1; of those, above 2;
then the rest as bytes. zstd codes a byte of such bits like one symbol of eight codes, and comes near the entropy that
knows each code's neighbours. Sections, in order:

    scales     (2, G, Q) uint8   low bytes, high bytes of ~row step: step = 2 ** (-scale / 256), 65535: the row is zero
    centroids  (16,) float32
    counts     (3,) uint32       codes above 0, 1, 2
    above_0    (G, V, ceil(Q / 8)) uint8   bits, first query in the highest bit
    above_1    bits of the codes above 0, in the order (group, column, query)
    above_2    bits of the codes above 1
    rest       uint8             code - 3 of the codes above 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from compodistill.errors import StoreError
from compodistill.store.payload import pack, typed, unpack

STEP = {"compact": 0.0105, "fine": 0.005}
DIFFUSE = 10  # the L1 over the L2 norm from which on rows get finer steps
ROUNDING = 0.45
N_CENTROIDS = 16
OCTAVE = 256  # steps lie on a grid of 2 ** (1 / OCTAVE)
ZERO_ROW = 65_535
STRIP = 128
SEEN = 16  # every 16th row of a strip counts for the centroids
NAMES = ("scales", "centroids", "counts", "above_0", "above_1", "above_2", "rest")


def encode(attention_GQV: np.ndarray, codec: str) -> bytes:
    """Payload of a sample's slices; see the module's description."""
    if codec == "lossless":
        return pack([attention_GQV.astype("<f4", copy=False)])
    n_groups, n_queries, n_visual = attention_GQV.shape
    scales_GQ = np.empty((n_groups, n_queries), np.uint16)
    above_0, positive = [], []
    sums, counts = np.zeros(N_CENTROIDS), np.zeros(N_CENTROIDS)
    scaled_QV = np.empty((STRIP, n_visual), np.float32)
    codes_QV, codes_VQ = np.empty(scaled_QV.shape, np.uint8), np.empty((n_visual, n_queries), np.uint8)
    for g, slice_QV in enumerate(attention_GQV):
        for first in range(0, n_queries, STRIP):  # rows that stay in the cache through all passes
            rows_QV = slice_QV[first : first + STRIP]
            scales_Q = scales_GQ[g, first : first + STRIP] = row_scales(rows_QV, codec)
            scaled, codes = scaled_QV[: len(rows_QV)], codes_QV[: len(rows_QV)]
            np.multiply(rows_QV, 1 / row_steps(scales_Q)[:, None], out=scaled)
            scaled += np.float32(ROUNDING)
            np.copyto(codes, scaled, casting="unsafe")  # at most 255: a row's largest entry is its norm at most
            codes_VQ[:, first : first + STRIP] = codes.T
            seen, exact = (x[::SEEN].ravel() for x in (codes, scaled))
            small = (seen > 0) & (seen < N_CENTROIDS)
            sums += np.bincount(seen[small], exact[small], N_CENTROIDS)
            counts += np.bincount(seen[small], minlength=N_CENTROIDS)
        above_0.append(np.packbits(codes_VQ, axis=-1))
        # translate drops bytes several times as fast as indexing with a mask picks them
        positive.append(codes_VQ.tobytes().translate(None, b"\0"))
    centroids = _middles()[:N_CENTROIDS]
    np.divide(sums - counts * ROUNDING, counts, out=centroids, where=counts >= 16, casting="unsafe")
    joined = b"".join(positive)
    more = joined.translate(None, b"\1")
    rest = more.translate(bytes((i - 3) % 256 for i in range(256)), b"\2")
    lengths = np.array([len(joined), len(more), len(rest)], "<u4")
    scales = np.stack([scales_GQ & 255, scales_GQ >> 8]).astype(np.uint8)
    above_1, above_2 = (np.packbits(np.frombuffer(x, np.uint8) > i) for i, x in ((1, joined), (2, more)))
    return pack(
        [scales, centroids.astype("<f4"), lengths, np.stack(above_0), above_1, above_2, np.frombuffer(rest, np.uint8)]
    )


def row_scales(slice_QV: np.ndarray, codec: str) -> np.ndarray:
    """(Q,) uint16 scales of the rows of a group, see the module's description."""
    norms_Q = np.sqrt(np.vecdot(slice_QV, slice_QV))
    spread_Q = slice_QV.sum(-1) / np.maximum(norms_Q, np.float32(1e-30))
    steps_Q = norms_Q * (STEP[codec] * np.minimum(1, DIFFUSE / np.maximum(spread_Q, 1)))
    # no code above 254: rows with one large entry among very many small ones would reach it
    steps_Q = np.maximum(steps_Q, slice_QV.max(-1, initial=0) / np.float32(254))
    # rounded up to the grid, so that codes stay in a byte whatever the rounding
    scales_Q = np.floor(-OCTAVE * np.log2(np.maximum(steps_Q, 1e-38), dtype=np.float32))
    return np.where(norms_Q > 1e-30, np.clip(scales_Q, 0, ZERO_ROW - 1), ZERO_ROW).astype(np.uint16)


def row_steps(scales: np.ndarray) -> np.ndarray:
    """float32 step of each scale; a row of zeros has an infinite one, which makes every code 0."""
    steps = np.exp2(scales.astype(np.float64) / -OCTAVE).astype(np.float32)
    return np.where(scales == ZERO_ROW, np.float32(np.inf), steps)


def decode(payload: bytes | np.ndarray, shape: tuple[int, int, int], codec: str) -> np.ndarray:
    """(G, Q, V) float32 of a payload."""
    if codec == "lossless":
        return _exact(payload, shape).astype(np.float32)
    parts = sections(payload, shape)
    n_0, n_1, _ = parts.lengths
    codes = np.unpackbits(parts.above_1, count=n_0)
    more = np.unpackbits(parts.above_2, count=n_1)
    more[more > 0] += parts.rest
    codes[codes > 0] += more
    values_GVQ = np.zeros((shape[0], shape[2], shape[1]), np.float32)
    values_GVQ[np.unpackbits(parts.above_0, axis=-1, count=shape[1]).view(bool)] = parts.table[1:][codes]
    return np.ascontiguousarray((values_GVQ * parts.steps_GQ[:, None, :]).transpose(0, 2, 1))


def decode_torch(payload: bytes | np.ndarray, shape: tuple[int, int, int], codec: str, device: Any) -> Any:
    """(G, Q, V) float32 tensor of a payload; what crosses to the device are the codes."""
    import torch

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)  # a copy: torch wants memory it may write to

    def bits(packed: np.ndarray, count: int) -> torch.Tensor:
        return torch.index_select(bits_of_byte, 0, to_device(packed).flatten().int()).view(-1)[:count]

    if codec == "lossless":
        return to_device(_exact(payload, shape))
    parts = sections(payload, shape)
    n_groups, n_queries, n_visual = shape
    bits_of_byte = to_device(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)).bool()
    n_0, n_1, _ = parts.lengths
    more = torch.zeros(n_1, dtype=torch.uint8, device=device)
    more.masked_scatter_(bits(parts.above_2, n_1), to_device(parts.rest).add_(1))
    codes = torch.zeros(n_0, dtype=torch.uint8, device=device)
    codes.masked_scatter_(bits(parts.above_1, n_0), more.add_(1))
    positive = torch.index_select(to_device(parts.table[1:]), 0, codes.int())
    mask_GVQ = bits(parts.above_0, parts.above_0.size * 8).view(n_groups, n_visual, -1)[..., :n_queries]
    values_GVQ = torch.zeros(mask_GVQ.shape, device=device)
    values_GVQ.masked_scatter_(mask_GVQ, positive).mul_(to_device(parts.steps_GQ)[:, None, :])
    return values_GVQ.transpose(1, 2).contiguous()


@dataclass
class Sections:
    """A lossy payload's sections, checked against one another.

    Attributes:
        table: (256,) float32, what a code stands for, in steps.
        steps_GQ: (G, Q) float32, 0 for rows of zeros.
        lengths: how many codes are above 0, 1, 2.
        above_0, above_1, above_2, rest: uint8, see the module's description.
    """

    table: np.ndarray
    steps_GQ: np.ndarray
    lengths: tuple[int, int, int]
    above_0: np.ndarray
    above_1: np.ndarray
    above_2: np.ndarray
    rest: np.ndarray


def sections(payload: bytes | np.ndarray, shape: tuple[int, int, int]) -> Sections:
    """Parse a lossy payload.

    Raises:
        StoreError: it contradicts itself or the shape.
    """
    found = dict(zip(NAMES, unpack(payload, len(NAMES)), strict=True))
    g, q, v = shape
    low, high = typed(found["scales"], "u1", (2, g, q), "scales").astype(np.uint16)
    steps_GQ = row_steps(low | high << 8)
    steps_GQ[~np.isfinite(steps_GQ)] = 0
    table = _middles()
    table[:N_CENTROIDS] = typed(found["centroids"], "<f4", (N_CENTROIDS,), "centroids")
    if not np.isfinite(table).all():
        raise StoreError("the attention payload contains NaN or infinity")
    lengths = n_0, n_1, n_2 = typed(found["counts"], "<u4", (3,), "counts").tolist()
    above_0 = typed(found["above_0"], "u1", (g, v, -(-q // 8)), "above_0")
    above_1 = typed(found["above_1"], "u1", (-(-n_0 // 8),), "above_1")
    above_2 = typed(found["above_2"], "u1", (-(-n_1 // 8),), "above_2")
    rest = typed(found["rest"], "u1", (n_2,), "rest")
    if [_ones(x, n) for x, n in ((above_0, q), (above_1, n_0), (above_2, n_1))] != [n_0, n_1, n_2]:
        raise StoreError("the attention payload's bits do not add up to its counts")
    if n_2 and rest.max() > 252:
        raise StoreError("the attention payload has a code that is too large")
    return Sections(table, steps_GQ, lengths, above_0, above_1, above_2, rest)


def _exact(payload: bytes | np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    values = typed(unpack(payload, 1)[0], "<f4", shape, "values")
    if not np.isfinite(values).all():
        raise StoreError("the attention payload contains NaN or infinity")
    return values


def _ones(packed: np.ndarray, n_bits: int) -> int:
    """Number of bits set in rows of n_bits; -1 if one of those that fill up the last byte is."""
    if n_bits % 8 and packed.size and (packed[..., -1] & (255 >> n_bits % 8)).any():
        return -1
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def _middles() -> np.ndarray:
    """(256,) float32: the middle of each code's interval, in steps."""
    middles = np.arange(256, dtype=np.float32) + np.float32(0.5 - ROUNDING)
    middles[0] = 0  # zeros stay zeros: the causal half must not glow
    return middles
