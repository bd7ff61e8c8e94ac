"""From stored payloads to arrays, in numpy or on the device. Torch is imported only where a tensor is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compodistill.errors import StoreError
from compodistill.store.codecs import attention, logits, sampled
from compodistill.store.signals import Logits, SampledLogits, SampleSignals
from compodistill.store.spec import StoreSpec

if TYPE_CHECKING:
    import torch


@dataclass
class EncodedSample:
    """One sample as it is stored: plain numpy arrays, to be sent between processes.

    Attributes:
        where: names the sample in error messages.
        logits_payload, attention_payload: uint8, see docs/format.md; the latter is empty if G * Q * V = 0.
        Others: as in `SampleSignals` and `StoreSpec`.
    """

    key: str
    where: str
    digest: dict[str, str | int]
    supervised_positions: np.ndarray
    query_positions: np.ndarray
    visual_positions: np.ndarray
    codec: str
    n_groups: int
    top_k: int
    draws: int
    vocab_size: int
    logits_payload: np.ndarray
    attention_payload: np.ndarray

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """(G, Q, V)."""
        return self.n_groups, len(self.query_positions), len(self.visual_positions)


def decode_logits(encoded: EncodedSample) -> Logits | SampledLogits:
    """The logits of a sample: `SampledLogits` in a store of draws."""
    shape = len(encoded.supervised_positions), encoded.top_k
    try:
        if encoded.draws:
            return sampled.decode(encoded.logits_payload, shape[0], encoded.draws, encoded.vocab_size)
        return logits.decode(encoded.logits_payload, shape, encoded.codec, encoded.vocab_size)
    except StoreError as e:
        raise StoreError(e.what, where=encoded.where) from e


def decode_attention(encoded: EncodedSample, device: torch.device | str = "cpu") -> torch.Tensor:
    """(G, Q, V) float32 attention slices of a sample on a device; only the codes travel there."""
    import torch

    if len(encoded.attention_payload) == 0:
        return torch.zeros(_empty_shape(encoded), device=device)
    try:
        return attention.decode_torch(
            encoded.attention_payload, encoded.attention_shape, encoded.codec, torch.device(device)
        )
    except StoreError as e:
        raise StoreError(e.what, where=encoded.where) from e


def decode_sample(encoded: EncodedSample, spec: StoreSpec) -> SampleSignals:
    """All signals of a sample in numpy."""
    if len(encoded.attention_payload) == 0:
        attention_GQV: Any = np.zeros(_empty_shape(encoded), np.float32)
    else:
        try:
            attention_GQV = attention.decode(encoded.attention_payload, encoded.attention_shape, encoded.codec)
        except StoreError as e:
            raise StoreError(e.what, where=encoded.where) from e
    return SampleSignals(
        encoded.key,
        encoded.digest,
        encoded.supervised_positions,
        encoded.query_positions,
        encoded.visual_positions,
        decode_logits(encoded),
        attention_GQV,
        list(spec.groups),
    )


def _empty_shape(encoded: EncodedSample) -> tuple[int, int, int]:
    shape = encoded.attention_shape
    if np.prod(shape):
        raise StoreError("the sample's attention is missing", where=encoded.where)
    return shape
