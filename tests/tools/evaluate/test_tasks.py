"""A question file is read whole and checked before a model is loaded."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from compodistill.errors import UsageError
from compodistill.tools.evaluate.tasks import load_task

GOOD = {"id": "q1", "image": "images/a.png", "question": "what?", "options": ["x", "y"], "answer": "y", "kind": "k"}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "eval").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")

    def write(records):
        path = tmp_path / "eval" / "task.json"
        path.write_text(records if isinstance(records, str) else json.dumps(records))
        return path

    return write


def test_a_task_has_its_questions_with_images_found_beside_the_files_folder(write):
    task = load_task(write([GOOD]))
    (question,) = task.questions
    assert (task.name, question.options, question.answer, question.kind) == ("task", ("x", "y"), "y", "k")
    assert question.load_image().size == (8, 8)


def test_a_question_may_have_no_image_and_no_kind(write):
    (question,) = load_task(write([{k: GOOD[k] for k in ("id", "question", "options", "answer")}])).questions
    assert question.image is None
    assert question.load_image() is None
    assert question.kind == "all"


@pytest.mark.parametrize("field", ["id", "question", "options", "answer"])
def test_a_missing_field_is_named(write, field):
    with pytest.raises(UsageError, match=f'"{field}"') as error:
        load_task(write([GOOD, {k: v for k, v in GOOD.items() if k != field}]))
    assert "question 1" in error.value.where


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "images/none.png"}, "images/none.png.* is missing"),
        ({"image": "images/broken.png"}, "images/broken.png.* cannot be read"),
        ({"image": "../outside.png"}, "leaves its folder"),
        ({"image": "/etc/hostname"}, "leaves its folder"),
        ({"image": 3}, '"image" is not a path'),
        ({"answer": "z"}, '"answer" is not one of the options'),
        ({"options": ["x"]}, "two or more"),
        ({"options": ["y", "y"]}, "different"),
        ({"options": "xy"}, '"options"'),
        ({"kind": 1}, '"kind"'),
    ],
)
def test_a_wrong_field_is_named_with_its_question(write, change, message):
    with pytest.raises(UsageError, match=message) as error:
        load_task(write([{**GOOD, **change}]))
    assert "q1" in error.value.where
    assert error.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", "not json", "[" * 100_000])
def test_what_is_no_list_of_questions_is_refused(write, text):
    with pytest.raises(UsageError):
        load_task(write(text))


def test_a_missing_file_and_a_repeated_id_are_refused(write, tmp_path):
    with pytest.raises(UsageError, match="no such question file"):
        load_task(tmp_path / "none.json")
    with pytest.raises(UsageError, match="same id"):
        load_task(write([GOOD, GOOD]))
