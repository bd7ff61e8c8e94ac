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

from compodistill.errors import UsageError
from compodistill.slices import VisualSlice, log_sum_exp, softcapped_attention

IMPLEMENTATION = "cdist"

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
        softcap: float | None,
    ) -> None:
        """Compute the slices of one layer from its queries and keys (B, H, T, E) and its (B, H, T) log-sum-exp."""
        slices = []
        for b, (rows, columns) in enumerate(zip(self._rows, self._columns, strict=True)):
            m = None if mask is None else mask[b if mask.shape[0] > 1 else 0, 0]
            row_lse = log_sum_exp(query[b], key[b], m, scale, causal, softcap) if lse is None else lse[b]
            rows, columns = rows.to(query.device), columns.to(query.device)
            slices.append(VisualSlice.apply(query[b], key[b], row_lse, m, rows, columns, scale, causal, softcap))
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
    softcap = kwargs.get("softcap")
    tap = _open_tap if _open_tap is not None and _open_tap.wants(module) else None
    if tap is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if torch.is_autocast_enabled(query.device.type):  # SDPA casts its inputs under autocast; a bare kernel does not
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    output, lse = None, None
    if softcap is not None:
        if kwargs.get("dropout"):
            raise UsageError("soft-capped attention is computed without dropout", remedy="set attention_dropout to 0")
        output = softcapped_attention(query, key, value, attention_mask, scale, causal, softcap)
    elif _is_plain(query, key, value, kwargs) and query.device.type == "cpu":
        mask = attention_mask
        if mask is not None and mask.dtype == torch.bool:  # the kernel takes additive masks of the query's dtype only
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None and causal, attn_mask=mask, scale=scale
        )
        output = output.transpose(1, 2).contiguous()
    else:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if tap is not None:
        tap.take(module, query, key, attention_mask, scale, causal, lse, softcap)
    return output, None


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
