"""`make real`: the main job on photographs and a real language model; prints speed, bytes and peak memory.

Pictures are those packaged in scikit-image, the conversations are in `conversations.json` beside this file. Every
step is the ordinary command in a process of its own, so the peak memory is that of the command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
STEPS, BATCH = 10, 2


def run(*arguments: str | Path) -> tuple[float, float]:
    """Run one cdist command; wall seconds and peak resident MiB. Stops the script where the command fails."""
    command = [sys.executable, "-m", "compodistill.tools.cli", *map(str, arguments)]
    print("$ cdist " + " ".join(map(str, arguments)), flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"the command failed with exit code {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("real-out"), help="emptied first")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    print("assembling teacher and student around SmolLM2-135M-Instruct", flush=True)
    # in a process of its own: a child's peak memory, as the system counts it, begins with that of its parent
    subprocess.run([sys.executable, HERE / "models.py", out], check=True)
    layers = json.loads((out / "student-llm/config.json").read_text())["num_hidden_layers"]

    spec = find_spec("skimage")
    assert spec is not None, "scikit-image is not installed: pip install 'compodistill[bench]'"
    assert spec.origin is not None
    images = Path(spec.origin).parent / "data"
    run("shards", "build", HERE / "conversations.json", "--images", images, "--out", out / "shards")
    shards = f"{out}/shards/*.tar"
    seconds, memory = run(
        *("precompute", "--shards", shards, "--teacher", out / "teacher", "--store", out / "store.zarr"),
        *("--student-layers", layers, "--batch-size", BATCH),
    )
    figures: dict[str, float] = {}
    samples = len(json.loads((HERE / "conversations.json").read_text()))
    stored = sum(f.stat().st_size for f in (out / "store.zarr" / "fragments").rglob("*") if f.is_file())
    figures["precompute_samples_per_s"] = samples / seconds
    figures["store_bytes_per_sample"] = stored / samples
    figures["precompute_peak_mib"] = memory
    settings = [f"stages.{s}.{k}" for s in ("dpt", "dft", "sft") for k in (f"max_steps={STEPS}", f"batch_size={BATCH}")]
    overrides = [part for setting in [*settings, "log_every=1"] for part in ("--set", setting)]
    shutil.move(out / "teacher", out / "teacher-out-of-reach")
    for stage in ("dpt", "dft", "sft"):
        seconds, memory = run(
            *("train", "--store", out / "store.zarr", "--shards", shards, "--student", out / "student-llm"),
            *("--out", out / "student", "--recipe", "compodistill", "--stage", stage, *overrides),
        )
        figures[f"{stage}_samples_per_s"] = STEPS * BATCH / seconds
        figures[f"{stage}_peak_mib"] = memory
    print()
    for name, value in figures.items():
        print(f"{name:28} {value:12,.2f}")
    print("samples/s count the whole process, start-up and model loading included")
    if options.json:
        print(json.dumps({"name": "real", "figures": figures}))


if __name__ == "__main__":
    main()
