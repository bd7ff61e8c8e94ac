"""The whole pass against the bare forward passes in it, two workers against one, and the price of scheduling.

Measures, one CPU thread a worker, on a teacher around a real language model (benchmarks/real; 729 visual tokens, hidden
576) and photographs:

- pass_vs_forward: seconds of the tasks of all shards (hash, read, decode, tokenize, forward with capture, encode,
  write, verify) over seconds of plain SDPA forward passes over the same tokenized samples, logits at the supervised
  positions only. Rounds alternate; medians. `forward_again_vs_forward` is the A/A control.
- two_workers_speedup: samples per second of two Dask workers over those of one process, loading left out.
  `two_processes_ceiling` is what two unrelated processes doing bare forward passes reach on this machine.
- scheduling_ms_per_shard: 10,000 shards with a teacher that takes no time, on two workers; and how much the client's
  memory grows from the 1,000th to the last.

    python benchmarks/precompute.py [--json] [--full] [--only pass|workers|scheduling]
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from compodistill.models import VisionLanguageModel, load_model, logits_at
from compodistill.precompute.cluster import runner
from compodistill.precompute.options import ClusterOptions, PassOptions
from compodistill.precompute.plan import ShardTask, look_at_shard
from compodistill.precompute.signals import tokens_of_shard
from compodistill.precompute.teacher import Job, prepare, teacher_of
from compodistill.precompute.worker import Receipt, run_shard
from compodistill.store.spec import StoreSpec, TeacherInfo
from compodistill.tokens import Tokens, collate

REAL = Path(__file__).parent / "real"


def make_inputs(out: Path, n_samples: int, per_shard: int) -> tuple[Path, list[Path]]:
    """A teacher directory and shards."""
    sys.path.insert(0, str(REAL))
    from models import language_model, save_teacher

    from compodistill.tools.shards.build import build_shards
    from compodistill.tools.shards.source import read_llava

    model, tokenizer = language_model()
    save_teacher(out / "teacher", model, tokenizer)
    spec = find_spec("skimage")
    assert spec is not None, "scikit-image is not installed: pip install 'compodistill[bench]'"
    assert spec.origin is not None
    records = json.loads((REAL / "conversations.json").read_text())
    records = [r for r in records if isinstance(r.get("image"), str)]  # one image each: N about 760 to 1,000
    chosen = [{**records[i % len(records)], "id": f"s{i:04d}"} for i in range(n_samples)]
    (out / "records.json").write_text(json.dumps(chosen))
    found = read_llava(out / "records.json", Path(spec.origin).parent / "data")
    build_shards(found, out / "shards", samples_per_shard=per_shard)
    return out / "teacher", sorted((out / "shards").glob("*.tar"))


@torch.inference_mode()
def forward(teacher: VisionLanguageModel, tokens: list[Tokens]) -> None:
    """Plain forward passes, one a sample, as the pass makes them on the CPU."""
    for t in tokens:
        with logits_at(teacher.model, [t.supervised_positions - 1]):
            teacher.model(**collate([t], teacher.pad_token_id), use_cache=False)


def timed(function, *arguments) -> tuple[float, float]:
    """Wall and process seconds."""
    gc.collect()
    wall, process = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - wall, time.process_time() - process


def run_all(tasks: list[ShardTask], job: Job) -> None:
    for task in tasks:
        assert not run_shard(task, job).was_finished


def measure_pass(out: Path, teacher: Path, shards: list[Path], rounds: int) -> tuple[dict, dict]:
    tasks = [look_at_shard(s, "stop") for s in shards]
    ratios, figures = {}, {}
    for rows in ("all", "text"):
        options = PassOptions(student_layers=24, rows=rows)
        seconds: dict[str, list[tuple[float, float]]] = {"forward": [], "pass": [], "again": []}
        for i in range(rounds + 1):
            job = prepare(teacher, str(out / f"store-{rows}-{i}"), options)
            with teacher_of(job) as loaded:
                tokens = [t for s in shards for t in tokens_of_shard(loaded, s, options)]
                found = {"forward": timed(forward, loaded, tokens)}
                found["pass"] = timed(run_all, tasks, job)
                found["again"] = timed(forward, loaded, tokens)
            if i:  # the first round warms up
                for name, value in found.items():
                    seconds[name].append(value)
        suffix = "" if rows == "all" else f"_{rows}"
        for k, clock in enumerate(("", "_process_time")):
            bare = [min(f[k], a[k]) for f, a in zip(seconds["forward"], seconds["again"], strict=True)]
            whole = [p[k] for p in seconds["pass"]]
            ratios[f"pass_vs_forward{suffix}{clock}"] = statistics.median(
                w / b for w, b in zip(whole, bare, strict=True)
            )
            figures[f"forward_ms_per_sample{suffix}{clock}"] = 1e3 * statistics.median(bare) / len(tokens)
            figures[f"pass_ms_per_sample{suffix}{clock}"] = 1e3 * statistics.median(whole) / len(tokens)
        again = zip(seconds["again"], seconds["forward"], strict=True)
        ratios[f"forward_again_vs_forward{suffix}"] = statistics.median(a[0] / f[0] for a, f in again)
        figures["tokens_per_sample"] = statistics.mean(len(t.input_ids) for t in tokens)
    return ratios, figures


def _forward_alone(teacher: Path, shards: list[Path], ready, go, results) -> None:
    torch.set_num_threads(1)
    loaded = load_model(teacher)
    tokens = [t for s in shards for t in tokens_of_shard(loaded, s, PassOptions())]
    forward(loaded, tokens[:1])
    ready.release()
    go.wait()
    started = time.perf_counter()
    forward(loaded, tokens)
    results.put(len(tokens) / (time.perf_counter() - started))


def _processes(n: int, teacher: Path, shards: list[Path]) -> float:
    """Samples per second of n unrelated processes together."""
    context = multiprocessing.get_context("spawn")
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    found = [context.Process(target=_forward_alone, args=(teacher, shards, ready, go, results)) for _ in range(n)]
    for process in found:
        process.start()
    for _ in found:
        ready.acquire()
    go.set()
    total = sum(results.get() for _ in found)
    for process in found:
        process.join()
    return total


def measure_workers(out: Path, teacher: Path, shards: list[Path], rounds: int) -> tuple[dict, dict]:
    tasks = [look_at_shard(s, "stop") for s in shards]
    n = sum(t.n_samples for t in tasks)
    options = PassOptions(student_layers=24)
    speed: dict[int, list[float]] = {1: [], 2: []}
    with runner(ClusterOptions(workers=2), options) as two:
        for i in range(rounds):
            job = prepare(teacher, str(out / f"one-{i}"), options)
            wall, _ = timed(run_all, tasks, job)
            speed[1].append(n / wall)
            job = two.call(partial(prepare, teacher, str(out / f"two-{i}"), options))
            warm = [two.each(partial(_hold_teacher, job=job), range(4))]
            assert all(list(w) for w in warm)
            wall, _ = timed(lambda job=job: list(two.each(partial(run_shard, job=job), tasks)))
            speed[2].append(n / wall)
    one, both = (statistics.median(speed[k]) for k in (1, 2))
    ceiling = _processes(2, teacher, shards[:2]) / _processes(1, teacher, shards[:2])
    ratios = {"two_workers_speedup": both / one, "two_processes_ceiling": ceiling}
    return ratios, {"samples_per_s_one_worker": one, "samples_per_s_two_workers": both}


def _hold_teacher(_: int, job: Job) -> bool:
    with teacher_of(job):
        time.sleep(1)  # so that the next of these goes to the other worker
    return True


def instant(task: ShardTask, job: Job) -> Receipt:
    return Receipt(task.path, task.digest, 1000, 960_000, 64_000, 729_000, 10**9, 0.0)


def measure_scheduling(n: int = 10_000) -> tuple[dict, dict]:
    spec = StoreSpec(
        groups=[(i, i + 3) for i in range(8)],
        vocab_size=49_152,
        fingerprint={name: "0" * 64 for name in "abcdefghij"},
        teacher=TeacherInfo(name="instant"),
    )
    job = Job(Path("teacher"), "store", PassOptions(), spec)
    tasks = [ShardTask(Path(f"/data/shards/shard-{i:06d}.tar"), f"{i:064x}", 1000) for i in range(n)]
    with runner(ClusterOptions(workers=2), PassOptions()) as run:
        list(run.each(partial(instant, job=job), tasks[:100]))
        started, cpu, early = time.perf_counter(), time.process_time(), 0
        for i, _ in enumerate(run.each(partial(instant, job=job), tasks)):
            if i == n // 10:
                early = _resident()
        seconds, grown = time.perf_counter() - started, _resident() - early
        cpu = time.process_time() - cpu
    figures = {
        "client_and_scheduler_cpu_ms_per_shard": 1e3 * cpu / n,
        "client_growth_mib": grown / 2**20,
        "client_mib": _resident() / 2**20,
    }
    return {"scheduling_ms_per_shard": 1e3 * seconds / n}, figures


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--full", action="store_true", help="more samples and rounds")
    parser.add_argument("--only", choices=["pass", "workers", "scheduling"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 7 if arguments.full else 3
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        parts = []
        if arguments.only in (None, "scheduling"):
            parts.append(measure_scheduling)
        if arguments.only != "scheduling":
            n, per_shard = (48, 4) if arguments.full else (12, 2)
            teacher, shards = make_inputs(out, n, per_shard)
            if arguments.only in (None, "pass"):
                parts.append(lambda: measure_pass(out, teacher, shards[: 4 if arguments.full else 2], rounds))
            if arguments.only in (None, "workers"):
                parts.append(lambda: measure_workers(out, teacher, shards, rounds))
        for part in parts:
            more_ratios, more_figures = part()
            ratios |= more_ratios
            figures |= more_figures
            for name, value in {**more_ratios, **more_figures}.items():
                print(f"{name:45} {value:10.3f}", flush=True)
    if arguments.json:
        machine = {"cpus": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
        print(json.dumps({"name": "precompute", "ratios": ratios, "figures": figures, "machine": machine}))


if __name__ == "__main__":
    main()
