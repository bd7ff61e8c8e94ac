"""Progress of long work: a bar on a terminal, plain lines elsewhere (both on stderr)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Counts samples and tokens and shows how fast they go by."""

    def __init__(self, what: str, total: int, unit: str, bar: Progress | None) -> None:
        self._what, self._total, self._unit, self._bar = what, total, unit, bar
        self._start = self._last = time.monotonic()
        self._done = self._tokens = 0
        self._task = None if bar is None else bar.add_task(what, total=total, rate="")

    def advance(self, n: int = 1, tokens: int = 0, note: str = "") -> None:
        """Count `n` more units (and the tokens in them)."""
        self._done += n
        self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rate = f"{self._done / seconds:,.1f} {self._unit}/s"
        if self._tokens:
            rate += f", {self._tokens / seconds:,.0f} tokens/s"
        if note:
            rate += f", {note}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif now - self._last > SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last = now
            print(f"{self._what}: {self._done}/{self._total} {self._unit}, {rate}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Meter]:
    """A meter for `total` units of work."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(what, total, unit, None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(what, total, unit, bar)
