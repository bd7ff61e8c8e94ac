"""Scores are the log-likelihoods they claim to be, whatever the batch."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from compodistill.errors import CdistError
from compodistill.tools.demo.build import BOS, END, IMAGE, ROLES, build_processor, build_tokenizer, teacher_config
from compodistill.tools.evaluate.results import TaskResult, Verdict
from compodistill.tools.evaluate.scoring import evaluate, plan, render
from compodistill.tools.evaluate.tasks import load_task

QUESTIONS = [
    ("what colour is the square?", ["red", "blue", "green"], True),
    ("is it?", ["yes", "no"], True),
    ("a rather longer question about what stands left of the thing in the middle?", ["a red square", "nothing"], True),
    ("which is true? (A) this. (B) that.", ["A", "B"], True),
    ("a question about words alone?", ["yes", "no", "perhaps not"], False),
]


@pytest.fixture(scope="module")
def vlm():
    """A random tiny LLaVA whose words are single tokens except for `perhaps`."""
    words = ["red blue green yes no A B a red square nothing not", "yes", "no", "red", "blue", "green", "nothing"]
    processor = build_processor(build_tokenizer([*words * 3, *(q for q, _, _ in QUESTIONS)]))
    torch.manual_seed(1)
    config = teacher_config(processor.tokenizer, layers=3)
    config.text_config.initializer_range = 0.3  # far from uniform, so that scores differ
    return LlavaForConditionalGeneration(config).eval(), processor


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("task")
    (root / "eval").mkdir()
    records = []
    for i, (question, options, image) in enumerate(QUESTIONS):
        record = {"id": f"q{i}", "question": question, "options": options, "answer": options[-1], "kind": f"k{i % 2}"}
        if image:
            pixels = np.random.default_rng(i).integers(0, 255, (48, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{i}.png")
            record["image"] = f"{i}.png"
        records.append(record)
    (root / "eval" / "t.json").write_text(json.dumps(records))
    return load_task(root / "eval" / "t.json")


def by_hand(model, processor, question: str, option: str, image: Image.Image | None) -> float:
    """The chain rule on a single unpadded sequence, the prompt spelt out."""
    visual = IMAGE * 16 if image is not None else ""
    prompt = f"{BOS}{ROLES['user']}{visual}{question}{END}{ROLES['assistant']}"
    ids = processor.tokenizer(prompt + option, return_tensors="pt")["input_ids"]
    n_prompt = len(processor.tokenizer(prompt)["input_ids"])
    pixels = None
    if image is not None:
        array = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
        pixels = array.float() / 255 * 2 - 1
    with torch.no_grad():
        logprobs = model(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
    return sum(logprobs[t - 1, ids[0, t]].item() for t in range(n_prompt, ids.shape[1]))


@pytest.mark.parametrize("index", range(len(QUESTIONS)))
def test_scores_equal_the_chain_rule_by_hand_without_padding(vlm, task, index):
    verdict = evaluate(*vlm, task, batch_size=4).verdicts[index]
    image = task.questions[index].load_image()
    for option, score in zip(verdict.options, verdict.scores, strict=True):
        assert score == pytest.approx(by_hand(*vlm, verdict_question(task, index), option, image), abs=2e-4)


def verdict_question(task, index: int) -> str:
    return task.questions[index].question


def test_scores_do_not_depend_on_the_batch_size(vlm, task):
    alone = evaluate(*vlm, task, batch_size=1)
    for size in (2, 3, 16):
        together = evaluate(*vlm, task, batch_size=size)
        for a, b in zip(alone.verdicts, together.verdicts, strict=True):
            assert (a.id, a.prediction) == (b.id, b.prediction)
            np.testing.assert_allclose(a.scores, b.scores, atol=2e-4)


def test_the_image_reaches_the_model(vlm, task):
    model, processor = vlm
    before = evaluate(model, processor, task).verdicts[0].scores
    with torch.no_grad():
        model.model.vision_tower.embeddings.patch_embedding.weight.mul_(-1)
    try:
        after = evaluate(model, processor, task).verdicts[0].scores
    finally:
        with torch.no_grad():
            model.model.vision_tower.embeddings.patch_embedding.weight.mul_(-1)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3


def test_options_of_one_token_share_one_forward_pass_and_others_do_not(vlm, task):
    _, processor = vlm
    rows = [plan(processor.tokenizer, i, *render(processor, q)) for i, q in enumerate(task.questions)]
    assert [len(r) for r in rows] == [1, 1, 2, 1, 3]


def test_the_prediction_is_the_likeliest_option_and_accuracy_counts_it(vlm, task):
    result = evaluate(*vlm, task)
    for v in result.verdicts:
        assert v.scores[v.options.index(v.prediction)] == max(v.scores)
        assert v.correct == (v.prediction == v.answer)
    assert result.accuracy == sum(v.correct for v in result.verdicts) / len(QUESTIONS)


def test_a_template_that_puts_a_space_before_the_answer_has_it_scored(vlm, task):
    _, processor = vlm
    kept = processor.chat_template
    try:
        processor.chat_template = kept.replace("{{ part['text'] }}", "{{ ' ' + part['text'] }}")
        prompt, texts = render(processor, task.questions[1])
    finally:
        processor.chat_template = kept
    assert [t.removeprefix(prompt) for t in texts] == [" yes", " no"]


def test_a_model_that_gives_nan_is_an_error_and_not_an_accuracy(vlm, task):
    model, processor = vlm
    kept = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[7] = float("nan")
    try:
        with pytest.raises(CdistError, match="not finite"):
            evaluate(model, processor, task)
    finally:
        model.lm_head.weight.data.copy_(kept)


def test_progress_adds_up_to_the_questions(vlm, task):
    steps: list[int] = []
    evaluate(*vlm, task, batch_size=2, advance=steps.append)
    assert sum(steps) == len(task)


def test_summary_and_files_hold_accuracy_per_kind_and_every_score(tmp_path):
    def verdict(i: int, kind: str, correct: bool) -> Verdict:
        return Verdict(f"q{i}", kind, None, "p", ("a", "b"), (-1.0, -2.0), "a" if correct else "b", "a", correct)

    marks = {"x": (True, True), "y": (False, True)}
    result = TaskResult("t", tuple(verdict(i, k, marks[k][i // 2]) for i, k in enumerate("xyxy")))
    summary = result.summary()
    assert (summary["n"], summary["accuracy"]) == (4, 0.75)
    assert {k: (v["n"], v["accuracy"]) for k, v in summary["kinds"].items()} == {"x": (2, 1.0), "y": (2, 0.5)}
    lines, written = result.write(tmp_path / "out")
    assert json.loads(written.read_text()) == summary
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r["correct"] for r in rows] == [True, False, True, True]
    assert rows[0]["scores"] == [-1.0, -2.0]
    assert re.fullmatch(r"t\.jsonl", lines.name)
