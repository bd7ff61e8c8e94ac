"""Two Dask workers, and a signal that cannot be caught: for a worker, the client, the scheduler."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from passes import assert_same_store, half_built, make_world, published

OPTIONS = ("--top-k", "4", "--student-layers", "6")


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    return make_world(tmp_path_factory.mktemp("killed") / "world", shard_of, n_shards=8, per_shard=6)


@contextmanager
def cdist(world, store, log, *more):
    """`cdist precompute` over two workers, in a process of its own."""
    command = [
        *(sys.executable, "-m", "compodistill.tools.cli", "precompute", "--teacher", world.teacher, "--store", store),
        *(part for shard in world.shards for part in ("--shards", shard)),
        *("--log-json", log, *OPTIONS, *(more or ("--workers", "2"))),
    ]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def receipts(log) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [e for e in lines if e["event"] == "shard"]


def wait_for(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def children(process) -> list[psutil.Process]:
    """Its worker processes."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [c for c in found if "spawn_main" in " ".join(c.cmdline())]


def test_a_pass_of_two_workers_killed_twice_ends_in_the_bytes_of_one_process(world, tmp_path):
    store, log = tmp_path / "store", tmp_path / "log"
    with cdist(world, store, log) as client:  # a worker dies; the pass goes on
        wait_for(lambda: len(receipts(log)) >= 1, client)
        workers = children(client)
        os.kill(workers[0].pid, signal.SIGKILL)
        before = len(receipts(log))
        wait_for(lambda: len(receipts(log)) > before + 1, client)
        client.kill()  # now the client, and the scheduler in it
        client.wait()
    wait_for(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), seconds=30)
    done = published(store)
    assert done >= 3
    assert half_built(store) <= 3  # one a worker, the killed one's included
    with cdist(world, store, tmp_path / "again") as client:
        assert client.wait(120) == 0, client.stderr.read()
    worked = [r for r in receipts(tmp_path / "again") if not r["was_finished"]]
    assert len(worked) == len(world.shards) - done
    assert_same_store(store, world.reference)


@contextmanager
def scheduler(tmp_path, *security):
    """A scheduler and two workers as an administrator would start them."""
    file = tmp_path / f"scheduler-{time.monotonic_ns()}.json"
    environment = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "1.0"}
    run = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    work = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--memory-limit", "0"]
    host = ["--host", "tls://127.0.0.1" if security else "127.0.0.1"]
    options = [*security, "--scheduler-file", str(file), "--no-dashboard"]
    log = (tmp_path / "scheduler.log").open("w")
    started = [subprocess.Popen([*run, *host, "--port", "0", *options], env=environment, stderr=log)]
    try:
        wait_for(file.exists, seconds=60)
        workers = [*work, *options, "--death-timeout", "5"]
        started += [subprocess.Popen(workers, env=environment, stderr=log) for _ in range(2)]
        yield json.loads(file.read_text())["address"], started[0]
    finally:
        for process in started[::-1]:
            process.terminate()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.slow
def test_a_scheduler_that_is_killed_ends_the_pass_with_a_message_and_another_one_goes_on(world, tmp_path):
    store, log = tmp_path / "store", tmp_path / "log"
    with scheduler(tmp_path) as (address, process), cdist(world, store, log, "--scheduler", address) as client:
        wait_for(lambda: len(receipts(log)) >= 2, client)
        process.kill()
        assert client.wait(60) == 1
        said = client.stderr.read()
        assert "the connection to the scheduler is lost" in said
        assert "same command again" in said
        assert "Traceback" not in said
    done = published(store)
    with scheduler(tmp_path) as (address, _), cdist(world, store, tmp_path / "again", "--scheduler", address) as client:
        assert client.wait(120) == 0, client.stderr.read()
    assert done >= 2
    assert len([r for r in receipts(tmp_path / "again") if not r["was_finished"]]) == len(world.shards) - done
    assert_same_store(store, world.reference)


@pytest.mark.slow
def test_a_pass_goes_over_a_scheduler_with_tls(world, tmp_path):
    for line in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca",
        "req -newkey rsa:2048 -nodes -keyout key.pem -out cert.csr -subj /CN=cdist",
        "x509 -req -in cert.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2",
    ):
        subprocess.run(["openssl", *line.split()], check=True, cwd=tmp_path, capture_output=True)
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    security = ("--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key)
    tls = ("--tls-ca", ca, "--tls-cert", cert, "--tls-key", key)
    with scheduler(tmp_path, *security) as (address, _):
        assert address.startswith("tls://")
        with cdist(world, tmp_path / "store", tmp_path / "log", "--scheduler", address, *tls) as client:
            assert client.wait(120) == 0, client.stderr.read()
    assert_same_store(tmp_path / "store", world.reference)
