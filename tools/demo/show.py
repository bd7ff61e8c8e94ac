"""The demonstration's results: a table on the terminal, and the same with pictures on a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from compodistill.models import VisionLanguageModel, load_model
from compodistill.samples import Sample
from compodistill.store.spec import versions
from compodistill.tools.demo.run import TASKS, Arm, Result, questions_as_samples
from compodistill.tools.diagnose.attention import paired_slices
from compodistill.tools.report import Scene, render_report

MINIATURE = (
    "This is a miniature: a teacher of half a million parameters on rendered scenes, students trained for minutes, one "
    "seed. It shows that the machinery works end to end. Differences of a few points are noise, and nothing here says "
    "how a real model will do."
)
TITLES = {"teacher": "Teacher", "sft": "SFT", "logit-kd": "Logit KD", "compodistill": "CompoDistill"}
N_SCENES = 5


def cells(result: Result, arm: Arm) -> dict[str, tuple[str, float | None]]:
    """A row of the table: column -> (text, value)."""
    uses_store = arm.name not in ("teacher", "sft")  # plain fine-tuning reads none of the signals
    row: dict[str, tuple[str, float | None]] = {
        task: (f"{100 * arm.scores[task]:.1f} %", arm.scores[task]) for task in TASKS
    }
    row["attention similarity"] = (f"{arm.similarity:.3f}", arm.similarity)
    size = result.store_bytes if uses_store else None
    row["store, bytes a sample"] = ("–" if size is None else f"{size:,.0f}", size)
    row["training time"] = ("–" if arm.seconds is None else f"{arm.seconds:.0f} s", arm.seconds)
    return row


def print_table(result: Result, minutes: float) -> None:
    """The table on standard output."""
    console = Console(width=100, highlight=False)
    table = Table(title="What the students learnt", title_style="bold")
    table.add_column("model")
    rows = [cells(result, arm) for arm in result.arms]
    for name in rows[0]:
        table.add_column(name, justify="right")
    for arm, row in zip(result.arms, rows, strict=True):
        table.add_row(TITLES.get(arm.name, arm.name), *(text for text, _ in row.values()))
    console.print()
    console.print(table)
    console.print(MINIATURE)
    console.print(f"{minutes:.1f} minutes in all.")


def write_report(path: Path, out: Path, result: Result, minutes: float) -> None:
    """The page: table, loss curves, attention overlays of a few held-out scenes, facts."""
    torch.set_num_threads(1)
    plan = result.plan
    starts = dict(zip(plan.steps, np.cumsum([0, *plan.steps.values()]).tolist(), strict=False))
    render_report(
        path,
        "cdist demo: a teacher distilled through a store",
        [{"model": TITLES.get(a.name, a.name), **cells(result, a)} for a in result.arms],
        {TITLES.get(arm, arm): loss_curve(out / "students" / arm, starts) for arm in plan.arms},
        overlays(out, plan.arms),
        {
            "training scenes": plan.scenes,
            "questions of each kind": plan.questions,
            "steps": ", ".join(f"{stage} {n}" for stage, n in plan.steps.items()),
            "batch size": plan.batch_size,
            "seed": plan.seed,
            "minutes in all": round(minutes, 1),
            **versions(),
        },
        note=MINIATURE,
        stages=starts,
        curves_label="language-model loss (nats)",
        captions={
            "table": "Accuracy on held-out scenes; chance is 50 % on composition. Attention similarity is the mean "
            "cosine of teacher's and student's visual attention in the understanding layers.",
            "curves": "Loss of the answers' tokens during training, the one term all recipes share.",
            "overlays": "Where the model looks while it answers: attention of the answering position to the image, "
            "mean over the understanding layers, each map scaled to its own maximum; the cosine is that of a "
            "student's map with the teacher's.",
        },
    )


def loss_curve(student: Path, starts: dict[str, int]) -> list[tuple[float, float]]:
    """(step over all stages, language-model loss) from the stages' logs."""
    points = []
    for stage, start in starts.items():
        log = json.loads((student / stage / "training_log.json").read_text())
        points += [(start + h["step"], h["lm"]) for h in log["history"] if "lm" in h]
    return points


def overlays(out: Path, arms: Sequence[str]) -> list[Scene]:
    """A few held-out composition questions: teacher's and students' attention, and what each answered."""
    samples = questions_as_samples(out / "world", "composition", N_SCENES)
    teacher = load_model(out / "teacher")
    students = {arm: load_model(out / "students" / arm / "sft") for arm in arms}
    answers = {name: _predictions(out / "evaluation" / name / "composition.jsonl") for name in ("teacher", *arms)}
    scenes = []
    for sample in samples:
        maps = {arm: _maps(teacher, student, sample) for arm, student in students.items()}
        scenes.append(
            Scene(
                sample.images[0],
                str(sample.turns[0].parts[-1]),
                maps[arms[0]][0],
                {TITLES.get(arm, arm): ours for arm, (_, ours) in maps.items()},
                answer=str(sample.turns[1].parts[0]),
                answers={
                    ("teacher" if name == "teacher" else TITLES.get(name, name)): said[sample.key]
                    for name, said in answers.items()
                },
            )
        )
    return scenes


def _maps(teacher: VisionLanguageModel, student: VisionLanguageModel, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the position that predicts the answer's first token over the square grid of patches."""
    ((theirs_kQV, ours_kQV),) = paired_slices(teacher, student, [sample], rows="answer")
    side = round(theirs_kQV.shape[-1] ** 0.5)
    first = (m[:, 0].mean(0).reshape(side, side).numpy() for m in (theirs_kQV, ours_kQV))
    return next(first), next(first)


def _predictions(verdicts: Path) -> dict[str, str]:
    return {v["id"]: v["prediction"] for v in map(json.loads, verdicts.read_text().splitlines())}
