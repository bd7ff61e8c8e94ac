"""Progress of long work: a bar on a terminal, plain lines elsewhere (both on stderr), JSON lines in a file."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from compodistill.errors import UsageError
from compodistill.tools.console import human_bytes

SECONDS_BETWEEN_LINES = 10.0

Log = Callable[[str, dict[str, Any]], None]


class Meter:
    """Counts units (and what is in them) and shows how fast they go by and how long the rest will take."""

    def __init__(self, what: str, total: int, unit: str, bar: Progress | None, log: Log | None = None) -> None:
        self._what, self._total, self._unit, self._bar, self._log = what, total, unit, bar, log
        self._start = self._last = time.monotonic()
        self._done = self._before = self._tokens = self._bytes = self._failures = 0
        self._note = ""
        self._task = None if bar is None else bar.add_task(what, total=total, rate="")

    def advance(self, n: int = 1, tokens: int = 0, note: str = "") -> None:
        """Count `n` more units (and the tokens in them)."""
        self._done += n
        self._tokens += tokens
        self._note = note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=self.line())
        if time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self.report()

    def found_done(self, n: int, note: str = "") -> None:
        """Count `n` units that were done before: they say nothing about the speed."""
        self._before += n
        self.advance(n, note=note)

    def add(self, *, n_bytes: int = 0, failures: int = 0) -> None:
        """Count bytes written and units that failed."""
        self._bytes += n_bytes
        self._failures += failures

    def facts(self) -> dict[str, Any]:
        """Counts and rates so far."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._before) / seconds
        return {
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "per_second": round(rate, 3),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "bytes": self._bytes,
            "failures": self._failures,
            "seconds_left": round((self._total - self._done) / rate) if rate else None,
        }

    def line(self) -> str:
        """The same for people."""
        f = self.facts()
        parts = [f"{f['per_second']:,.1f} {self._unit}/s"]
        if self._tokens:
            parts.append(f"{f['tokens_per_second']:,.0f} tokens/s")
        if self._bytes:
            parts.append(human_bytes(self._bytes))
        if f["seconds_left"]:
            parts.append(f"{datetime.timedelta(seconds=f['seconds_left'])} left")
        if self._failures:
            parts.append(f"{self._failures} failed")
        return ", ".join([*parts, self._note] if self._note else parts)

    def report(self) -> None:
        """The line and the log's entry, now."""
        self._last = time.monotonic()
        if self._log is not None:
            self._log("progress", {"what": self._what, **self.facts()})
        if self._bar is None:
            text = f"{self._what}: {self._done}/{self._total} {self._unit}, {self.line()}"
            print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, unit: str, log: Log | None = None) -> Iterator[Meter]:
    """A meter for `total` units of work; its last line is written when the block ends well."""
    console = Console(stderr=True)
    with ExitStack() as stack:
        bar = None
        if console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            bar = stack.enter_context(Progress(*columns, console=console))
        meter = Meter(what, total, unit, bar, log)
        yield meter
        meter.report()


@contextmanager
def json_lines(path: Path | None) -> Iterator[Log]:
    """A function that appends one JSON object a line, each with the time and its kind of event; None keeps none.

    Raises:
        UsageError: the file cannot be written.
    """
    with ExitStack() as stack:
        try:
            file = None if path is None else stack.enter_context(path.open("a", encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"the log cannot be written: {error.strerror}", where=str(path)) from error

        def log(event: str, facts: dict[str, Any]) -> None:
            if file is not None:
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                file.write(json.dumps({"time": now, "event": event, **facts}, ensure_ascii=False) + "\n")
                file.flush()

        yield log
