"""Visual attention of teacher and student side by side, matched layer by layer as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import compodistill.train.student  # noqa: F401  registers our students with transformers
from compodistill.attention import tap_attention
from compodistill.groups import understanding_layers
from compodistill.models import VisionLanguageModel
from compodistill.samples import Sample
from compodistill.tokens import Tokens, collate, query_positions, tokenize
from compodistill.train.losses import attention_cosine
from compodistill.train.step import match


@torch.inference_mode()
def understanding_slices(model: VisionLanguageModel, tokens: Tokens, rows: str = "all") -> torch.Tensor:
    """(L, Q, V) float32 slices of the understanding layers for one sample."""
    layers = list(understanding_layers(model.n_layers))
    inputs = {k: v.to(model.model.device) for k, v in collate([tokens], model.pad_token_id).items()}
    with tap_attention(model.model, layers, [query_positions(tokens, rows)], [tokens.visual_positions]) as tap:
        model.model(**inputs, use_cache=False, logits_to_keep=1)
    return torch.stack([tap.slices[i][0] for i in layers])


def paired_slices(
    teacher: VisionLanguageModel, student: VisionLanguageModel, samples: Sequence[Sample], rows: str = "all"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each sample with visual tokens: the targets (k, Q, V) of the student's layers, and its own slices."""
    matching = match(student.n_layers, [(i, i) for i in understanding_layers(teacher.n_layers)], per_layer=True)
    for sample in samples:
        tokens = tokenize(teacher.processor, sample, teacher.image_token_id)
        if len(tokens.visual_positions):
            targets = matching.targets(understanding_slices(teacher, tokens, rows))
            yield targets, understanding_slices(student, tokens, rows)


def attention_similarity(
    teacher: VisionLanguageModel, student: VisionLanguageModel, samples: Sequence[Sample], rows: str = "all"
) -> float:
    """Mean cosine of the visual attention of the understanding layers, over rows, layers and samples (paper, 3.1).

    Raises:
        ZeroDivisionError: no sample has visual tokens.
    """
    values = [float(attention_cosine(ours, theirs)) for ours, theirs in paired_slices(teacher, student, samples, rows)]
    return sum(values) / len(values)
