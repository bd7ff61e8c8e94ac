"""What commands print: tables, JSON, and progress that suits a terminal as well as a log file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

PLAIN_EVERY = 10.0  # seconds between two progress lines where there is no terminal


def print_json(value: Any) -> None:
    """One JSON object on stdout and nothing else there."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[Any]], *, title: str = "", header: Sequence[str] = ()) -> None:
    """A table on stdout; numbers are set to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_header=bool(header))
    for i in range(len(rows[0]) if rows else len(header)):
        numeric = all(isinstance(row[i], (int, float)) for row in rows)
        table.add_column(header[i] if header else "", justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, (int, float)) else str(cell) for cell in row))
    Console(highlight=False, markup=False).print(table)


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. On stderr: a bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
        return
    started = shown = time.monotonic()
    done = 0

    def advance_plainly(n: int = 1) -> None:
        nonlocal done, shown
        done += n
        now = time.monotonic()
        if now - shown >= PLAIN_EVERY:
            shown = now
            rate = done / (now - started)
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            click.echo(f"{label}: {done:,}{f' of {total:,}' if total else ''} ({rate:.1f}/s{left})", err=True)

    yield advance_plainly


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"), bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(n: int = 1) -> None:
            bar.advance(task, n)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:.1f}/s" if speed else "")

        yield advance


def human_bytes(count: int) -> str:
    """1536 -> '1.5 kB': decimal units, as disks and networks are sold."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError
