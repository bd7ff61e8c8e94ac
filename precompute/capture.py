"""What the teacher says of a batch: top-k logits and visual-attention slices, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compodistill.attention import tap_attention
from compodistill.groups import understanding_layers
from compodistill.models import VisionLanguageModel, logits_at
from compodistill.store.signals import Logits, SampleSignals
from compodistill.tokens import Tokens, collate, query_positions


@dataclass(frozen=True)
class CaptureSettings:
    """What to keep.

    Attributes:
        groups: pairs (first, last) of decoder layers, both included, whose slices are averaged.
        rows: which queries, see `query_positions`.
        top_k: how many logits a supervised token keeps.
    """

    groups: list[tuple[int, int]]
    rows: str = "all"
    top_k: int = 64


@torch.inference_mode()
def capture(
    teacher: VisionLanguageModel, batch: Sequence[Tokens], settings: CaptureSettings | None = None
) -> list[SampleSignals]:
    """The signals of a batch, one entry a sample, as precompute stores them.

    Without settings: every understanding layer by itself, all rows, 64 logits.

    Logits are given for the prediction of each supervised token: position p is predicted at p - 1.
    """
    if settings is None:
        settings = CaptureSettings([(i, i) for i in understanding_layers(teacher.n_layers)])
    rows = [query_positions(t, settings.rows) for t in batch]
    columns = [t.visual_positions for t in batch]
    supervised = [t.supervised_positions for t in batch]
    layers = sorted({i for first, last in settings.groups for i in range(first, last + 1)})
    inputs = {k: v.to(teacher.model.device) for k, v in collate(batch, teacher.pad_token_id).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(teacher.model.dtype)
    with (
        tap_attention(teacher.model, layers, rows, columns) as tap,
        logits_at(teacher.model, [p - 1 for p in supervised], float32=True),
    ):
        logits_AC = teacher.model(**inputs, use_cache=False).logits[0].float()
    kept = top_k(logits_AC, settings.top_k)
    bounds = np.cumsum([0] + [len(p) for p in supervised])
    return [
        SampleSignals(
            key=tokens.key,
            digest=tokens.digest(),
            supervised_positions=_int32(supervised[b]),
            query_positions=_int32(rows[b]),
            visual_positions=_int32(columns[b]),
            logits=Logits(*(part[bounds[b] : bounds[b + 1]] for part in kept)),
            attention=_grouped({i: s[b] for i, s in tap.slices.items()}, settings.groups),
        )
        for b, tokens in enumerate(batch)
    ]


def top_k(logits_AC: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest logits of each row as log-probabilities, ordered by (logit descending, id ascending).

    Ties at the k boundary go to the smaller id, so the result is one whatever the kernel of `topk` prefers.

    Returns:
        ids (A, K) int32, logprobs (A, K) float32 (natural log, exact: under the full softmax), lse (A,) float32.
    """
    k = min(k, logits_AC.shape[1])
    lse_A = logits_AC.logsumexp(-1)
    values_AK, ids_AK = logits_AC.topk(k)
    least_A1 = values_AK[:, -1:]
    for a in torch.nonzero((logits_AC >= least_A1).sum(-1) > k).flatten().tolist():
        above = torch.nonzero(logits_AC[a] > least_A1[a]).flatten()
        equal = torch.nonzero(logits_AC[a] == least_A1[a]).flatten()
        ids_AK[a] = torch.cat([above, equal[: k - len(above)]])
    ids_AK = ids_AK.sort(-1).values
    values_AK = logits_AC.gather(-1, ids_AK)
    order = values_AK.argsort(stable=True, dim=-1, descending=True)
    ids_AK, values_AK = ids_AK.gather(-1, order), values_AK.gather(-1, order)
    return (
        ids_AK.cpu().numpy().astype(np.int32),
        (values_AK - lse_A[:, None]).cpu().numpy(),
        lse_A.cpu().numpy(),
    )


def _grouped(slices_QV: dict[int, torch.Tensor], groups: list[tuple[int, int]]) -> np.ndarray:
    means = [torch.stack([slices_QV[i] for i in range(first, last + 1)]).mean(0) for first, last in groups]
    return torch.stack(means).cpu().numpy()


def _int32(positions: torch.Tensor) -> np.ndarray:
    return positions.numpy().astype(np.int32)
