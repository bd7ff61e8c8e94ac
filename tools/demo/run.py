"""The whole story on the bundled tiny world: world, shards, store, three students, evaluation, a table and a page.

Every step is the ordinary command, run as a process of its own and printed as a user would type it. The teacher is
copied into the output directory and taken away again before the first student is trained.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

from compodistill.errors import CdistError
from compodistill.samples import Sample, Turn

TASKS = ("recognition", "composition")


@dataclass(frozen=True)
class Plan:
    """Sizes of the demonstration.

    Attributes:
        scenes: training scenes.
        questions: evaluation questions of each kind.
        steps: training steps of each stage.
        arms: recipes, one student each.
    """

    scenes: int = 1000
    questions: int = 60
    steps: dict[str, int] = field(default_factory=lambda: {"dpt": 50, "dft": 400, "sft": 100})
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0
    arms: tuple[str, ...] = ("sft", "logit-kd", "compodistill")

    def overrides(self) -> list[str]:
        """The `--set` options that fit the paper's recipes to a model of this size."""
        out = [f"seed={self.seed}", f"log_every={max(1, sum(self.steps.values()) // 40)}"]
        for stage, steps in self.steps.items():
            rate = self.learning_rate / (4 if stage == "sft" else 1)
            out += [f"stages.{stage}.{k}" for k in (f"max_steps={steps}", f"batch_size={self.batch_size}")]
            out.append(f"stages.{stage}.learning_rate={rate}")
        return out


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    scores: dict[str, float]
    similarity: float
    seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """What came out: the teacher's row first, then one an arm; bytes per sample of the store's signals."""

    arms: list[Arm]
    store_bytes: float
    plan: Plan


class CommandFailedError(CdistError):
    """A step of the demonstration failed."""


def cdist(*arguments: str | Path, log: Path | None = None, shown: bool = True) -> str:
    """Run one command in a process of its own, one thread each; its standard output.

    Raises:
        CommandFailedError: with what the command said.
    """
    words = [str(a) for a in arguments]
    if shown:
        print(
            "$ cdist " + " ".join(w if w.isprintable() and " " not in w and "*" not in w else f"'{w}'" for w in words)
        )
        sys.stdout.flush()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "compodistill.tools.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if log is not None:
        log.write_text(done.stderr)
    if done.returncode != 0:
        raise CommandFailedError(
            f"a step of the demonstration failed: {done.stderr.strip()[-2000:]}", where="cdist " + " ".join(words)
        )
    return done.stdout


def prepare(out: Path, plan: Plan) -> Path:
    """World, shards and store under `out`; the teacher's copy. Returns the student's language model directory."""
    from compodistill.tools.demo.world import write_world

    counts = write_world(out / "world", plan.scenes, plan.questions, plan.seed)
    print(f"a world of {counts['train']} conversations in {out / 'world'}")
    with as_file(files("compodistill.tools.demo") / "teacher") as bundled:
        shutil.copytree(bundled, out / "teacher", ignore=shutil.ignore_patterns("training_log.json"))
    with as_file(files("compodistill.tools.demo") / "student") as bundled:
        shutil.copytree(bundled, out / "student-llm")
    print(
        cdist("shards", "build", out / "world/train.json", "--images", out / "world", "--out", out / "shards"), end=""
    )
    layers = json.loads((out / "student-llm/config.json").read_text())["num_hidden_layers"]
    shards = f"{out}/shards/*.tar"
    store = out / "store.zarr"
    print(
        cdist(
            *("precompute", "--shards", shards, "--teacher", out / "teacher", "--store", store),
            *("--student-layers", layers, "--batch-size", "32"),
        ),
        end="",
    )
    return out / "student-llm"


def train_students(out: Path, plan: Plan, llm: Path) -> dict[str, float]:
    """Train one student an arm, as many at once as there are cores; seconds of each."""
    common: list[str | Path] = ["--store", out / "store.zarr", "--shards", f"{out}/shards/*.tar", "--student", llm]
    settings = [part for setting in plan.overrides() for part in ("--set", setting)]
    (out / "students").mkdir()
    (out / "logs").mkdir()

    def one(arm: str) -> float:
        start = time.monotonic()
        where = out / "students" / arm
        cdist(
            "train", *common, "--recipe", arm, "--out", where, *settings, log=out / "logs" / f"{arm}.txt", shown=False
        )
        return time.monotonic() - start

    for arm in plan.arms:
        print(f"$ cdist train {shlex.join(map(str, common))} --recipe {arm} --out {out / 'students' / arm} --set ...")
    sys.stdout.flush()
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        longest_first = plan.arms[::-1]
        return dict(zip(longest_first, pool.map(one, longest_first), strict=True))


def evaluate(out: Path, name: str, model: Path) -> dict[str, float]:
    """Accuracy of each task, by `cdist evaluate`; the verdicts stay in `out/evaluation/NAME`."""
    tasks = [part for t in TASKS for part in ("--task", f"{t}={out / 'world/eval' / t}.json")]
    printed = cdist("evaluate", "--model", model, *tasks, "--out", out / "evaluation" / name, "--json")
    results = json.loads(printed)
    return {t: results["tasks"][t]["accuracy"] for t in TASKS}


def run_demo(out: Path, plan: Plan) -> Result:
    """Run everything under `out`.

    Raises:
        CommandFailedError: a step failed.
    """
    llm = prepare(out, plan)
    teacher_scores = evaluate(out, "teacher", out / "teacher")
    hidden = out / ".teacher-out-of-reach"
    (out / "teacher").rename(hidden)
    print("the teacher's checkpoint is out of reach from here on")
    try:
        seconds = train_students(out, plan, llm)
    finally:
        hidden.rename(out / "teacher")
    arms = [Arm("teacher", teacher_scores, 1.0)]
    for name in plan.arms:
        model = out / "students" / name / "sft"
        arms.append(Arm(name, evaluate(out, name, model), similarity(out, model), seconds[name]))
    return Result(arms, store_bytes(out / "store.zarr"), plan)


def similarity(out: Path, model: Path, n: int = 100) -> float:
    """Attention similarity of a student with the teacher on held-out composition questions."""
    import torch

    from compodistill.models import load_model
    from compodistill.tools.diagnose.attention import attention_similarity

    torch.set_num_threads(1)
    samples = questions_as_samples(out / "world", "composition", n)
    return attention_similarity(load_model(out / "teacher"), load_model(model), samples)


def store_bytes(store: Path) -> float:
    """Bytes per sample of the store's signals."""
    from compodistill.store.reader import open_store

    info = open_store(store).info
    return info.n_bytes / info.n_samples


def questions_as_samples(world: Path, task: str, n: int) -> list[Sample]:
    """Evaluation questions with their right answers as conversations."""
    questions = json.loads((world / "eval" / f"{task}.json").read_text())
    step = max(len(questions) // n - 1, 1)  # spread over all kinds, and over the scenes, which recur in each kind
    out = []
    for q in questions[::step][:n]:
        with Image.open(world / q["image"]) as image:
            turns = (Turn("user", (None, q["question"])), Turn("assistant", (q["answer"],)))
            out.append(Sample(q["id"], turns, (image.convert("RGB"),)))
    return out
