"""The plan before money is spent: counts are exact, bytes are those of real fragments."""

import pytest
from passes import OPTIONS, make_world
from shard_files import good_members, write_tar

from compodistill.errors import DataError
from compodistill.precompute.estimate import estimate_pass, free_space
from compodistill.precompute.options import PassOptions
from compodistill.precompute.run import precompute
from compodistill.store.reader import open_store

ROWS, CODECS = ("all", "visual", "text", "answer"), ("lossless", "fine", "compact")


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    return make_world(tmp_path_factory.mktemp("estimate") / "world", shard_of)


def test_estimated_from_all_samples_the_counts_are_exact_and_the_bytes_close(world, tmp_path):
    options = PassOptions(**OPTIONS)
    found = estimate_pass(world.shards, world.teacher, str(tmp_path / "store"), options, 1000)
    facts, store = found.facts(1), open_store(world.reference)
    signals = [store[key] for key in store]
    assert (facts["shards"], facts["samples"], facts["measured_on"]) == (3, 9, 9)
    assert facts["supervised_tokens"] == sum(len(s.supervised_positions) for s in signals)
    assert facts["visual_tokens"] == sum(len(s.visual_positions) for s in signals)
    assert facts["bytes"] == pytest.approx(store.info.n_bytes, rel=0.25)  # three samples a shard: mostly metadata
    assert facts["seconds"] > 0
    assert found.facts(2)["seconds"] == facts["seconds"] / 2


@pytest.mark.parametrize("rows", ["all", "answer"])
def test_every_choice_of_rows_and_codec_is_estimated_as_if_it_were_asked_for(world, tmp_path, rows):
    def choices(options):
        found = estimate_pass(world.shards, world.teacher, str(tmp_path / "store"), options, 4)
        return {(c["rows"], c["codec"]): (c["bytes"], c["chosen"]) for c in found.facts(1)["choices"]}

    ours = choices(PassOptions(**OPTIONS, rows=rows))
    assert set(ours) == {(r, c) for r in ROWS for c in CODECS}
    assert [choice for choice, (_, chosen) in ours.items() if chosen] == [(rows, "compact")]
    theirs = choices(PassOptions(**OPTIONS, rows="text", codec="fine"))
    assert {c: size for c, (size, _) in ours.items()} == {c: size for c, (size, _) in theirs.items()}
    assert all(ours[r, "lossless"] > ours[r, "fine"] for r in ROWS)


def test_bytes_of_a_choice_are_those_a_pass_with_it_takes(world, tmp_path):
    options = PassOptions(**OPTIONS, rows="text", codec="lossless")
    found = estimate_pass(world.shards[:1], world.teacher, str(tmp_path / "store"), options, 1000)
    precompute(world.shards[:1], world.teacher, str(tmp_path / "store"), options)
    assert found.facts(1)["bytes"] == pytest.approx(open_store(tmp_path / "store").info.n_bytes, rel=0.2)


def test_an_estimate_touches_neither_store_nor_shards(world, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in world.root.iterdir()}
    estimate_pass(world.shards, world.teacher, str(tmp_path / "store"), PassOptions(**OPTIONS), 2)
    assert list(tmp_path.iterdir()) == []
    assert {p: p.stat().st_mtime_ns for p in world.root.iterdir()} == before


def test_counting_alone_needs_no_teacher(world, tmp_path):
    found = estimate_pass(world.shards, tmp_path / "nowhere", str(tmp_path / "store"), PassOptions(), 0)
    assert found.facts(1)["samples"] == 9


def test_samples_that_cannot_be_used_are_counted_apart(world, tmp_path):
    shard = write_tar(tmp_path / "shard.tar", [*good_members(3), ("bad.json", b"{")])
    with pytest.raises(DataError, match="key bad"):
        estimate_pass([shard], world.teacher, str(tmp_path / "store"), PassOptions(**OPTIONS), 10)
    options = PassOptions(**OPTIONS, on_error="skip")
    facts = estimate_pass([shard], world.teacher, str(tmp_path / "store"), options, 10).facts(1)
    assert (facts["samples"], facts["measured_on"], facts["unusable_among_them"]) == (4, 3, 1)


def test_free_space_is_that_of_the_disk_the_store_will_be_on(tmp_path):
    assert free_space(str(tmp_path / "not/yet/there")) > 0
    assert free_space("s3://bucket/store") is None
