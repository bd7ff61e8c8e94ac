"""The page itself: figures to data addresses, values to cells, everything into one file."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from compodistill.errors import UsageError
from compodistill.tools.report import figures
from compodistill.tools.report.figures import Points

Number = int | float | None
Value = str | Number | tuple[str, Number]  # a pair is the text to show and the number it stands for

CAPTIONS = {
    "table": "",
    "curves": "",
    "overlays": "Each square is one visual token. Every map is scaled to its own maximum; the cosine is that of a "
    "student's map with the teacher's.",
}


@dataclass(frozen=True)
class Scene:
    """One image with a question, and where the models look in it.

    Attributes:
        teacher: (H, W) attention over the grid of visual tokens, not negative, any scale.
        students: by name, each on a grid of the teacher's shape.
        answers: by name (the teacher's under "teacher"), what each answered; may be empty.
    """

    image: Image.Image
    question: str
    teacher: np.ndarray
    students: Mapping[str, np.ndarray]
    answer: str = ""
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A table's cell: the text shown, and the exact value to sort by."""

    text: str
    exact: str
    numeric: bool


def render_report(
    path: Path,
    title: str,
    rows: Sequence[Mapping[str, Value]],
    curves: Mapping[str, Points],
    scenes: Sequence[Scene],
    facts: Mapping[str, Value],
    *,
    note: str = "",
    stages: Mapping[str, float] | None = None,
    curves_label: str = "loss",
    captions: Mapping[str, str] | None = None,
) -> None:
    """Writes a self-contained HTML page to `path`, whole or not at all.

    Args:
        rows: the table, one mapping from column title to value for each row; the first row gives the columns. A
            number is shown with three decimals, a pair `("98.1 %", 0.981)` as its text.
        curves: training curves, arm -> (step, value) pairs; none leaves the section out.
        scenes: overlays; none leaves the section out.
        facts: name -> value, listed at the end (seeds, sizes, versions, times).
        note: what a reader must know before the figures, such as that this is a miniature.
        stages: name -> step at which a stage begins, marked in the curves.
        curves_label: what the curves' values are.
        captions: texts under the headings "table", "curves", "overlays".

    Raises:
        UsageError: matplotlib (the extra `report`) is missing, or the page cannot be written.
    """
    figures.require_matplotlib()
    columns = list(rows[0]) if rows else []
    html = _template().render(
        title=title,
        note=note,
        columns=columns,
        rows=[[_cell(row.get(column)) for column in columns] for row in rows],
        curves={
            theme: _data(figures.curves_png(curves, stages or {}, label=curves_label, theme=theme))
            for theme in figures.THEMES
        }
        if curves
        else None,
        curves_alt=_curves_alt(curves, curves_label),
        curves_label=curves_label,
        scenes=[_scene(scene) for scene in scenes],
        gradient=figures.heat_gradient(),
        facts={name: _cell(value).text for name, value in facts.items()},
        captions={**CAPTIONS, **(captions or {})},
    )
    _publish(path, html)


def _scene(scene: Scene) -> dict[str, object]:
    views = []
    for name, attention_HW in {"teacher": scene.teacher, **scene.students}.items():
        cosine = None if name == "teacher" else _cosine(scene.teacher, attention_HW)
        views.append(
            {
                "name": name,
                "src": _data(figures.overlay_png(scene.image, attention_HW)),
                "alt": f"Where {'the teacher' if name == 'teacher' else name} looks; {_brightest(attention_HW)}",
                "cosine": cosine,
                "answer": scene.answers.get(name, ""),
            }
        )
    return {
        "question": scene.question, "answer": scene.answer, "src": _data(figures.image_png(scene.image)), "views": views
    }  # fmt: skip


def _cosine(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    if a_HW.shape != b_HW.shape:
        raise ValueError(f"attention of {b_HW.shape} beside the teacher's {a_HW.shape}")
    norms = float(np.linalg.norm(a_HW) * np.linalg.norm(b_HW))
    return float((a_HW * b_HW).sum()) / norms if norms else 0.0


def _brightest(attention_HW: np.ndarray) -> str:
    row, column = np.unravel_index(int(np.argmax(attention_HW)), attention_HW.shape)
    height, width = attention_HW.shape
    return f"most at row {row + 1} of {height}, column {column + 1} of {width}"


def _curves_alt(curves: Mapping[str, Points], label: str) -> str:
    ends = [f"{name} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for name, p in curves.items() if p]
    return f"Line chart of {label} over training steps: {'; '.join(ends)}."


def _cell(value: Value) -> Cell:
    if isinstance(value, tuple):
        text, number = value
        return Cell(text, "" if number is None else repr(number), True)
    if value is None:
        return Cell("–", "", True)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Cell(str(value), str(value), False)
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return Cell(text, repr(value), True)


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _template() -> jinja2.Template:
    source = files("compodistill.tools.report").joinpath("templates", "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _publish(path: Path, html: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"the report cannot be written: {error.strerror}", where=str(path)) from error
