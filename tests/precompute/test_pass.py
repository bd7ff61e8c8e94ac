"""The pass in one process: resumed, extended, watched, and what it does with samples that cannot be used."""

import pickle
import tarfile
from dataclasses import replace

import pytest
from passes import OPTIONS, assert_same_store, make_world
from shard_files import good_members, picture, record, write_tar

from compodistill.errors import DataError, MismatchError, StoreError, UsageError
from compodistill.precompute import teacher as teachers
from compodistill.precompute.options import PassOptions
from compodistill.precompute.plan import look_at_shard
from compodistill.precompute.run import Watcher, precompute
from compodistill.precompute.teacher import prepare
from compodistill.precompute.worker import run_shard
from compodistill.shards import shard_digest
from compodistill.store.reader import open_store

SKIP = PassOptions(**OPTIONS, on_error="skip")


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    return make_world(tmp_path_factory.mktemp("pass") / "world", shard_of)


class Log(Watcher):
    def __init__(self):
        self.samples, self.receipts, self.plan = [], [], None

    def planned(self, plan):
        self.plan = plan

    def sample(self, shard, tokens):
        self.samples.append(shard.name)

    def shard(self, receipt):
        self.receipts.append(receipt)


def run(world, store, shards=None, options=None):
    log = Log()
    options = options or PassOptions(**OPTIONS)
    precompute(shards or world.shards, world.teacher, str(store), options, watcher=log)
    return log


def test_new_shards_extend_a_store_and_nothing_is_done_twice(world, tmp_path):
    store = tmp_path / "store"
    assert set(run(world, store, world.shards[:1]).samples) == {"shard-0.tar"}
    assert set(run(world, store).samples) == {"shard-1.tar", "shard-2.tar"}
    assert_same_store(store, world.reference)
    assert run(world, store).samples == []
    assert_same_store(store, world.reference)


def test_the_order_of_the_shards_changes_nothing(world, tmp_path):
    run(world, tmp_path / "store", world.shards[::-1])
    assert_same_store(tmp_path / "store", world.reference)


def test_a_shard_that_changed_between_runs_is_another_shard(world, tmp_path, shard_of):
    from tiny import sample

    shard = shard_of([sample("a", ("user", "x"), ("assistant", "y"))], tmp_path / "s.tar")
    before = shard_digest(shard)
    run(world, tmp_path / "store", [shard])
    shard_of([sample("a", ("user", "x"), ("assistant", "z"))], shard)
    run(world, tmp_path / "store", [shard])
    store = open_store(tmp_path / "store")
    assert {d for d, _, _ in store.fragments} == {before, shard_digest(shard)}
    assert store.get(before, "a").digest != store.get(shard_digest(shard), "a").digest


def test_a_shard_that_changed_since_the_plan_is_refused_and_leaves_nothing(world, tmp_path, shard_of):
    from tiny import sample

    shard = shard_of([sample("a", ("user", "x"), ("assistant", "y"))], tmp_path / "s.tar")
    task = look_at_shard(shard, "stop")
    job = prepare(world.teacher, str(tmp_path / "store"), PassOptions(**OPTIONS))
    shard_of([sample("a", ("user", "x"), ("assistant", "z"))], shard)
    with pytest.raises(DataError, match="changed since the plan"):
        run_shard(task, job)
    assert not list((tmp_path / "store/fragments").glob("*/"))


def test_a_shard_that_is_written_to_while_it_is_read_is_refused(world, tmp_path, shard_of):
    from tiny import sample

    shard = shard_of([sample("a", ("user", "x"), ("assistant", "y"))], tmp_path / "s.tar")
    task = look_at_shard(shard, "stop")
    job = prepare(world.teacher, str(tmp_path / "store"), PassOptions(**OPTIONS))
    with pytest.raises(DataError, match="changed since the plan"):
        run_shard(task, job, on_sample=lambda tokens: shard.write_bytes(shard.read_bytes() + bytes(512)))
    assert not list((tmp_path / "store/fragments").glob("*/"))


def test_the_same_shard_under_two_names_is_refused_before_anything_is_written(world, tmp_path):
    twin = tmp_path / "twin.tar"
    twin.write_bytes(world.shards[0].read_bytes())
    with pytest.raises(UsageError, match="same content"):
        run(world, tmp_path / "store", [*world.shards, twin])
    assert not (tmp_path / "store").exists()


def test_a_worker_with_another_teacher_refuses_to_work(world, tmp_path):
    from tiny import save_llava

    other = save_llava(tmp_path / "other", seed=5)
    job = prepare(world.teacher, str(tmp_path / "store"), PassOptions(**OPTIONS))
    teachers.forget()
    elsewhere = replace(job, teacher=other)
    with pytest.raises(MismatchError, match=r"fingerprint\.weights"):
        run_shard(look_at_shard(world.shards[0], "stop"), elsewhere)
    teachers.forget()


def test_a_finished_shard_needs_no_teacher(world, tmp_path, monkeypatch):
    job = prepare(world.teacher, str(tmp_path / "store"), PassOptions(**OPTIONS))
    task = look_at_shard(world.shards[0], "stop")
    assert run_shard(task, job).n_samples == 3
    teachers.forget()
    monkeypatch.setattr(teachers, "load_model", None)
    assert run_shard(task, job).was_finished


def test_receipts_are_small_and_true(world, tmp_path):
    log = run(world, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert [r.shard for r in log.receipts] == world.shards
    assert all(len(pickle.dumps(r)) < 1000 for r in log.receipts)
    assert sum(r.n_bytes for r in log.receipts) == store.info.n_bytes
    assert sum(r.n_samples for r in log.receipts) == len(store) == len(log.samples)
    signals = [store[key] for key in store]
    assert sum(r.supervised_tokens for r in log.receipts) == sum(len(s.supervised_positions) for s in signals)
    assert sum(r.visual_tokens for r in log.receipts) == sum(len(s.visual_positions) for s in signals)


def test_reading_ahead_and_writing_behind_in_threads_leave_the_same_bytes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(PassOptions, "samples_ahead", 3)
    run(world, tmp_path / "store")
    assert_same_store(tmp_path / "store", world.reference)


def test_the_number_of_threads_is_part_of_the_fingerprint(world, tmp_path):
    run(world, tmp_path / "store", world.shards[:1])
    with pytest.raises(MismatchError, match=r"fingerprint\.device is cpu, 1 thread"):
        run(world, tmp_path / "store", world.shards[:1], PassOptions(**OPTIONS, threads=2))


def bomb() -> bytes:
    """A small PNG that says it is 50,000 pixels wide and high."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def two_turns(question, answer):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


BAD = {
    "a truncated image": [("bad.json", record()), ("bad.png", picture(size=(64, 64))[:-40])],
    "a corrupt image": [("bad.json", record()), ("bad.png", b"\x89PNG\r\n\x1a\n" + bytes(range(200)))],
    "a bomb": [("bad.json", record()), ("bad.png", bomb())],
    "a missing image": [("bad.json", record())],
    "an image too many": [("bad.json", record(0)), ("bad.png", picture())],
    "an empty conversation": [("bad.json", {"conversations": []})],
    "no answer": [("bad.json", {"conversations": [{"from": "human", "value": "hello"}]})],
    "a record that is no JSON": [("bad.json", b"{")],
    "no record": [("bad.png", picture())],
    "a member of no known kind": [("bad.json", record(0)), ("bad.exe", b"MZ")],
    "more tokens than --max-length": [("bad.json", two_turns("x" * 300, "y"))],
}


@pytest.mark.parametrize("what", BAD)
def test_a_sample_that_cannot_be_used_stops_the_pass_by_name_or_is_left_out_and_listed(world, tmp_path, what):
    members = good_members(3)
    shard = write_tar(tmp_path / "shard.tar", [*members[:2], *BAD[what], *members[2:]])
    with pytest.raises(DataError, match=r"shard \S*shard.tar, key bad"):
        run(world, tmp_path / "stop", [shard], PassOptions(**OPTIONS, max_length=200))
    assert not (tmp_path / "stop/manifest.jsonl").exists()

    log = run(world, tmp_path / "store", [shard], PassOptions(**OPTIONS, max_length=200, on_error="skip"))
    store, digest = open_store(tmp_path / "store"), shard_digest(shard)
    assert list(store) == ["k0", "k1", "k2"]
    ((key, reason),) = store.fragment(digest).skipped
    assert key == "bad"
    assert reason
    assert str(tmp_path) not in reason  # the store tells nothing of this machine
    assert [(s.key, s.reason) for s in log.receipts[0].skipped] == [(key, reason)]
    with pytest.raises(StoreError):
        store.get(digest, "bad")


def test_of_a_key_that_occurs_twice_neither_is_given_signals(world, tmp_path):
    members = good_members(3)
    shard = write_tar(tmp_path / "shard.tar", [*members, ("k0.json", record(0)), *good_members(5)[8:]])
    with pytest.raises(DataError, match="key k0"):
        run(world, tmp_path / "stop", [shard])
    run(world, tmp_path / "store", [shard], SKIP)
    store = open_store(tmp_path / "store")
    assert list(store) == ["k1", "k2", "k4"]
    assert [key for key, _ in store.fragment(shard_digest(shard)).skipped] == ["k0"]


def test_a_tar_cut_at_any_block_never_passes_for_a_shorter_one(world, tmp_path):
    whole = write_tar(tmp_path / "whole.tar", good_members(2), format=tarfile.USTAR_FORMAT).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 + 3  # what follows is the archive's padding
    cut = tmp_path / "cut.tar"
    skipped_once = False
    for blocks in range(1, end):
        cut.write_bytes(whole[: 512 * blocks])
        with pytest.raises(DataError, match=r"cut\.tar"):
            look_at_shard(cut, "stop")
        task = look_at_shard(cut, "skip")
        if task.n_samples == 1 and not skipped_once:
            skipped_once = True
            run(world, tmp_path / "store", [cut], SKIP)
            store = open_store(tmp_path / "store")
            assert list(store) == ["k0"]
            ((key, reason),) = store.fragment(task.digest).skipped
            assert key == ""
            assert "truncated" in reason
    assert skipped_once


def test_a_shard_without_any_usable_sample_is_refused_even_if_samples_may_be_skipped(world, tmp_path):
    shard = write_tar(tmp_path / "shard.tar", [("bad.json", b"{"), ("worse.json", b"}")])
    with pytest.raises(DataError, match="no sample that can be used"):
        run(world, tmp_path / "store", [shard], SKIP)
    assert not list((tmp_path / "store/fragments").glob("*/"))


def test_samples_left_out_are_under_the_manifests_seal(world, tmp_path):
    shard = write_tar(tmp_path / "shard.tar", [*good_members(2), ("bad.json", b"{")])
    run(world, tmp_path / "store", [shard], SKIP)
    metadata = tmp_path / "store/fragments" / shard_digest(shard) / "zarr.json"
    metadata.write_bytes(metadata.read_bytes().replace(b'"bad"', b'"bat"'))
    with pytest.raises(StoreError, match="vouches"):
        open_store(tmp_path / "store").fragment(shard_digest(shard))
