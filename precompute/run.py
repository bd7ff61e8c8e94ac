"""The teacher's pass over shards: plan, work, seal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from compodistill.precompute.cluster import runner
from compodistill.precompute.options import ClusterOptions, PassOptions
from compodistill.precompute.plan import Plan, ShardTask, look_at_shard, make_plan, mark_finished
from compodistill.precompute.signals import same_length, signals_of_shard
from compodistill.precompute.teacher import capture_settings, forget, prepare
from compodistill.precompute.worker import Receipt, cannot_write, check_published, run_shard
from compodistill.store.writer import create_store

__all__ = [
    "ClusterOptions",
    "PassOptions",
    "Watcher",
    "capture_settings",
    "precompute",
    "same_length",
    "signals_of_shard",
]


class Watcher:
    """Is told how the pass goes on; does nothing by itself."""

    def looked(self, shard: ShardTask) -> None:
        """A shard was read for the plan."""

    def planned(self, plan: Plan) -> None:
        """The plan is made."""

    def sample(self, shard: Path, tokens: int) -> None:
        """A sample is done (only where the pass runs in this process)."""

    def shard(self, receipt: Receipt) -> None:
        """A shard is done, or was."""


def precompute(
    shards: Sequence[Path],
    teacher_path: Path,
    store_url: str,
    options: PassOptions,
    cluster: ClusterOptions | None = None,
    watcher: Watcher | None = None,
) -> Plan:
    """Run the teacher over all shards and seal the store; what is finished already is not done again.

    Raises:
        UsageError, DataError, MismatchError, StoreError: see `load_model`, `look_at_shard`, `create_store`,
            `run_shard`.
    """
    watcher = watcher or Watcher()
    paths = list(dict.fromkeys(shards))
    try:
        return _run(paths, teacher_path, store_url, options, cluster or ClusterOptions(), watcher)
    finally:
        forget()


def _run(
    paths: list[Path],
    teacher_path: Path,
    store_url: str,
    options: PassOptions,
    cluster: ClusterOptions,
    watcher: Watcher,
) -> Plan:
    with runner(cluster, options) as run:
        found = []
        for shard in run.each(partial(look_at_shard, on_error=options.on_error), paths):
            found.append(shard)
            watcher.looked(shard)
        plan = make_plan(found, paths)
        try:
            job = run.call(partial(prepare, teacher_path, store_url, options))
            writer = create_store(store_url, job.spec)
        except OSError as error:
            raise cannot_write(store_url, error) from error
        mark_finished(plan, writer.finished)
        watcher.planned(plan)
        task = partial(run_shard, job=job)
        for receipt in run.each(run.watched(task, watcher.sample), plan.todo):
            check_published(writer, receipt)
            watcher.shard(receipt)
        try:
            writer.seal(plan.digests)
        except OSError as error:
            raise cannot_write(store_url, error) from error
    return plan
