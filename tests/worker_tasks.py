"""Tasks for tests of the cluster; Dask workers import them from here."""

import os
import signal
from pathlib import Path

from compodistill.errors import DataError


def note(folder: Path, item: int) -> int:
    """Leaves a trace of each call."""
    with (folder / str(item)).open("a") as f:
        f.write("x")
    return item


def fail_at_three(item: int) -> int:
    if item == 3:
        raise DataError("a bad shard", where=f"shard {item}", remedy="mend it")
    return item


def die_once_at_three(folder: Path, item: int) -> int:
    if item == 3 and not (folder / "3").exists():
        note(folder, item)
        os.kill(os.getpid(), signal.SIGKILL)
    return note(folder, item)


def die_always_at_three(folder: Path, item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return note(folder, item)
