"""Where tasks run: in this process, or on Dask workers, one task a shard."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from compodistill.errors import CdistError, UsageError
from compodistill.precompute.options import ClusterOptions, PassOptions

if TYPE_CHECKING:
    from distributed import Client, Future

T = TypeVar("T")
R = TypeVar("R")

IN_FLIGHT = 2  # tasks a worker: the one it runs and the one it runs next
ATTEMPTS = 2  # of a task whose workers died: once among others, once with the others done
CONNECT_SECONDS = 30.0
SECONDS_BETWEEN_COUNTS = 2.0


class Runner(Protocol):
    """Runs functions on items; results come in any order."""

    def call(self, function: Callable[[], R]) -> R: ...

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...

    def watched(self, task: Callable[..., R], on_sample: Callable[[Path, int], None]) -> Callable[[Any], R]:
        """The task, telling of each sample where it can."""
        ...


class Here:
    """This process: no Dask."""

    def call(self, function: Callable[[], R]) -> R:
        return function()

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(function, items)

    def watched(self, task: Callable[..., R], on_sample: Callable[[Path, int], None]) -> Callable[[Any], R]:
        return lambda shard: task(shard, on_sample=lambda tokens: on_sample(shard.path, tokens))


class ClusterError(CdistError):
    """The cluster failed, not the work: the scheduler is gone, or a task took its workers down with it."""


class OnWorkers:
    """Dask workers. Only a few tasks a worker are with the scheduler at any time, whatever their number."""

    def __init__(self, client: Client) -> None:
        self._client, self._run = client, secrets.token_hex(4)  # keys of two passes on one scheduler differ
        self._counter = itertools.count()
        self._n_workers, self._counted = 1, -SECONDS_BETWEEN_COUNTS

    def call(self, function: Callable[[], R]) -> R:
        (result,) = self.each(lambda _: function(), [None])
        return result

    def watched(self, task: Callable[..., R], on_sample: Callable[[Path, int], None]) -> Callable[[Any], R]:
        return task

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results as they come.

        A task whose workers die again and again is put behind all others and tried once more, so that none is
        blamed for a neighbour's deed.

        Raises:
            ClusterError: a task kills its workers, or the scheduler is gone. Whatever the function raises.
        """
        from distributed import as_completed
        from distributed.client import FutureCancelledError
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker

        waiting = iter(items)
        suspects: list[T] = []
        running: dict[Future, tuple[T, int]] = {}
        done = as_completed(loop=self._client.loop)

        def submit(item: T, attempt: int) -> None:
            key = f"cdist-{self._run}-{next(self._counter)}"
            future = self._client.submit(function, item, key=key, pure=False)
            running[future] = item, attempt
            done.add(future)

        def fill() -> None:
            for item in itertools.islice(waiting, max(0, self._window() - len(running))):
                submit(item, 1)
            if not running and suspects:
                submit(suspects.pop(), ATTEMPTS)

        try:
            fill()
            while running:
                future = next(done)
                item, attempt = running.pop(future)
                try:
                    result = future.result()
                except KilledWorker as error:
                    if attempt == ATTEMPTS:
                        raise ClusterError(
                            "the workers that took this shard died, each time",
                            where=str(getattr(item, "path", item)),
                            remedy="look into their logs; not enough memory is the usual cause",
                        ) from error
                    suspects.append(item)
                else:
                    yield result
                future.release()
                fill()
        except (FutureCancelledError, asyncio.CancelledError, CommClosedError, TimeoutError) as error:
            raise ClusterError(
                f"the connection to the scheduler is lost ({type(error).__name__})",
                where=str(self._client.scheduler.address if self._client.scheduler else ""),
                remedy="run the same command again: it goes on where it stopped",
            ) from error
        finally:
            with contextlib.suppress(Exception):  # a lost scheduler has nothing to cancel
                self._client.cancel(list(running), force=True)

    def _window(self) -> int:
        now = time.monotonic()
        if now - self._counted > SECONDS_BETWEEN_COUNTS:
            self._counted, self._n_workers = now, max(1, len(self._client.nthreads()))
        return IN_FLIGHT * self._n_workers


@contextlib.contextmanager
def runner(cluster: ClusterOptions, options: PassOptions) -> Iterator[Runner]:
    """Open what the options name; Dask is imported only if it is needed.

    Raises:
        UsageError: no scheduler answers, or there is no GPU to start a worker for.
    """
    n_workers = cluster.workers or gpu_count()
    if not cluster.scheduler and n_workers == 1:
        yield Here()
        return
    import dask
    from distributed import Client

    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        if cluster.scheduler:
            address, security = cluster.scheduler, _security(cluster)
        else:
            address, security = stack.enter_context(_local_cluster(n_workers, options)), None
        for part in ("utils", "client"):  # what is lost is told by us, once; dask's own threads would add a stack trace
            logging.getLogger(f"distributed.{part}").setLevel(logging.CRITICAL + 1)
        try:
            client = stack.enter_context(
                Client(address, security=security, timeout=CONNECT_SECONDS, set_as_default=False)
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no scheduler answers: {error}", where=cluster.scheduler, remedy="check the address and the TLS files"
            ) from error
        if cluster.scheduler:
            _require_workers(client, cluster.scheduler)
        yield OnWorkers(client)


SETTINGS = {
    "distributed.scheduler.worker-saturation": 1.0,  # nothing waits on a worker, so nothing is blamed for its death
    "distributed.scheduler.allowed-failures": 3,
    "distributed.scheduler.work-stealing": False,
    "distributed.worker.multiprocessing-method": "spawn",
    # what only a dashboard would show, and costs time and memory with every task
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.admin.system-monitor.log-length": 10,
    "distributed.admin.log-length": 100,
    "distributed.admin.low-level-log-length": 100,
}


def _local_cluster(n_workers: int, options: PassOptions) -> Any:
    """A scheduler in this process and worker processes, one GPU each where there are some."""
    from distributed import Nanny, Scheduler
    from distributed.deploy.spec import SpecCluster

    threads = str(options.threads)
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    workers = {}
    for i in range(n_workers):
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if options.device_type == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = visible[i] if i < len(visible) else str(i)
        workers[i] = {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "host": "127.0.0.1",
                "memory_limit": None,  # a teacher is large and stays: Dask's limits would kill or pause its worker
                "dashboard": False,
                "env": environment,
                "silence_logs": logging.ERROR,
            },
        }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard": False}}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.ERROR)


def _security(cluster: ClusterOptions) -> Any:
    from distributed.security import Security

    if not cluster.tls_ca:
        return None
    for name in ("tls_ca", "tls_cert", "tls_key"):
        if not Path(getattr(cluster, name)).is_file():
            raise UsageError(f"no such file for --{name.replace('_', '-')}", where=getattr(cluster, name))
    return Security(
        require_encryption=True,
        tls_ca_file=cluster.tls_ca,
        tls_client_cert=cluster.tls_cert,
        tls_client_key=cluster.tls_key,
    )


def _require_workers(client: Client, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise UsageError(
            "the scheduler has no workers", where=address, remedy="start some; see docs/scale.md"
        ) from error


def gpu_count() -> int:
    """GPUs this process may use.

    Raises:
        UsageError: none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UsageError("there is no GPU to start a worker for", remedy="--workers N --device cpu")
    return torch.cuda.device_count()
