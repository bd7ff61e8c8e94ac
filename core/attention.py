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

    def wants(self, module: torch.nn.Module) -> bool:
        """Whether this attention module is one of the tapped layers."""
        return module in self._modules

    def take(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        causal: bool,
        lse_BHT: torch.Tensor | None = None,
    ) -> None:
        """Compute the slices of one layer; with the kernel's log-sum-exp no second softmax is needed."""
        slices = []
        for b, (rows, columns) in enumerate(zip(self._rows, self._columns, strict=True)):
            args = (query[b], key[b], _mask_of(mask, b), rows, columns, scale, causal)
            slices.append(visual_slice(*args) if lse_BHT is None else slice_from_lse(*args, lse_BHT[b]))
        self.slices[self._modules[module]] = slices


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


def slice_from_lse(
    query_HTE: torch.Tensor,
    key_HTE: torch.Tensor,
    mask_TT: torch.Tensor | None,
    rows_Q: torch.Tensor,
    columns_V: torch.Tensor,
    scale: float,
    causal: bool,
    lse_HT: torch.Tensor,
) -> torch.Tensor:
    """As `visual_slice`, without gradients, from the log-sum-exp over all keys: exp(q k^T * scale - lse)."""
    n_heads, per_key_head = query_HTE.shape[0], query_HTE.shape[0] // key_HTE.shape[0]
    keys_HVE = key_HTE[:, columns_V].float()
    out_QV = torch.zeros(len(rows_Q), len(columns_V))
    for start in range(0, len(rows_Q), QUERY_CHUNK):
        rows = rows_Q[start : start + QUERY_CHUNK]
        total = out_QV[start : start + QUERY_CHUNK]
        query = query_HTE[:, rows].float()
        bias_QV = None
        if mask_TT is not None and mask_TT.dtype != torch.bool:
            bias_QV = mask_TT[rows][:, columns_V].float()
        for h in range(n_heads):
            scores = torch.addmm(
                lse_HT[h, rows, None].float(), query[h], keys_HVE[h // per_key_head].T, beta=-1, alpha=scale
            )
            total += (scores if bias_QV is None else scores.add_(bias_QV)).exp_()
        total /= n_heads
        if mask_TT is not None and mask_TT.dtype == torch.bool:
            total.masked_fill_(~mask_TT[rows][:, columns_V], 0)
        elif mask_TT is None and causal:
            total.masked_fill_(columns_V > rows[:, None], 0)
    return out_QV


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
    if tap is None or not tap.wants(module):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if _has_log_sum_exp(query, key, value, attention_mask, kwargs):
        mask = attention_mask
        if mask is not None and mask.dtype == torch.bool:  # the kernel takes additive masks of the query's dtype only
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None and causal, attn_mask=mask, scale=scale
        )
        tap.take(module, query, key, attention_mask, scale, causal, lse)
        return output.transpose(1, 2).contiguous(), None
    tap.take(module, query, key, attention_mask, scale, causal)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _has_log_sum_exp(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether the fused CPU kernel, which returns the log-sum-exp of each row, computes what SDPA would."""
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    plain = not kwargs.get("dropout") and kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    return (
        plain
        and not needs_grad
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == value.shape[-1]
        and (mask is None or mask.dim() == 4)
    )


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # without it transformers passes no mask at all
