"""The arithmetic of visual-attention slices: head-averaged attention of some queries to the visual keys.

Everything works on one sample and in chunks of queries, so no matrix of the whole sequence is ever formed. `softcap`,
where given, bounds the scores as Gemma 2 does: softcap * tanh(scores / softcap).
"""

from __future__ import annotations

from typing import Any

import torch

QUERY_CHUNK = 128  # rows whose scores are held at once


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
        softcap: float | None,
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
        ctx.scale, ctx.causal, ctx.softcap = scale, causal, softcap
        n_heads, per_key_head = query_HTE.shape[0], query_HTE.shape[0] // key_HTE.shape[0]
        keys_HVE = key_HTE[:, columns_V].float()
        out_QV = query_HTE.new_zeros((len(rows_Q), len(columns_V)), dtype=torch.float32)
        for start in range(0, len(rows_Q), QUERY_CHUNK):
            rows = rows_Q[start : start + QUERY_CHUNK]
            total = out_QV[start : start + QUERY_CHUNK]
            bias, hidden = _visibility(mask_TT, rows, columns_V, causal)
            query, lse = query_HTE[:, rows].float(), lse_HT[:, rows, None]
            for h in range(n_heads):
                total += _probabilities(query[h], keys_HVE[h // per_key_head], lse[h], scale, bias, softcap)
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
                p = _probabilities(query[h], keys, lse[h], ctx.scale, bias, ctx.softcap)
                if hidden is not None:
                    p.masked_fill_(hidden, 0)
                visual = p[:, columns] * grad[:, : len(columns)]
                p *= -visual.sum(-1, keepdim=True)
                p[:, columns] += visual
                if ctx.softcap is not None:
                    p *= 1 - (query[h] @ keys.T).mul_(ctx.scale / ctx.softcap).tanh_().square_()
                d_query[h].index_add_(0, rows, p @ keys, alpha=ctx.scale)
                d_key[h // per_key_head, :end].addmm_(p.T, query[h], alpha=ctx.scale)
        return d_query.to(query_HTE.dtype), d_key.to(key_HTE.dtype), None, None, None, None, None, None, None


def _visibility(
    mask_TT: torch.Tensor | None, rows: torch.Tensor, columns: torch.Tensor, causal: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the mask does to these rows and columns: a bias on the scores, or the entries that are hidden."""
    if mask_TT is None:
        return None, (columns > rows[:, None]) if causal else None
    mask = mask_TT[rows][:, columns]
    return (None, ~mask) if mask.dtype == torch.bool else (mask.float(), None)


def _scores(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    scores = (query @ keys.T).mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _probabilities(
    query: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """exp(scores - lse) of one head; entries the mask hides are still to be set to zero."""
    if softcap is None:
        scores = torch.addmm(lse, query, keys.T, beta=-1, alpha=scale)
    else:
        scores = _scores(query, keys, scale, softcap).sub_(lse)
    return (scores if bias is None else scores.add_(bias)).exp_()


@torch.no_grad()
def log_sum_exp(
    query_HTE: torch.Tensor,
    key_HTE: torch.Tensor,
    mask_TT: torch.Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> torch.Tensor:
    """(H, T) float32 log-sum-exp of each row's scores, for attention kernels that do not return it."""
    per_key_head = query_HTE.shape[0] // key_HTE.shape[0]
    columns = torch.arange(key_HTE.shape[1], device=query_HTE.device)
    out = query_HTE.new_empty(query_HTE.shape[:2], dtype=torch.float32)
    for rows in torch.arange(query_HTE.shape[1], device=query_HTE.device).split(QUERY_CHUNK):
        bias, hidden = _visibility(mask_TT, rows, columns, causal)
        for h in range(query_HTE.shape[0]):
            scores = _scores(query_HTE[h, rows].float(), key_HTE[h // per_key_head].float(), scale, softcap)
            if bias is not None:
                scores += bias
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            out[h, rows] = scores.logsumexp(-1)
    return out


def softcapped_attention(
    query_BHTE: torch.Tensor,
    key_BHTE: torch.Tensor,
    value_BHTE: torch.Tensor,
    mask_BHTT: torch.Tensor | None,
    scale: float,
    causal: bool,
    softcap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores, which SDPA refuses: (B, T, H, E), a chunk of queries at a time."""
    groups = query_BHTE.shape[1] // key_BHTE.shape[1]
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (key_BHTE, value_BHTE))
    columns = torch.arange(key_BHTE.shape[2], device=query_BHTE.device)
    chunks = []
    for rows in torch.arange(query_BHTE.shape[2], device=query_BHTE.device).split(QUERY_CHUNK):
        scores = (query_BHTE[:, :, rows] @ keys.transpose(2, 3)) * scale
        scores = softcap * torch.tanh(scores / softcap)
        if mask_BHTT is None and causal:
            scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
        elif mask_BHTT is not None and mask_BHTT.dtype == torch.bool:
            # a finite floor: the rows of padding see nothing at all, and must not become NaN
            scores = scores.masked_fill(~mask_BHTT[:, :, rows], torch.finfo(scores.dtype).min)
        elif mask_BHTT is not None:
            scores = scores + mask_BHTT[:, :, rows]
        chunks.append(scores.float().softmax(-1).to(values.dtype) @ values)
    return torch.cat(chunks, dim=2).transpose(1, 2)
