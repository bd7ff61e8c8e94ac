"""A pass that is killed, anywhere, and run again leaves the bytes of one that never was."""

import random
import signal
import time

import pytest
from passes import Crash, assert_same_store, events, half_built, make_world, published, run, start

STORAGE = "compodistill.store.storage:LocalStorage"
POINTS = {
    "before the first shard is read": Crash("compodistill.precompute.run:look_at_shard"),
    "before the store is made": Crash("compodistill.precompute.teacher:create_store"),
    "after the store is made": Crash("compodistill.precompute.teacher:create_store", "after"),
    "amid the teacher's files": Crash(f"{STORAGE}.create", "after", 4),
    "before a teacher file has its name": Crash("compodistill.store.storage:os.link", "before", 4),
    "before the list of the teacher's files": Crash(f"{STORAGE}.replace"),
    "at the first sample": Crash("compodistill.store.fragment_writer:FragmentBuilder.add"),
    "amid the second shard": Crash("compodistill.store.fragment_writer:FragmentBuilder.add", "after", 5),
    "before a fragment's metadata": Crash("compodistill.store.fragment_writer:FragmentBuilder.finish", "before", 2),
    "after a fragment is built": Crash("compodistill.store.fragment_writer:FragmentBuilder.finish", "after", 2),
    "after a fragment is verified": Crash(f"{STORAGE}.publish", "before", 2),
    "after a fragment is published": Crash(f"{STORAGE}.publish", "after", 2),
    "after the last fragment": Crash(f"{STORAGE}.publish", "after", 3),
    "before the manifest": Crash(f"{STORAGE}.replace", "before", 2),
    "before the manifest has its name": Crash("compodistill.store.storage:os.replace", "before", 2),
    "after the manifest": Crash(f"{STORAGE}.replace", "after", 2),
    "before the leftovers are removed": Crash(f"{STORAGE}.clean"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    return make_world(tmp_path_factory.mktemp("crash") / "world", shard_of)


def resume(world, store, log) -> None:
    """Run again, and check what was redone and what came out."""
    finished, half = published(store), half_built(store)
    assert half <= 1  # the one shard in hand
    assert run(world, store, log=log) == 0
    (planned,) = [e for e in events(log) if e["event"] == "planned"]
    assert planned["finished"] == finished  # nothing that was published is done again
    worked_on = {e["shard"] for e in events(log) if e["event"] == "sample"}
    assert len(worked_on) == len(world.shards) - finished
    assert_same_store(store, world.reference)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point_and_run_again_it_ends_in_the_same_bytes(world, tmp_path, point):
    store = tmp_path / "store"
    assert run(world, store, POINTS[point]) == -signal.SIGKILL
    resume(world, store, tmp_path / "log")


@pytest.mark.parametrize("n", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_run_again_it_ends_in_the_same_bytes(world, tmp_path, n):
    moments = random.Random(n)
    started = time.monotonic()
    assert run(world, tmp_path / "timed") == 0
    whole = time.monotonic() - started
    killed = 0
    for i in range(n):
        process = start(world, tmp_path / f"store-{i}")
        process.join(moments.uniform(0, whole))
        killed += process.is_alive()
        process.kill()
        process.join()
        resume(world, tmp_path / f"store-{i}", tmp_path / f"log-{i}")
    assert killed > n / 3


def test_killed_again_and_again_it_ends_in_the_same_bytes(world, tmp_path):
    store = tmp_path / "store"
    for nth in (2, 1, 3, 2):
        crash = Crash("compodistill.store.fragment_writer:FragmentBuilder.add", "after", nth)
        assert run(world, store, crash) == -signal.SIGKILL
    resume(world, store, tmp_path / "log")
