"""What an evaluation found: a verdict for each question, accuracies overall and per kind, files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Verdict:
    """One question, how each option scored (natural log, summed over the option's tokens), and the outcome."""

    id: str
    kind: str
    image: str | None
    prompt: str
    options: tuple[str, ...]
    scores: tuple[float, ...]
    answer: str
    prediction: str
    correct: bool


def _accuracy(verdicts: Iterable[Verdict]) -> dict[str, float | int]:
    marks = [v.correct for v in verdicts]
    accuracy = sum(marks) / len(marks)
    return {
        "n": len(marks),
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / len(marks)),
    }


@dataclass(frozen=True)
class TaskResult:
    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def accuracy(self) -> float:
        return float(_accuracy(self.verdicts)["accuracy"])

    @property
    def kinds(self) -> dict[str, float]:
        """Accuracy of each kind, in order of first appearance."""
        return {k: float(v["accuracy"]) for k, v in self.summary()["kinds"].items()}

    def summary(self) -> dict:
        """`{"task", "n", "accuracy", "stderr", "kinds": {kind: {"n", "accuracy", "stderr"}}}`.

        `stderr` takes questions as independent; several questions about one image are not quite.
        """
        kinds = dict.fromkeys(v.kind for v in self.verdicts)
        each = {kind: _accuracy(v for v in self.verdicts if v.kind == kind) for kind in kinds}
        return {"task": self.name, **_accuracy(self.verdicts), "kinds": each}

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Writes `NAME.jsonl` (one verdict a line) and `NAME.summary.json`; returns the two paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines, summary = folder / f"{self.name}.jsonl", folder / f"{self.name}.summary.json"
        lines.write_text(
            "".join(json.dumps(asdict(v), ensure_ascii=False) + "\n" for v in self.verdicts), encoding="utf-8"
        )
        summary.write_text(json.dumps(self.summary(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return lines, summary
