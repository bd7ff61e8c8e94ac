"""Visual-attention slices, taken inside the attention function of the decoder.

One function, registered with transformers under the name "cdist", runs SDPA as always; while a tap is open it
also computes, for the tapped layers, the head-averaged attention of chosen queries (rows) to the visual
keys (columns). No attention matrix of the whole sequence is ever formed, and `output_attentions` is not used.

The log-sum-exp of each row comes from the fused kernel where it returns one, so no second softmax is needed. With
gradients the scores are computed again in the backward pass: a slice costs its own size and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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
        lse: torch.Tensor | None,
    ) -> None:
        """Compute the slices of one layer from its queries and keys (B, H, T, E) and its (B, H, T) log-sum-exp."""
        slices = []
        for b, (rows, columns) in enumerate(zip(self._rows, self._columns, strict=True)):
            m = None if mask is None else mask[b if mask.shape[0] > 1 else 0, 0]
            row_lse = log_sum_exp(query[b], key[b], m, scale, causal) if lse is None else lse[b]
            rows, columns = rows.to(query.device), columns.to(query.device)
            slices.append(VisualSlice.apply(query[b], key[b], row_lse, m, rows, columns, scale, causal))
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


class VisualSlice(torch.autograd.Function):
    """Head-averaged attention of some queries to the visual keys: exp(q k^T * scale - lse)[rows, columns].

    Neither pass keeps more than a chunk of queries' scores: the backward pass computes them again. For the gradient g
    of the slice and p the attention of one head over all keys, the scores' gradient is

        ds = p / H * (g on visual keys - sum over visual keys of g p),

    whose second term reaches every key of the row, since all of them share the row's sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_HTE: torch.Tensor,
        key_HTE: torch.Tensor,
        lse_HT: torch.Tensor,
        mask_TT: torch.Tensor | None,
        rows_Q: torch.Tensor,
        columns_V: torch.Tensor,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """The slice of one sample.

        Args:
            query_HTE, key_HTE: after position embedding; E the head width. Keys may have fewer heads (grouped queries).
            lse_HT: float32, log-sum-exp of each row's scores over all keys it sees.
            mask_TT: boolean (True = may attend) or additive, or None.
            causal: with no mask, whether queries see only keys up to themselves.

        Returns:
            (Q, V) float32.
        """
        ctx.save_for_backward(query_HTE, key_HTE, lse_HT, mask_TT, rows_Q, columns_V)
        ctx.scale, ctx.causal = scale, causal
        n_heads, per_key_head = query_HTE.shape[0], query_HTE.shape[0] // key_HTE.shape[0]
        keys_HVE = key_HTE[:, columns_V].float()
        out_QV = query_HTE.new_zeros((len(rows_Q), len(columns_V)), dtype=torch.float32)
        for start in range(0, len(rows_Q), QUERY_CHUNK):
            rows = rows_Q[start : start + QUERY_CHUNK]
            total = out_QV[start : start + QUERY_CHUNK]
            bias, hidden = _visibility(mask_TT, rows, columns_V, causal)
            query, lse = query_HTE[:, rows].float(), lse_HT[:, rows, None]
            for h in range(n_heads):
                total += _probabilities(query[h], keys_HVE[h // per_key_head], lse[h], scale, bias)
            total /= n_heads
            if hidden is not None:
                total.masked_fill_(hidden, 0)
        return out_QV

    @staticmethod
    def backward(ctx: Any, grad_QV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_HTE, key_HTE, lse_HT, mask_TT, rows_Q, columns_V = ctx.saved_tensors
        n_heads, per_key_head = query_HTE.shape[0], query_HTE.shape[0] // key_HTE.shape[0]
        d_query = torch.zeros_like(query_HTE, dtype=torch.float32)
        d_key = torch.zeros_like(key_HTE, dtype=torch.float32)
        keys_HTE = key_HTE.float()
        for start in range(0, len(rows_Q), QUERY_CHUNK):
            rows = rows_Q[start : start + QUERY_CHUNK]
            grad = grad_QV[start : start + QUERY_CHUNK] / n_heads
            end = int(rows[-1]) + 1 if mask_TT is None and ctx.causal else key_HTE.shape[1]
            bias, hidden = _visibility(mask_TT, rows, torch.arange(end, device=rows.device), ctx.causal)
            columns = columns_V[columns_V < end]
            query, lse = query_HTE[:, rows].float(), lse_HT[:, rows, None]
            for h in range(n_heads):
                keys = keys_HTE[h // per_key_head, :end]
                p = _probabilities(query[h], keys, lse[h], ctx.scale, bias)
                if hidden is not None:
                    p.masked_fill_(hidden, 0)
                visual = p[:, columns] * grad[:, : len(columns)]
                p *= -visual.sum(-1, keepdim=True)
                p[:, columns] += visual
                d_query[h].index_add_(0, rows, p @ keys, alpha=ctx.scale)
                d_key[h // per_key_head, :end].addmm_(p.T, query[h], alpha=ctx.scale)
        return d_query.to(query_HTE.dtype), d_key.to(key_HTE.dtype), None, None, None, None, None, None


def _visibility(
    mask_TT: torch.Tensor | None, rows: torch.Tensor, columns: torch.Tensor, causal: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the mask does to these rows and columns: a bias on the scores, or the entries that are hidden."""
    if mask_TT is None:
        return None, (columns > rows[:, None]) if causal else None
    mask = mask_TT[rows][:, columns]
    return (None, ~mask) if mask.dtype == torch.bool else (mask.float(), None)


def _probabilities(
    query: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    scores = torch.addmm(lse, query, keys.T, beta=-1, alpha=scale)
    return (scores if bias is None else scores.add_(bias)).exp_()


@torch.no_grad()
def log_sum_exp(
    query_HTE: torch.Tensor, key_HTE: torch.Tensor, mask_TT: torch.Tensor | None, scale: float, causal: bool
) -> torch.Tensor:
    """(H, T) float32 log-sum-exp of each row's scores, for attention kernels that do not return it."""
    per_key_head = query_HTE.shape[0] // key_HTE.shape[0]
    length = query_HTE.shape[1]
    columns = torch.arange(key_HTE.shape[1], device=query_HTE.device)
    out = query_HTE.new_empty(query_HTE.shape[:2], dtype=torch.float32)
    for rows in torch.arange(length, device=query_HTE.device).split(QUERY_CHUNK):
        bias, hidden = _visibility(mask_TT, rows, columns, causal)
        for h in range(query_HTE.shape[0]):
            scores = query_HTE[h, rows].float() @ key_HTE[h // per_key_head].float().T * scale
            if bias is not None:
                scores += bias
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            out[h, rows] = scores.logsumexp(-1)
    return out


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
    output, lse = None, None
    if _is_plain(query, key, value, kwargs) and query.device.type == "cpu":
        mask = attention_mask
        if mask is not None and mask.dtype == torch.bool:  # the kernel takes additive masks of the query's dtype only
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None and causal, attn_mask=mask, scale=scale
        )
        output = output.transpose(1, 2).contiguous()
    tap.take(module, query, key, attention_mask, scale, causal, lse)
    if output is not None:
        return output, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _is_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a bare attention kernel computes what transformers' function would: no dropout, bias or cache."""
    return (
        not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == value.shape[-1]
    )


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # without it transformers passes no mask at all
