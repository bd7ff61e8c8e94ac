"""A small world to train in: shards with every kind of sample, a store of every layer, language models."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from tiny import sample, samples, save_llava, text_config
from transformers import LlamaForCausalLM

from compodistill.precompute.run import PassOptions, precompute
from compodistill.samples import Sample

QUICK = ["stages.{stage}.max_steps=6", "stages.{stage}.batch_size=8", "log_every=1", "report_to=[]"]


def conversations() -> list[Sample]:
    """22 samples of unequal lengths; among them some without images."""
    more = [
        sample(f"more-{i}", ("user", f"{'<image>' * (i % 3 > 0)}no {i}?"), ("assistant", "yes " * (i % 4 + 1)), seed=i)
        for i in range(16)
    ]
    return [*samples(), *more]


def build(root: Path, shard_of: Callable[[Sequence[Sample], Path], Path], depths: Sequence[int] = (4,)) -> None:
    """Shards a, b, c; `store` (per layer, lossless); `llm-DEPTH`."""
    made = conversations()
    shards = [shard_of(made[i : i + 9], root / f"{n}.tar") for n, i in (("a", 0), ("b", 9), ("c", 18))]
    for depth in depths:
        LlamaForCausalLM(text_config(depth, 16)).save_pretrained(root / f"llm-{depth}")
    teacher = save_llava(root / "teacher")
    precompute(shards, teacher, str(root / "store"), PassOptions(codec="lossless", top_k=8))


def quick(*more: str, stages: Sequence[str] = ("dft",)) -> list[str]:
    """Overrides for a short run."""
    return [line.format(stage=s) for line in QUICK for s in stages] + list(more)


def command(root: Path, out: Path, *more: str, settings: Sequence[str] = (), **changes: Path) -> list[str]:
    """Options of `cdist train` in the world; `changes` replaces store, shards or student."""
    options = {"store": root / "store", "shards": root / "*.tar", "student": root / "llm-4", "out": out, **changes}
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    values = [part for setting in settings for part in ("--set", setting)]
    return [*words, "--recipe", str(only_dft(root)), *values, *more]


def only_dft(root: Path) -> Path:
    """A recipe whose one stage has all three losses."""
    path = root / "only-dft.yaml"
    stage = "{train: [adapter, llm], losses: {lm: 1.0, kl: 0.7, attention: 1.3}, learning_rate: 0.01}"
    path.write_text(f"name: only-dft\nadapter: fetched\nstages:\n  dft: {stage}\n")
    return path


def launch(arguments: Sequence[str], ranks: int = 1, prelude: str = "", check: bool = True) -> SimpleNamespace:
    """Run `cdist train` in one process a rank, as torchrun does, after a few lines of Python.

    Returns:
        `codes`, exit codes by rank, and `errors`, their stderr.
    """
    script = f"import sys, torch\ntorch.set_num_threads(1)\n{prelude}\nfrom compodistill.tools.cli import main\n"
    script += f"sys.argv = {['cdist', 'train', *arguments]!r}\nmain()\n"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=common | group | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        errors = [p.communicate(timeout=300)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    codes = [p.returncode for p in processes]
    assert not check or not any(codes), "\n".join(errors)
    return SimpleNamespace(codes=codes, errors=errors)


def history(stage: Path) -> list[dict[str, float]]:
    """The log of a stage without what is measured by the clock."""
    lines = json.loads((stage / "training_log.json").read_text())["history"]
    return [{k: v for k, v in line.items() if k != "data_wait_fraction"} for line in lines]
