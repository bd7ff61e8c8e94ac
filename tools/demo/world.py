"""Writes the tiny world to disk: LLaVA JSON and PNG files for training, question files for evaluation.

    OUT/train.json  OUT/images/train_*.png                 conversations of several turns, and some without an image
    OUT/eval/{recognition,composition,localisation}.json   held-out scenes, for the table
    OUT/val/...                                            other held-out scenes, for tuning

Image paths are relative to OUT. Nothing here is special to cdist: the data goes through `cdist shards build`
and `cdist evaluate` like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from compodistill.errors import UsageError
from compodistill.tools.demo.questions import (
    COMPOSITION,
    LOCALISATION,
    RECOGNITION,
    Maker,
    Question,
    without_picture,
)
from compodistill.tools.demo.scenes import NUMBERS, SPLITS, Draws, Scene, draw_scenes, render

FAMILIES: dict[str, Mapping[str, Maker]] = {
    "recognition": RECOGNITION,
    "composition": COMPOSITION,
    "localisation": LOCALISATION,
}
TURNS = {"recognition": 2, "composition": 3, "localisation": 1}


def ask(scene: Scene, draws: Draws, turns: Mapping[str, int] = TURNS) -> list[Question]:
    """Questions for one conversation: of each family as many as `turns` says, in random order.

    Families that ask about two objects are left out of a scene with one.
    """
    questions: list[Question] = []
    for family, n in turns.items():
        if family == "composition" and len(scene.things) < 2:
            continue
        found = 0
        while found < n:
            kind = draws.pick(tuple(FAMILIES[family]))
            question = FAMILIES[family][kind](scene, draws, draws.coin())
            if question is not None:
                questions.append(question)
                found += 1
    return draws.sample(questions, len(questions))


def conversation(questions: list[Question], *, image: bool) -> list[dict[str, str]]:
    """The turns of a LLaVA record; the first carries the image mark."""
    turns = []
    for i, question in enumerate(questions):
        mark = "<image>\n" if image and i == 0 else ""
        turns.append({"from": "human", "value": mark + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def task_questions(task: str, scenes: list[Scene], draws: Draws, n: int) -> list[tuple[int, Question]]:
    """(index of the scene, question), each kind `n` times and its two answers equally often.

    Kind and scene are paired in turn, so that a scene seldom gives two questions of one kind.
    """
    out: list[tuple[int, Question]] = []
    for kind, maker in FAMILIES[task].items():
        asked, index = 0, 0
        while asked < n:
            question = maker(scenes[index % len(scenes)], draws, asked % 2 == 0)
            if question is not None:
                out.append((index % len(scenes), question))
                asked += 1
            elif index > 50 * (n + len(scenes)):
                raise UsageError(
                    f"these scenes have no question of kind {kind}",
                    remedy="scenes need two objects at least, and colours and shapes that are not all taken",
                )
            index += 1
    return out


def write_world(
    out: str | Path,
    n_train: int = 1000,
    n_eval: int = 200,
    seed: int = 0,
    *,
    n_val: int | None = None,
    n_objects: int = 3,
    grid: int = 4,
    turns: Mapping[str, int] = TURNS,
    text_only: float = 0.04,
) -> dict[str, int]:
    """Writes a world under `out` and returns how many records and questions each file has.

    Args:
        n_train: training scenes, one conversation each.
        n_eval: questions of *each kind* in the evaluation split, over as many scenes.
        seed: decides everything; other seeds give other scenes and questions of the same kind.
        n_val: the same for the validation split; half of `n_eval` unless given.
        n_objects: objects in a scene: more make composition harder.
        grid: cells along each side; the bundled teacher sees 4 x 4.
        turns: questions of each family in a training conversation.
        text_only: records without an image, as a fraction of `n_train`, on top of it.
    """
    most = min(grid * grid, len(NUMBERS) - 1)
    if not 2 <= n_objects <= most:
        raise UsageError(f"a scene cannot have {n_objects} objects", remedy=f"2 to {most} on this grid")
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    sizes = {"train": n_train, "eval": n_eval, "val": n_eval // 2 if n_val is None else n_val}
    scenes = {
        split: list(islice(draw_scenes(split, seed, i, n_objects=n_objects, grid=grid), sizes[split]))
        for i, split in enumerate(SPLITS)
    }
    training = {scene.identity for scene in scenes["train"]}
    held_out = {scene.identity for split in ("eval", "val") for scene in scenes[split]}
    assert not training & held_out, "a held-out scene is among the training scenes"
    for split in SPLITS:
        for i, scene in enumerate(scenes[split]):
            render(scene).save(out / _image(split, i))

    records = []
    for i, scene in enumerate(scenes["train"]):
        questions = ask(scene, Draws(seed, 10, i), turns)
        turns_ = conversation(questions, image=True)
        records.append({"id": f"scene{i:06d}", "image": _image("train", i), "conversations": turns_})
    for i in range(round(n_train * text_only)):
        draws = Draws(seed, 11, i)
        turns_ = conversation([without_picture(draws) for _ in range(3)], image=False)
        records.append({"id": f"words{i:06d}", "conversations": turns_})
    _write(out / "train.json", records)

    counts = {"train": len(records)}
    for split in ("eval", "val"):
        for j, task in enumerate(FAMILIES):
            found = task_questions(task, scenes[split], Draws(seed, 12, j, SPLITS.index(split)), sizes[split])
            _write(
                out / split / f"{task}.json",
                [
                    {
                        "id": f"{task}-{n:05d}",
                        "image": _image(split, i),
                        "question": question.text,
                        "options": list(question.options),
                        "answer": question.answer,
                        "kind": question.kind,
                    }
                    for n, (i, question) in enumerate(found)
                ],
            )
            counts[f"{split}/{task}"] = len(found)
    return counts


def _image(split: str, i: int) -> str:
    return f"images/{split}_{i:06d}.png"


def _write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
