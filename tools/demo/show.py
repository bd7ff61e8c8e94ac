"""The demonstration's results: a table on the terminal, and the same with pictures on a page."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from compodistill.tools.demo.run import TASKS, Result

MINIATURE = (
    "A miniature: a teacher of 0.5M parameters on rendered scenes, students trained for minutes, one seed. It shows "
    "that the machinery works end to end; differences of a few points are noise, and nothing here says how a real "
    "model will do."
)
TITLES = {"teacher": "Teacher", "sft": "SFT", "logit-kd": "Logit KD", "compodistill": "CompoDistill"}
COLUMNS = ("recognition", "composition", "attention similarity", "store bytes/sample", "training time")


def rows(result: Result) -> list[list[str]]:
    """The table's cells as text, one row an arm."""
    out = []
    for arm in result.arms:
        # plain fine-tuning reads nothing from the cache but the vision side
        size = "–" if arm.name in ("teacher", "sft") else f"{result.store_bytes:,.0f}"
        seconds = "–" if arm.seconds is None else f"{arm.seconds:.0f} s"
        scores = [f"{100 * arm.scores[t]:.1f} %" for t in TASKS]
        out.append([TITLES.get(arm.name, arm.name), *scores, f"{arm.similarity:.3f}", size, seconds])
    return out


def print_table(result: Result, minutes: float) -> None:
    """The table on standard output."""
    console = Console(width=100)
    table = Table(title="What the student learnt", title_style="bold", caption=MINIATURE, caption_justify="left")
    table.add_column("model")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows(result):
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(f"{minutes:.1f} minutes in all")
