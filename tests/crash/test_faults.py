"""Full disks, places that cannot be written, two passes at once: a clear stop or a correct end, never a wrong store."""

import os

import pytest
from passes import assert_same_store, events, half_built, make_world, published, run, start


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    return make_world(tmp_path_factory.mktemp("faults") / "world", shard_of)


def error(log) -> dict:
    (found,) = [e for e in events(log) if e["event"] == "error"]
    return found


@pytest.mark.parametrize("limit", [500, 3_000, 20_000])
def test_a_full_disk_stops_the_pass_with_one_message_and_the_next_run_goes_on(world, tmp_path, limit):
    """Files larger than the limit cannot be written: the spec, the fragments, or the teacher's files."""
    store, log = tmp_path / "store", tmp_path / "log"
    assert run(world, store, log=log, file_size_limit=limit) == 3
    assert error(log)["kind"] == "StoreError"
    assert "cannot be written" in error(log)["text"]
    assert "same command again" in error(log)["text"]
    assert half_built(store) == published(store) == 0
    assert run(world, store) == 0
    assert_same_store(store, world.reference)


def test_a_full_disk_amid_the_shards_keeps_what_is_finished(world, tmp_path, monkeypatch):
    from passes import OPTIONS

    from compodistill.errors import StoreError
    from compodistill.precompute.run import PassOptions, precompute
    from compodistill.store.fragment_writer import FragmentBuilder

    add, calls = FragmentBuilder.add, []

    def full(self, signals):
        calls.append(signals.key)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        add(self, signals)

    monkeypatch.setattr(FragmentBuilder, "add", full)
    with pytest.raises(StoreError, match="No space left"):
        precompute(world.shards, world.teacher, str(tmp_path / "store"), PassOptions(**OPTIONS))
    assert published(tmp_path / "store") == 1
    assert half_built(tmp_path / "store") == 0
    assert run(world, tmp_path / "store") == 0
    assert_same_store(tmp_path / "store", world.reference)


def test_a_place_that_cannot_be_written_is_named(world, tmp_path):
    assert run(world, "/sys/cdist-store", log=tmp_path / "log") == 3
    assert "/sys/cdist-store" in error(tmp_path / "log")["text"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_store_is_named_and_left_as_it_is(world, tmp_path):
    store = tmp_path / "store"
    assert run(world, store, shards=world.shards[:1]) == 0
    for path in [store, *store.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert run(world, store, log=tmp_path / "log") == 3
    assert str(store) in error(tmp_path / "log")["text"]
    for path in [store, *store.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert published(store) == 1


def test_two_passes_on_one_store_at_once_end_in_one_right_store(world, tmp_path):
    both = [start(world, tmp_path / "store", log=tmp_path / f"log-{i}") for i in range(2)]
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0], [events(tmp_path / f"log-{i}") for i in range(2)]
    assert_same_store(tmp_path / "store", world.reference)


def test_two_passes_over_different_shards_at_once_end_in_one_right_store(world, tmp_path):
    halves = [world.shards[:2], world.shards[2:]]
    both = [start(world, tmp_path / "store", shards=h, log=tmp_path / f"log-{len(h)}") for h in halves]
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0], [events(tmp_path / f"log-{len(h)}") for h in halves]
    assert run(world, tmp_path / "store", log=tmp_path / "log") == 0
    assert [e for e in events(tmp_path / "log") if e["event"] == "sample"] == []
    assert_same_store(tmp_path / "store", world.reference)
