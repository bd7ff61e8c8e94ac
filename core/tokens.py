"""From a sample to ids, labels and visual positions, by the model's own processor and chat template.

The same code runs on the teacher's side and on the student's: what it returns is digested into the store,
and the join refuses a sample whose digest differs.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from compodistill.errors import DataError, UsageError
from compodistill.samples import Sample

IGNORE = -100  # the label of positions that carry no loss, as in transformers
BUCKET = 64  # sequences are padded to a multiple of this, so a sample's bits do not depend on its neighbours
SEQUENCE_KEYS = {"token_type_ids", "mm_token_type_ids"}  # processor outputs as long as the sequence


@dataclass(frozen=True)
class Tokens:
    """One tokenized sample.

    Attributes:
        key: the sample's key.
        input_ids: (T,) int64.
        labels: (T,) int64, `IGNORE` where not supervised; unshifted: labels[p] is the token at p.
        visual_positions: (V,) int64, positions of image features, wherever they stand.
        extras: what else the processor returned for this sample (`pixel_values`, `image_grid_thw`,
            `token_type_ids`, ...), torch tensors.
    """

    key: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    visual_positions: torch.Tensor
    extras: dict[str, torch.Tensor]

    @property
    def supervised_positions(self) -> torch.Tensor:
        """(A,) int64: positions p with a label; the logits that predict them stand at p - 1."""
        return torch.nonzero(self.labels != IGNORE).flatten()

    def digest(self) -> dict[str, str | int]:
        """What both sides must agree on: sha256 of ids and of labels (little-endian int64), number of visual tokens."""
        return {
            "input_ids": _sha256(self.input_ids),
            "labels": _sha256(self.labels),
            "visual_tokens": len(self.visual_positions),
        }


ROWS: tuple[Literal["all", "visual", "text", "answer"], ...] = ("all", "visual", "text", "answer")


def query_positions(tokens: Tokens, rows: str) -> torch.Tensor:
    """(Q,) int64: the queries whose attention is kept.

    `all`: every position from the first visual token on (those before it see no visual key); `visual`: the visual
    tokens themselves; `text`: all but those; `answer`: the positions that predict a supervised token (p - 1).
    A sample without visual tokens has no rows.
    """
    visual = tokens.visual_positions
    if len(visual) == 0:
        return visual
    after = torch.arange(int(visual[0]), len(tokens.input_ids))
    if rows == "all":
        return after
    if rows == "visual":
        return visual
    if rows == "text":
        return after[~torch.isin(after, visual)]
    if rows == "answer":
        predicting = tokens.supervised_positions - 1
        return predicting[predicting >= visual[0]]
    raise UsageError(f"unknown attention rows {rows!r}", remedy=f"one of {', '.join(ROWS)}")


def _sha256(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def chat(sample: Sample) -> list[dict[str, Any]]:
    """The sample as a chat in transformers' form (content lists; images are marks, passed separately)."""
    return [
        {
            "role": turn.role,
            "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in turn.parts],
        }
        for turn in sample.turns
    ]


def tokenize(processor: Any, sample: Sample, image_token_id: int, max_length: int | None = None) -> Tokens:
    """Turn a sample into ids, labels and visual positions.

    The answers (assistant turns with their end-of-turn token) are supervised; they are found as the text the chat
    template adds between the prompt of a turn and its end, so any template will do whose rendering of a
    conversation starts with its rendering of the beginning of that conversation.

    Raises:
        DataError: no supervised token, longer than `max_length`, or a template or processor that does not
            fit the sample; names shard and key.
    """
    messages = chat(sample)
    text = _render(processor, messages, False)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, whole = (
                _render(processor, messages[:i], True),
                _render(processor, messages[: i + 1], False),
            )
            if not (text.startswith(prompt) and text.startswith(whole) and len(whole) > len(prompt)):
                raise UsageError(
                    "the chat template renders the beginning of a conversation differently once more turns follow, "
                    "so the answers cannot be told from the prompt",
                    where=f"{sample.where}, turn {i}",
                    remedy="use a processor whose chat template is prefix-stable",
                )
            answers.append((len(prompt), len(whole.rstrip())))
    bos = getattr(processor.tokenizer, "bos_token", None)
    try:
        out = processor(
            text=[text],
            images=[list(sample.images)] if sample.images else None,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
    except (ValueError, TypeError, StopIteration) as e:
        raise DataError(f"the processor refuses the sample: {e}", where=sample.where) from e
    ids = torch.as_tensor(np.asarray(out.pop("input_ids")[0], dtype=np.int64))
    spans = np.asarray(out.pop("offset_mapping")[0]).reshape(-1, 2)
    replaced = out.pop("text_replacement_offsets", None) or [[]]
    labels = torch.full_like(ids, IGNORE)
    labels[torch.as_tensor(_inside(spans, _expanded(answers, replaced[0])))] = 1
    labels = torch.where(labels == 1, ids, IGNORE)
    labels[0] = IGNORE  # nothing predicts the first token
    if bool((labels == IGNORE).all()):
        raise DataError("no supervised token: the conversation has no answer", where=sample.where)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"{len(ids)} tokens, more than --max-length {max_length}",
            where=sample.where,
            remedy="raise --max-length or leave the sample out",
        )
    out.pop("attention_mask", None)
    extras = {k: _as_tensor(v) for k, v in out.items()}
    visual = torch.nonzero(ids == image_token_id).flatten()
    return Tokens(sample.key, ids, labels, visual, extras)


def _render(processor: Any, messages: list[dict[str, Any]], prompt: bool) -> str:
    if not messages:
        return ""
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _expanded(spans: list[tuple[int, int]], replaced: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Character spans of the rendered text, moved past the image placeholders that were expanded before them."""
    ends = [r["span"][1] for r in replaced]
    gained = [0] + [r["new_span"][1] - r["span"][1] for r in replaced]
    return [(a + gained[bisect_right(ends, a)], b + gained[bisect_right(ends, b)]) for a, b in spans]


def _inside(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """(T,) bool: tokens that overlap one of the spans (zero-width tokens never do)."""
    inside = np.zeros(len(offsets), dtype=bool)
    for a, b in spans:
        inside |= (offsets[:, 0] < b) & (offsets[:, 1] > a) & (offsets[:, 1] > offsets[:, 0])
    return inside


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, list):
        value = np.stack([np.asarray(v) for v in value])
    return torch.as_tensor(value)


def collate(tokens: Sequence[Tokens], pad_token_id: int, bucket: int = BUCKET) -> dict[str, torch.Tensor]:
    """Model inputs of a batch: right-padded to a multiple of `bucket`; images of all samples in a row.

    Returns:
        `input_ids`, `attention_mask` (B, T) int64 and the processor's further outputs. Labels are left out:
        the losses take positions, and a padded label row would only be a second truth.
    """
    length = -(-max(len(t.input_ids) for t in tokens) // bucket) * bucket
    batch = {
        "input_ids": _pad([t.input_ids for t in tokens], length, pad_token_id),
        "attention_mask": _pad([torch.ones_like(t.input_ids) for t in tokens], length, 0),
    }
    for name in sorted({k for t in tokens for k in t.extras}):
        values = [t.extras[name] for t in tokens if name in t.extras]
        if name in SEQUENCE_KEYS:
            batch[name] = _pad([v[0] for v in values], length, 0)
        else:
            batch[name] = torch.cat(values)
    return batch


def _pad(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
