"""Log-likelihoods of options as the assistant's answer, batched, for any processor with a chat template.

The text that is scored is what the chat template makes of (question, option), cut after the option: whatever
the template puts between the prompt and the answer (a space, a newline) counts, what it puts after it does
not. Where every option of a question is a single token, one forward pass over the prompt scores them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from compodistill.errors import CdistError, UsageError
from compodistill.tools.evaluate.results import TaskResult, Verdict
from compodistill.tools.evaluate.tasks import Task, TaskQuestion


@dataclass(frozen=True)
class Row:
    """One sequence to run: its text, and for each option scored by it the option's place and token ids.

    `tail` is how many of the row's last tokens are the option's own: 0 where the row is the bare prompt and
    its last position predicts each (single-token) option.
    """

    question: int
    text: str
    targets: tuple[tuple[int, tuple[int, ...]], ...]
    tail: int


def render(processor: Any, question: TaskQuestion) -> tuple[str, list[str]]:
    """The prompt, and the prompt continued by each option, as texts."""
    content: list[dict[str, str]] = [{"type": "image"}] if question.image is not None else []
    user = {"role": "user", "content": [*content, {"type": "text", "text": question.question}]}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    texts = []
    for option in question.options:
        answer = {"role": "assistant", "content": [{"type": "text", "text": option}]}
        whole = processor.apply_chat_template([user, answer], tokenize=False)
        # a template that is not prefix-stable (a thinking mark in the generation prompt) is continued as it is
        rest = whole[len(prompt) :] if whole.startswith(prompt) else option
        at = rest.find(option)
        texts.append(prompt + (rest[: at + len(option)] if at >= 0 else option))
    return prompt, texts


def plan(tokenizer: Any, index: int, prompt: str, texts: Sequence[str]) -> list[Row]:
    """The rows that score one question."""
    ids = [tuple(_ids(tokenizer, text)) for text in (prompt, *texts)]
    tails = []
    for whole in ids[1:]:
        shared = 0
        for a, b in zip(ids[0], whole, strict=False):
            if a != b:
                break
            shared += 1
        tails.append(whole[shared:])
        if shared < len(ids[0]):  # the answer's first letters melt into the prompt's last token
            tails[-1] = whole[min(shared, len(whole) - 1) :]
    if all(len(tail) == 1 and len(whole) == len(ids[0]) + 1 for tail, whole in zip(tails, ids[1:], strict=True)):
        return [Row(index, prompt, tuple(enumerate(tails)), 0)]
    return [Row(index, text, ((i, tail),), len(tail)) for i, (text, tail) in enumerate(zip(texts, tails, strict=True))]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def score(model: Any, processor: Any, rows: Sequence[Row], images: Sequence[Image.Image | None]) -> list[list[float]]:
    """For each row the log-likelihood of each of its targets, from one padded batch.

    Args:
        rows: B rows.
        images: B images, None for a row without.
    """
    tokenizer = processor.tokenizer
    batch = processor(
        text=[row.text for row in rows],
        images=[[image] for image in images if image is not None] or None,
        padding=True,
        padding_side="left",  # every option ends at the last position: only the last logits are needed
        return_tensors="pt",
    )
    batch = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
    batch = {k: v.to(model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    for row, ids in zip(rows, batch["input_ids"].tolist(), strict=True):
        if row.tail and tuple(ids[-row.tail :]) != row.targets[0][1]:
            raise UsageError(
                "the processor does not end a text with the tokens its tokenizer gives",
                where=f"{type(processor).__name__}, {tokenizer.decode(ids[-row.tail :])!r}",
                remedy="scoring options needs a tokenizer that appends nothing; report this model",
            )
    keep = max(max(row.tail for row in rows), 0) + 1
    extra = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits_BKC = model(**batch, **extra, use_cache=False).logits[:, -keep:].float()
    if not logits_BKC.isfinite().all():  # an argmax over NaN would pick the first option and look like an answer
        raise CdistError(
            "the model gives logits that are not finite",
            where=", ".join(sorted({row.text[-80:] for row in rows})[:1]),
            remedy="evaluate in float32, or look at the training run",
        )
    out = []
    for row, logits_KC in zip(rows, logits_BKC, strict=True):
        logprobs = logits_KC[keep - 1 - row.tail :].log_softmax(-1)  # position j predicts the row's j-th tail token
        out.append([sum(logprobs[j, token].item() for j, token in enumerate(tokens)) for _, tokens in row.targets])
    return out


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    batch_size: int = 16,
    *,
    advance: Callable[[int], object] | None = None,
) -> TaskResult:
    """Answers every question of a task by its most likely option.

    Args:
        model: an image-text-to-text model, in any dtype, on any device; put into eval mode.
        processor: its processor, with a chat template.
        batch_size: sequences in a forward pass. Scores do not depend on it beyond floating-point noise.
        advance: called with the number of questions finished since the last call.

    Raises:
        UsageError: the processor has no chat template, or the text cannot be scored.
    """
    if getattr(processor, "chat_template", None) is None:
        raise UsageError(
            "the processor has no chat template",
            where=type(processor).__name__,
            remedy="save one beside the model",
        )
    model.eval()
    prompts = [render(processor, question) for question in task.questions]
    rows = [row for i, p in enumerate(prompts) for row in plan(processor.tokenizer, i, *p)]
    # rows of like length share a batch; a batch is with images or without, as processors want it
    has_image = [q.image is not None for q in task.questions]
    rows.sort(key=lambda row: (has_image[row.question], len(row.text)))
    scores: list[dict[int, float]] = [{} for _ in task.questions]
    before = 0
    for part in _batches(rows, batch_size, has_image):
        images = {i: task.questions[i].load_image() for i in {row.question for row in part}}
        for row, found in zip(part, score(model, processor, part, [images[r.question] for r in part]), strict=True):
            scores[row.question].update(zip((i for i, _ in row.targets), found, strict=True))
        if advance is not None:
            done = sum(len(s) == len(q.options) for s, q in zip(scores, task.questions, strict=True))
            advance(done - before)
            before = done
    verdicts = []
    for question, (prompt, _), of_option in zip(task.questions, prompts, scores, strict=True):
        values = tuple(of_option[i] for i in range(len(question.options)))
        best = question.options[max(range(len(values)), key=values.__getitem__)]
        verdicts.append(
            Verdict(
                question.id,
                question.kind,
                question.image_name,
                prompt,
                question.options,
                values,
                question.answer,
                best,
                best == question.answer,
            )
        )
    return TaskResult(task.name, tuple(verdicts))


def _batches(rows: Sequence[Row], size: int, has_image: Sequence[bool]) -> Iterator[list[Row]]:
    for wanted in (False, True):
        group = [row for row in rows if has_image[row.question] is wanted]
        yield from (group[i : i + size] for i in range(0, len(group), size))
