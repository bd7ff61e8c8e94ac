"""Visual-attention slices, taken inside the attention function of the decoder.

One function, registered with transformers under the name "cdist", runs SDPA as always; while a tap is open it
also computes, for the tapped layers, the head-averaged attention of chosen queries (rows) to the visual
keys (columns). No attention matrix of the whole sequence is ever formed, and `output_attentions` is not used.

With gradients each chunk of queries is recomputed in the backward pass, so a slice costs its own size and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "cdist"
QUERY_CHUNK = 128  # rows whose scores are held at once

# One for the process, not a ContextVar: activation checkpointing runs the layers again in autograd's own threads.
_open_tap: Tap | None = None


class Tap:
    """Collects slices while a model runs.

    Attributes:
        slices: layer index -> one (Q, V) float32 tensor a sample of the batch. Rows of queries that see no
            visual key are zero. Each row sums to at most 1: the mass on other keys is what is missing.
    """

    def __init__(
        self,
        modules: dict[torch.nn.Module, int],
        rows: Sequence[torch.Tensor],
        columns: Sequence[torch.Tensor],
    ) -> None:
        self._modules, self._rows, self._columns = modules, rows, columns
        self.slices: dict[int, list[torch.Tensor]] = {}

    def take(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        causal: bool,
    ) -> None:
        layer = self._modules.get(module)
        if layer is None:
            return
        self.slices[layer] = [
            visual_slice(query[b], key[b], _mask_of(mask, b), rows, columns, scale, causal)
            for b, (rows, columns) in enumerate(zip(self._rows, self._columns, strict=True))
        ]


@contextmanager
def tap_attention(
    model: PreTrainedModel,
    layers: Iterable[int],
    rows: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
) -> Iterator[Tap]:
    """Collect the slices of `layers` (decoder layer indices) from every forward pass inside the context.

    Args:
        model: a model prepared by `use_tappable_attention`.
        rows: for each sample of the batch the kept query positions, (Q,) int64.
        columns: for each sample the visual positions, (V,) int64.
    """
    decoder = model.get_decoder().layers
    tap = Tap({decoder[i].self_attn: i for i in layers}, rows, columns)
    global _open_tap
    outer, _open_tap = _open_tap, tap
    try:
        yield tap
    finally:
        _open_tap = outer


def use_tappable_attention(model: PreTrainedModel) -> None:
    """Let the decoder of `model` run through the registered attention function; the vision tower is left alone."""
    model.set_attn_implementation({"text_config": IMPLEMENTATION})


def visual_slice(
    query_HTE: torch.Tensor,
    key_HTE: torch.Tensor,
    mask_TT: torch.Tensor | None,
    rows_Q: torch.Tensor,
    columns_V: torch.Tensor,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Head-averaged attention of some queries to the visual keys: softmax(q k^T * scale)[rows, columns].

    Args:
        query_HTE, key_HTE: of one sample, after position embedding; E the head width. Keys may have fewer heads
            (grouped-query attention).
        mask_TT: additive or boolean (True = may attend), or None.
        causal: with no mask, whether queries see only keys up to themselves.

    Returns:
        (Q, V) float32.
    """
    rows_Q, columns_V = rows_Q.to(query_HTE.device), columns_V.to(query_HTE.device)
    chunks = []
    for rows in rows_Q.split(QUERY_CHUNK):
        args = (query_HTE, key_HTE, mask_TT, rows, columns_V, scale, causal)
        if torch.is_grad_enabled() and (query_HTE.requires_grad or key_HTE.requires_grad):
            chunks.append(checkpoint(_slice_of_rows, *args, use_reentrant=False))
        else:
            chunks.append(_slice_of_rows(*args))
    if not chunks:
        return query_HTE.new_zeros((0, len(columns_V)), dtype=torch.float32)
    return torch.cat(chunks)


def _slice_of_rows(
    query_HTE: torch.Tensor,
    key_HTE: torch.Tensor,
    mask_TT: torch.Tensor | None,
    rows_Q: torch.Tensor,
    columns_V: torch.Tensor,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    n_heads, n_key_heads = query_HTE.shape[0], key_HTE.shape[0]
    query = query_HTE[:, rows_Q].float().unflatten(0, (n_key_heads, n_heads // n_key_heads))
    scores = torch.einsum("hrqe,hte->hrqt", query, key_HTE.float()) * scale
    if mask_TT is not None:
        mask = mask_TT[rows_Q]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    elif causal:
        positions = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(positions > rows_Q[:, None], -torch.inf)
    return scores.softmax(-1)[..., columns_V].mean((0, 1))


def _mask_of(mask: torch.Tensor | None, b: int) -> torch.Tensor | None:
    return None if mask is None else mask[b if mask.shape[0] > 1 else 0, 0]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: SDPA, and the open tap's slices."""
    tap = _open_tap
    if tap is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        tap.take(module, query, key, attention_mask, scale, causal)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # without it transformers passes no mask at all
