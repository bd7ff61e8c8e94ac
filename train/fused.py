"""Losses on logits without the logits: LM head and losses in chunks, gradient formed on the way.

A x C logits of a large vocabulary are the biggest tensor of a training step. Here a chunk of positions goes through the
head, the losses and back to the hidden states before the next one starts, so a chunk's logits are all that exists;
nothing is computed twice, since the gradient of a mean is known as soon as the chunk is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

POSITIONS_CHUNK = 128

# (logits of a chunk (N, C), slice of the positions it covers) -> sums over the chunk's positions, by name
ChunkLosses = Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_AD: torch.Tensor,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None,
        losses: ChunkLosses,
        weights: dict[str, float],
        postprocess: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        n = hidden_AD.shape[0]
        sums = {name: hidden_AD.new_zeros((), dtype=torch.float32) for name in weights}
        d_hidden = torch.zeros_like(hidden_AD, dtype=torch.float32) if needs_hidden else None
        d_weight = torch.zeros_like(weight_CD, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias_C, dtype=torch.float32) if needs_bias and bias_C is not None else None
        for start in range(0, n, POSITIONS_CHUNK):
            part = slice(start, min(start + POSITIONS_CHUNK, n))
            hidden = hidden_AD[part].to(weight_CD.dtype)
            with torch.enable_grad():
                logits = torch.nn.functional.linear(hidden, weight_CD, bias_C).float().detach().requires_grad_()
                terms = losses(postprocess(logits), part)
                total = torch.stack([weights[name] * terms[name] for name in weights]).sum() / n
            (grad,) = torch.autograd.grad(total, logits)
            for name in weights:
                sums[name] += terms[name].detach()
            grad = grad.to(weight_CD.dtype)
            if d_hidden is not None:
                d_hidden[part] = (grad @ weight_CD).float()
            if d_weight is not None:
                d_weight.addmm_(grad.T.float(), hidden.float())
            if d_bias is not None:
                d_bias += grad.float().sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden_AD.dtype, weight_CD.dtype
        means = [sums[name] / n for name in weights]
        ctx.mark_non_differentiable(*means)
        weighted = torch.stack([weights[name] * mean for name, mean in zip(weights, means, strict=True)]).sum()
        return weighted, *means

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if d_hidden is None else (d_hidden * grad).to(hidden_dtype),
            None if d_weight is None else (d_weight * grad).to(weight_dtype),
            None if d_bias is None else (d_bias * grad).to(weight_dtype),
            None,
            None,
            None,
        )


def head_losses(
    hidden_AD: torch.Tensor,
    head: torch.nn.Linear,
    losses: ChunkLosses,
    weights: dict[str, float],
    postprocess: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of losses that are means over positions, and the means themselves (detached).

    Args:
        hidden_AD: the head's inputs at the A positions.
        losses: called once a chunk; returns for each name the *sum* over the chunk's positions.
        weights: by name; only these are asked for.
        postprocess: what the model does behind its head (soft-capping).
    """
    total, *means = _Fused.apply(hidden_AD, head.weight, head.bias, losses, weights, postprocess)
    return total, dict(zip(weights, means, strict=True))
