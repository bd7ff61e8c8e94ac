"""One distillation step: forward once, tap what the stage's losses need, weigh the terms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compodistill.attention import tap_attention
from compodistill.errors import MismatchError
from compodistill.groups import layer_groups, understanding_layers
from compodistill.models import behind_the_head, hidden_at
from compodistill.train.fused import head_losses
from compodistill.train.losses import attention_cosine, language_model_loss, topk_kl
from compodistill.train.recipes import Stage


@dataclass(frozen=True)
class Matching:
    """Which student layers are aligned with what in the store.

    Attributes:
        layers: the student's understanding layers, k of them.
        windows: for each of them the slice (first, last) of the stored groups whose mean is its target.
    """

    layers: list[int]
    windows: list[tuple[int, int]]

    def targets(self, stored_GQV: torch.Tensor) -> torch.Tensor:
        """(k, Q, V): the target of each student layer from the stored groups."""
        return torch.stack([stored_GQV[first : last + 1].mean(0) for first, last in self.windows])


def match(student_layers: int, groups: Sequence[tuple[int, int]], per_layer: bool) -> Matching:
    """Match a student of a given depth with the groups of a store.

    Raises:
        MismatchError: the store was grouped for a student of another depth.
    """
    layers = list(understanding_layers(student_layers))
    if per_layer:
        return Matching(layers, layer_groups(range(len(groups)), len(layers)))
    if len(groups) != len(layers):
        raise MismatchError(
            f"the store's attention is grouped for {len(groups)} student layers, but this student of "
            f"{student_layers} layers has {len(layers)} understanding layers",
            remedy=f"precompute with --student-layers {student_layers}, or with --per-layer for students of any depth",
        )
    return Matching(layers, [(g, g) for g in range(len(groups))])


@dataclass(frozen=True)
class Targets:
    """What a batch is trained towards; lists have one entry a sample.

    Attributes:
        positions: (A,) int64, where the predicting logits stand: supervised positions - 1.
        labels_A: the supervised tokens of the whole batch, int64.
        ids_AK, logprobs_AK: the teacher's top-k of the whole batch; None where no loss reads it.
        attention: stored (G, Q, V) float32 slices; None where no loss reads them.
        rows, columns: (Q,) kept queries and (V,) visual positions of the slices.
    """

    positions: list[torch.Tensor]
    labels_A: torch.Tensor
    ids_AK: torch.Tensor | None = None
    logprobs_AK: torch.Tensor | None = None
    attention: list[torch.Tensor] | None = None
    rows: list[torch.Tensor] | None = None
    columns: list[torch.Tensor] | None = None


def step_losses(
    forward: nn.Module,
    student: PreTrainedModel,
    inputs: dict[str, Any],
    targets: Targets,
    stage: Stage,
    matching: Matching,
    *,
    n_positions: int | None = None,
    n_samples: int | None = None,
    until_backward: ExitStack | None = None,
) -> dict[str, torch.Tensor]:
    """The unweighted loss terms of a batch, those with a weight in the stage, and `total`, their weighted sum.

    Terms are sums over this batch divided by counts: of this batch, or of a larger one it is a piece of, so that the
    terms (and gradients) of all pieces add up to those of the whole.

    Args:
        forward: what is called (the student itself, or its DDP / FSDP wrapper).
        student: the module the taps are set on.
        n_positions: supervised tokens the `lm` and `kl` terms are means over; this batch's where None.
        n_samples: samples with visual tokens the `attention` term is a mean over; this batch's where None.
        until_backward: closes what has to stay open until the gradient is computed: with activation checkpointing
            the backward pass runs the layers again, and they must find the same tap.

    Returns:
        Scalars by name; `attention` is 1 - mean cosine over samples with visual tokens, absent where there are none.
    """
    weights = stage.losses
    with ExitStack() as stack:
        hidden = stack.enter_context(hidden_at(student, targets.positions))
        tap = None
        if weights.attention > 0:
            assert targets.rows is not None
            assert targets.columns is not None
            tap = (until_backward or stack).enter_context(
                tap_attention(student, matching.layers, targets.rows, targets.columns)
            )
        forward(**inputs, use_cache=False)
    n = len(targets.labels_A)
    share = 1.0 if n_positions is None else n / max(n_positions, 1)
    wanted = {name: getattr(weights, name) for name in ("lm", "kl") if getattr(weights, name) > 0}
    total, terms = _without_gradient(student, inputs, n), {name: hidden[0].new_zeros(()) for name in wanted}
    if n:
        weighted, means = head_losses(
            hidden[0],
            student.get_output_embeddings(),
            partial(_position_losses, targets, stage),
            {name: weight * share for name, weight in wanted.items()},
            behind_the_head(student),
        )
        total, terms = total + weighted, {name: mean * share for name, mean in means.items()}
    if tap is not None:
        assert targets.attention is not None
        cosines = [
            attention_cosine(matching.targets(stored), torch.stack([tap.slices[i][b] for i in matching.layers]))
            for b, stored in enumerate(targets.attention)
            if stored.shape[-1] > 0
        ]
        if cosines:  # a batch of text-only samples has nothing to align
            terms["attention"] = (1 - torch.stack(cosines)).sum() / (n_samples or len(cosines))
            total = total + weights.attention * terms["attention"]
    return {**terms, "total": total}


def _without_gradient(student: PreTrainedModel, inputs: dict[str, Any], n: int) -> torch.Tensor:
    """0, with a zero gradient for the parameters this batch does not reach.

    Where a batch has no image the adapter takes no part, and without supervised tokens nothing does: other ranks would
    wait for gradients that never come, and an optimizer treats a missing gradient otherwise than a zero one.
    """
    parameters = {id(p): p for p in student.parameters() if p.requires_grad}
    if n:
        images = any(name.startswith("pixel_values") for name in inputs)
        reached = [student] if images else [student.get_decoder(), student.get_output_embeddings()]
        for module in reached:
            for p in module.parameters():
                parameters.pop(id(p), None)
    zero = torch.zeros((), device=student.device)
    return torch.stack([zero, *(p.flatten()[:0].sum().float() for p in parameters.values())]).sum()


def _position_losses(targets: Targets, stage: Stage, logits_NC: torch.Tensor, part: slice) -> dict[str, torch.Tensor]:
    """Sums over a chunk's positions of the losses that read logits."""
    sums = {}
    if stage.losses.lm > 0:
        sums["lm"] = language_model_loss(logits_NC, targets.labels_A[part]).sum()
    if stage.losses.kl > 0:
        assert targets.ids_AK is not None
        assert targets.logprobs_AK is not None
        ids_NK, logprobs_NK = targets.ids_AK[part], targets.logprobs_AK[part]
        kl_N = topk_kl(logits_NC, ids_NK, logprobs_NK, tail=stage.tail, temperature=stage.temperature)
        sums["kl"] = kl_N.sum()
    return sums
