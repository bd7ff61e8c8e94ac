"""The tiny world: reproducible, fair, and right about itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from compodistill.tools.demo.questions import COMPOSITION, LOCALISATION, RECOGNITION, without_picture
from compodistill.tools.demo.scenes import NUMBERS, Draws, Scene, Thing, draw_scenes, render
from compodistill.tools.demo.world import write_world

RELATION = "left of|right of|above|below"
SCENES = list(islice(draw_scenes("train", 3), 150))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    return out, write_world(out, 40, 20, seed=5)


def pixels_digest(out) -> str:
    digest = hashlib.sha256()
    for path in sorted((out / "images").iterdir()):
        digest.update(path.name.encode())
        digest.update(np.asarray(Image.open(path)).tobytes())
    return digest.hexdigest()


def json_digest(out) -> str:
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*.json")):
        digest.update(path.relative_to(out).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def test_a_seed_gives_the_same_text_and_pixels_on_every_machine(world):
    out, _ = world
    assert json_digest(out)[:16] == "e10adc609a37027b"
    assert pixels_digest(out)[:16] == "10364379be6a559e"


def test_another_seed_gives_another_world(world, tmp_path):
    write_world(tmp_path, 40, 20, seed=6)
    assert json_digest(tmp_path) != json_digest(world[0])
    assert pixels_digest(tmp_path) != pixels_digest(world[0])


def test_files_are_what_the_counts_say_and_every_image_is_there(world):
    out, counts = world
    assert counts["train"] == len(json.loads((out / "train.json").read_text())) == 42
    for split in ("eval", "val"):
        for path in (out / split).glob("*.json"):
            questions = json.loads(path.read_text())
            assert counts[f"{split}/{path.stem}"] == len(questions)
            for q in questions:
                with Image.open(out / q["image"]) as image:
                    assert image.size == (48, 48)
                assert q["answer"] in q["options"]
    assert counts["eval/composition"] == 5 * 20


def test_a_training_record_is_a_llava_conversation_with_one_image_mark_in_the_first_turn(world):
    records = json.loads((world[0] / "train.json").read_text())
    with_image = [r for r in records if "image" in r]
    assert len(with_image) == 40
    for record in records:
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        marks = [t["value"].count("<image>") for t in turns]
        assert sum(marks) == marks[0] == ("image" in record)
    assert len({r["id"] for r in records}) == len(records)


@pytest.mark.parametrize("n_objects", [2, 3, 5])
def test_no_layout_is_in_two_splits_whatever_the_seeds(n_objects):
    splits = {
        split: {s.identity for seed in range(3) for s in islice(draw_scenes(split, seed, n_objects=n_objects), 300)}
        for split in ("train", "val", "eval")
    }
    assert not splits["train"] & splits["eval"]
    assert not splits["train"] & splits["val"]
    assert not splits["val"] & splits["eval"]


def test_a_shifted_copy_of_a_scene_is_the_same_scene_and_a_swapped_one_is_not():
    a, b = Thing(0, 0, "red", "circle", "big"), Thing(1, 2, "blue", "square", "small")
    moved = Thing(1, 2, "blue", "square", "small", dy=3, dx=1)
    assert Scene((a, b)).identity == Scene((moved, a), noise_seed=(9,)).identity
    swapped = Thing(0, 0, "blue", "circle", "big"), Thing(1, 2, "red", "square", "small")
    assert Scene((a, b)).identity != Scene(swapped).identity


def test_things_are_drawn_where_the_scene_has_them_and_nowhere_else():
    for scene in SCENES[:50]:
        pixels = np.asarray(render(scene)).astype(int)
        painted = (abs(pixels - 226) > 10).any(-1).reshape(scene.grid, 12, scene.grid, 12).any(axis=(1, 3))
        assert set(zip(*np.nonzero(painted), strict=True)) == {(t.row, t.column) for t in scene.things}


# The answers again, from the text of the question and the scene alone.


def find(scene: Scene, name: str) -> list[Thing]:
    colour, shape = name.split()
    return [t for t in scene.things if (t.colour, t.shape) == (colour, shape)]


def true_caption(scene: Scene, caption: str) -> bool:
    if match := re.fullmatch(r"there is a (\w+ \w+) and a (\w+ \w+)", caption):
        return all(find(scene, name) for name in match.groups())
    first, relation, second = re.fullmatch(rf"the (\w+ \w+) is ({RELATION}) the (\w+ \w+)", caption).groups()
    return any(holds(a, relation, b) for a in find(scene, first) for b in find(scene, second))


def holds(a: Thing, relation: str, b: Thing) -> bool:
    (dy, dx) = (b.row - a.row, b.column - a.column)
    return {"left of": dx > 0, "right of": dx < 0, "above": dy > 0, "below": dy < 0}[relation]


def derive(scene: Scene, text: str) -> str:
    """The answer to any question of the world, by reading it."""
    if m := re.fullmatch(r"is there a (\w+ \w+)\?", text):
        return "yes" if find(scene, m[1]) else "no"
    if m := re.fullmatch(r"what colour is the (\w+)\?", text):
        (thing,) = [t for t in scene.things if t.shape == m[1]]
        return thing.colour
    if m := re.fullmatch(r"what shape is the (\w+) thing\?", text):
        (thing,) = [t for t in scene.things if t.colour == m[1]]
        return thing.shape
    if m := re.fullmatch(r"is the (\w+ \w+) small or big\?", text):
        return find(scene, m[1])[0].size
    if m := re.fullmatch(r"how many (\w+)( things)? are there\?", text):
        return NUMBERS[sum(m[1] in (t.colour, t.shape + "s") for t in scene.things)]
    if m := re.fullmatch(r"which is true\? \(A\) (.*)\. \(B\) (.*)\.", text):
        truth = [true_caption(scene, m[1]), true_caption(scene, m[2])]
        assert sum(truth) == 1, f"exactly one caption must hold: {text}"
        return "AB"[truth.index(True)]
    if m := re.fullmatch(r"is it true\? (.*)\.", text):
        return "yes" if true_caption(scene, m[1]) else "no"
    if m := re.fullmatch(rf"is the (\w+ \w+) ({RELATION}) the (\w+ \w+)\?", text):
        return "yes" if holds(find(scene, m[1])[0], m[2], find(scene, m[3])[0]) else "no"
    if m := re.fullmatch(r"which (row|column) is the (\w+ \w+) in\?", text):
        return ["one", "two", "three", "four"][getattr(find(scene, m[2])[0], m[1])]
    if m := re.fullmatch(r"is the (\w+ \w+) at the (top|left) or the (bottom|right)\?", text):
        thing = find(scene, m[1])[0]
        return m[2] if (thing.row if m[2] == "top" else thing.column) < 2 else m[3]
    if m := re.fullmatch(r"what is in row (\w+) column (\w+)\?", text):
        row, column = (["one", "two", "three", "four"].index(word) for word in m.groups())
        names = [f"{t.colour} {t.shape}" for t in scene.things if (t.row, t.column) == (row, column)]
        return names[0] if names else "nothing"
    m = re.fullmatch(rf"what is ({RELATION}) the (\w+ \w+)\?", text)
    names = [f"{t.colour} {t.shape}" for t in scene.things if holds(t, m[1], find(scene, m[2])[0])]
    assert len(names) <= 1
    return names[0] if names else "nothing"


@pytest.mark.parametrize("kind", [*RECOGNITION, *COMPOSITION, *LOCALISATION])
def test_every_answer_follows_from_the_scene(kind):
    maker = {**RECOGNITION, **COMPOSITION, **LOCALISATION}[kind]
    asked = 0
    for i, scene in enumerate(SCENES):
        for want in (True, False):
            question = maker(scene, Draws(i, want), want)
            if question is None:
                continue
            asked += 1
            assert question.kind == kind
            assert question.answer in question.options
            assert derive(scene, question.text) == question.answer, (scene, question)
            if len(question.options) == 2 and kind in {**COMPOSITION, "exists": None, "size": None}:
                assert question.answer == question.options[0 if want else 1]
    assert asked > len(SCENES) / 2


@pytest.mark.parametrize("kind", COMPOSITION)
def test_a_wrong_caption_is_as_likely_as_a_right_one_for_a_blind_reader(kind):
    """Words and repeated words are the same on both sides, up to chance."""
    right, wrong = Counter(), Counter()
    for i, scene in enumerate(islice(draw_scenes("train", 8), 3000)):
        question = COMPOSITION[kind](scene, Draws(8, i), i % 2 == 0)
        if question is None or question.options == ("A", "B"):
            continue
        side = right if question.answer == "yes" else wrong
        words = re.sub(r"is it true\?", "", question.text).strip(" ?.").split()
        content = [w for w in words if w not in ("the", "a")]
        side["n"] += 1
        side.update(set(words))
        side["repeats a content word"] += len({*content}) < len(content)
    assert min(right["n"], wrong["n"]) > 300
    for feature in {*right, *wrong} - {"n"}:
        p, q = right[feature] / right["n"], wrong[feature] / wrong["n"]
        spread = (0.25 / right["n"] + 0.25 / wrong["n"]) ** 0.5
        assert abs(p - q) < 4.5 * spread, (feature, p, q)


@pytest.mark.parametrize("task", ["composition"])
def test_each_composition_kind_has_chance_at_one_half(world, task):
    for kind in COMPOSITION:
        questions = [q for q in json.loads((world[0] / "eval" / f"{task}.json").read_text()) if q["kind"] == kind]
        first = sum(q["answer"] == q["options"][0] for q in questions)
        assert first * 2 == len(questions) == 20


def test_questions_without_a_picture_follow_from_their_own_words():
    answers = Counter()
    for i in range(200):
        question = without_picture(Draws(i))
        given, asked = re.fullmatch(r"say the (.*)\. is the (.*)\?", question.text).groups()
        a, relation, b = re.fullmatch(rf"(\w+ \w+) is ({RELATION}) the (\w+ \w+)", given).groups()
        c, other, d = re.fullmatch(rf"(\w+ \w+) ({RELATION}) the (\w+ \w+)", asked).groups()
        assert (c, d) == (b, a)
        assert question.answer == ("no" if other == relation else "yes")
        answers[question.answer] += 1
    assert min(answers.values()) > 70


def test_more_objects_and_a_wider_grid_are_arguments(tmp_path):
    write_world(tmp_path, 3, 4, seed=1, n_objects=5, grid=5)
    with Image.open(tmp_path / "images" / "train_000000.png") as image:
        assert image.size == (60, 60)
