"""The distillation losses, unweighted and per position; the step takes their means, the recipe weighs them.

Shifting is done before: a row of `logits_AC` predicts the supervised token of the same row.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def language_model_loss(logits_AC: torch.Tensor, labels_A: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the supervised tokens: (A,), in nats."""
    return F.cross_entropy(logits_AC.float(), labels_A, reduction="none")


def topk_kl(
    logits_AC: torch.Tensor,
    ids_AK: torch.Tensor,
    logprobs_AK: torch.Tensor,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher || student) from the teacher's top-k: (A,), in nats.

    Args:
        logits_AC: the student's.
        ids_AK: int64, the teacher's kept ids.
        logprobs_AK: the teacher's natural log-probabilities under its full softmax.
        tail: `bucket` adds the class "any other id" to both sides, which bounds the full KL from below and equals
            it for K = C; `renormalise` scales both sides to the kept ids (over-confident, but common).
        temperature: softens both sides (Hinton et al., 2015) and scales by its square. With a bucket it
            divides the log-probabilities of the K + 1 classes, since the tail's own logits are not known.

    Raises:
        ValueError: an unknown tail.
    """
    kept_AK = logits_AC.float().log_softmax(-1).gather(-1, ids_AK)
    if tail == "bucket" and ids_AK.shape[1] < logits_AC.shape[1]:
        teacher = torch.cat([logprobs_AK, _log_rest(logprobs_AK)], -1)
        student = torch.cat([kept_AK, _log_rest(kept_AK)], -1)
    elif tail in ("bucket", "renormalise"):
        teacher, student = logprobs_AK, kept_AK
    else:
        raise ValueError(f"tail must be bucket or renormalise, not {tail!r}")
    if temperature != 1.0 or tail == "renormalise":
        teacher = (teacher / temperature).log_softmax(-1)
        student = (student / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def _log_rest(logprobs_AK: torch.Tensor) -> torch.Tensor:
    """log(1 - sum p), (A, 1); the floor keeps a tail that is rounded away from becoming log 0."""
    mass = logprobs_AK.exp().sum(-1, keepdim=True)
    return torch.log((1 - mass).clamp_min(1e-8))


def attention_cosine(teacher_GQV: torch.Tensor, student_GQV: torch.Tensor) -> torch.Tensor:
    """Cosine of teacher and student slices, mean over rows and groups (CompoDistill, L_ADL = 1 - this).

    Rows in which the teacher puts nothing on visual keys (before the first one, or outside a sliding window)
    have no direction and are left out.

    Returns:
        A scalar; NaN-free also where no row is left (then 1 with no gradient: nothing to align).
    """
    rows = teacher_GQV.norm(dim=-1) > 0
    if not bool(rows.any()):
        return teacher_GQV.new_ones(())
    return F.cosine_similarity(teacher_GQV[rows], student_GQV[rows], dim=-1, eps=1e-12).mean()
