"""The teacher's pass as the command line shows it: progress while it runs, the plan before it does."""

from __future__ import annotations

import datetime
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compodistill.precompute.options import ClusterOptions, PassOptions
from compodistill.precompute.plan import Plan, ShardTask
from compodistill.precompute.run import Watcher, precompute
from compodistill.precompute.worker import Receipt
from compodistill.store.reader import open_store
from compodistill.tools.console import human_bytes, print_json, print_table
from compodistill.tools.progress import Log, Meter, json_lines, progress

SHOWN_SKIPPED = 10


class PassProgress(Watcher):
    """Shows a pass on the terminal and logs it."""

    def __init__(self, stack: ExitStack, n_shards: int, log: Log) -> None:
        self._stack, self._log = stack, log
        self._meter: Meter = stack.enter_context(progress("reading shards", n_shards, "shards"))
        self._counts: dict[Path, int] = {}
        self._seen: dict[Path, int] = {}
        self.skipped: list[tuple[Path, str, str]] = []
        self.n_skipped = 0

    def looked(self, shard: ShardTask) -> None:
        self._meter.advance(note=shard.path.name)

    def planned(self, plan: Plan) -> None:
        self._stack.close()  # the first bar makes room for the second
        self._counts = {s.path: s.n_samples for s in plan.shards}
        self._meter = self._stack.enter_context(progress("precompute", plan.n_samples, "samples", self._log))
        finished = sum(s.n_samples for s in plan.shards if s.digest in plan.finished)
        self._log("plan", {"shards": len(plan.shards), "finished": len(plan.finished), "samples": plan.n_samples})
        if finished:
            self._meter.found_done(finished, f"{len(plan.finished)} of {len(plan.shards)} shards were finished")

    def sample(self, shard: Path, tokens: int) -> None:
        self._seen[shard] = self._seen.get(shard, 0) + 1
        self._meter.advance(1, tokens, shard.name)

    def shard(self, receipt: Receipt) -> None:
        self._log("shard", {**asdict(receipt), "shard": str(receipt.shard)})
        count = self._counts[receipt.shard]
        if receipt.was_finished:
            self._meter.found_done(count, f"{receipt.shard.name} was finished")
            return
        seen = self._seen.pop(receipt.shard, 0)
        self._meter.add(n_bytes=receipt.n_bytes, failures=len(receipt.skipped))
        self._meter.advance(count - seen, 0 if seen else receipt.tokens, receipt.shard.name)
        self.n_skipped += len(receipt.skipped)
        room = SHOWN_SKIPPED - len(self.skipped)
        self.skipped += [(receipt.shard, s.key, s.reason) for s in receipt.skipped[:room]]


def run(
    shards: list[Path],
    teacher: Path,
    store: str,
    options: PassOptions,
    cluster: ClusterOptions,
    log_json: Path | None,
    as_json: bool,
) -> None:
    """Run the pass and say what came out."""
    with json_lines(log_json) as log, ExitStack() as stack:
        watcher = PassProgress(stack, len(shards), log)
        plan = precompute(shards, teacher, store, options, cluster, watcher)
        stack.close()  # the bar's last line
        info = open_store(store).info
        facts: dict[str, Any] = {
            "store": store,
            "content_sha256": info.content_sha256,
            "samples": info.n_samples,
            "fragments": info.n_fragments,
            "bytes": info.n_bytes,
            "bytes_per_sample": round(info.n_bytes / info.n_samples),
            "shards": len(plan.shards),
            "skipped": watcher.n_skipped,
        }
        log("sealed", facts)
    if as_json:
        print_json(facts)
        return
    for shard, key, reason in watcher.skipped:
        click.echo(f"skipped: {shard}, {f'key {key}' if key else 'the rest of the archive'}: {reason}", err=True)
    if watcher.n_skipped:
        click.echo(f"{watcher.n_skipped} samples were skipped; the store lists them", err=True)
    size = info.n_bytes / info.n_samples
    click.echo(f"{store}: sealed, {info.n_samples} samples in {info.n_fragments} fragments, {size:,.0f} bytes a sample")


def estimate(
    shards: list[Path],
    teacher: Path,
    store: str,
    options: PassOptions,
    workers: int,
    n: int,
    as_json: bool,
) -> None:
    """Print what a pass would take."""
    from compodistill.precompute.estimate import estimate_pass

    with ExitStack() as stack:
        looked = stack.enter_context(progress("reading shards", len(shards), "shards"))
        found = estimate_pass(shards, teacher, store, options, n, on_shard=lambda: looked.advance())
    facts = found.facts(workers)
    if as_json:
        print_json(facts)
        return
    shown: list[list[Any]] = [
        ["shards", f"{found.n_shards:,}"],
        ["samples", f"{found.n_samples:,}"],
        ["measured on", f"{found.n_measured:,} samples"],
    ]
    if found.n_measured:
        shown += [
            ["supervised tokens", f"about {facts['supervised_tokens']:,}"],
            ["visual tokens", f"about {facts['visual_tokens']:,}"],
            ["bytes", f"about {human_bytes(facts['bytes'])} ({human_bytes(facts['bytes_per_sample'])} a sample)"],
            ["time", f"about {_duration(facts['seconds'])} with {workers} worker{'s' * (workers > 1)} of this kind"],
        ]
    if found.free_bytes is not None:
        shown.append(["free disk", human_bytes(found.free_bytes)])
    print_table(shown, title=f"the plan for {store}")
    if found.n_measured:
        rows = [
            [
                c["rows"],
                c["codec"],
                human_bytes(c["bytes_per_sample"]),
                human_bytes(c["bytes"]),
                "<- asked for" * c["chosen"],
            ]
            for c in facts["choices"]
        ]
        print_table(rows, title="other choices", header=["rows", "codec", "a sample", "in all", ""])
        if found.free_bytes is not None and facts["bytes"] > found.free_bytes:
            click.echo("warning: that is more than the disk has free", err=True)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
