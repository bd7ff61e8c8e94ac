"""Passes to interrupt: run in forked children of a server that has imported everything, so each starts at once."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny import sample, save_llava

OPTIONS = {"top_k": 4, "student_layers": 6}
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class World:
    """A teacher, shards, and the store an undisturbed pass of one process makes of them."""

    root: Path
    teacher: Path
    shards: list[Path]
    reference: Path


def make_world(root: Path, shard_of, n_shards: int = 3, per_shard: int = 3) -> World:
    root.mkdir(exist_ok=True)
    shards = []
    for s in range(n_shards):
        kinds = [("<image>what?", "a cat"), ("say it", "it"), ("<image>and<image>?", "in colour")]
        samples = [
            sample(f"{s}-{i}", ("user", kinds[i % 3][0]), ("assistant", f"{kinds[i % 3][1]} {i}"), seed=10 * s + i)
            for i in range(per_shard)
        ]
        shards.append(shard_of(samples, root / f"shard-{s}.tar"))
    world = World(root, save_llava(root / "teacher"), shards, root / "reference")
    assert run(world, world.reference) == 0
    return world


@dataclass(frozen=True)
class Crash:
    """Kill the process at the `nth` call of `function` ("module:Class.method"), before or after it."""

    function: str
    when: str = "before"
    nth: int = 1

    def arm(self) -> None:
        module, _, path = self.function.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), 0

        def deadly(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == self.nth and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls == self.nth and self.when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, deadly)


def start(world: World, store: Path, crash: Crash | None = None, log: Path | None = None, **changes):
    """A pass in a process of its own; `log` takes one JSON line for each event."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["compodistill.precompute.run", "tiny", "passes"])
    process = context.Process(target=_main, args=(world, store, crash, log, {**OPTIONS, **changes}))
    process.start()
    return process


def run(world: World, store: Path, crash: Crash | None = None, log: Path | None = None, **changes) -> int:
    """The same to its end; the exit code, negative for a signal."""
    process = start(world, store, crash, log, **changes)
    process.join()
    return process.exitcode


def _main(world: World, store: Path, crash: Crash | None, log: Path | None, changes: dict) -> None:
    import torch

    from compodistill.errors import CdistError
    from compodistill.precompute.run import PassOptions, Watcher, precompute

    torch.set_num_threads(1)
    if crash:
        crash.arm()

    def write(**facts) -> None:
        if log:
            with log.open("a") as f:
                f.write(json.dumps(facts) + "\n")

    class Log(Watcher):
        def planned(self, plan):
            write(event="planned", finished=len(plan.finished), todo=len(plan.todo))

        def sample(self, shard, tokens):
            write(event="sample", shard=shard.name)

        def shard(self, receipt):
            write(event="shard", shard=receipt.shard.name, was_finished=receipt.was_finished)

    limit = changes.pop("file_size_limit", None)
    shards: Sequence[Path] = changes.pop("shards", world.shards)
    try:
        if limit:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        precompute(shards, world.teacher, str(store), PassOptions(**changes), watcher=Log())
    except CdistError as error:
        write(event="error", kind=type(error).__name__, text=str(error))
        os._exit(error.exit_code)
    except BaseException:
        write(event="error", kind="fault", text=traceback.format_exc())
        os._exit(1)


def events(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path; of the manifest only what does not say who sealed it and when."""
    found = {p.relative_to(store).as_posix(): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    if MANIFEST in found:
        found[MANIFEST] = found[MANIFEST].split(b"\n")[0]
    return found


def directories(store: Path) -> set[str]:
    return {p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_dir()}


def assert_same_store(store: Path, reference: Path) -> None:
    """Byte-identical, and nothing more lies about."""
    ours, theirs = content(store), content(reference)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert directories(store) == directories(reference)


def published(store: Path) -> int:
    return len(list(store.glob("fragments/*/zarr.json")))


def half_built(store: Path) -> int:
    return len([p for p in store.glob(".building/*") if p.is_dir()])
