"""What the benchmarks share: paired timing, a summary of the machine, and the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options every benchmark takes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.add_argument("--full", action="store_true", help="more repetitions")
    return p


def paired(variants: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """CPU seconds of this process for each variant, A B C A B C ..., after one warm-up of each.

    Process time rather than wall time: a busy neighbour stretches the latter and hardly touches the former.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repetitions):
        for name, run in variants.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over the repetitions of the ratio within one repetition."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def peak_mib() -> float:
    """Peak resident memory of this process so far (Linux). Not getrusage's, which a child inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(name: str, ratios: dict[str, float], figures: dict[str, float], as_json: bool) -> None:
    """Print a table, and the JSON line where asked for."""
    for title, values in (("ratios", ratios), ("figures", figures)):
        if values:
            print(title)
        for key, value in values.items():
            print(f"  {key:32} {value:12.4g}")
    if as_json:
        print(json.dumps({"name": name, "ratios": ratios, "figures": figures, "machine": machine()}))
