"""`cdist precompute` as a user meets it."""

import json

import pytest
from click.testing import CliRunner
from passes import assert_same_store, make_world
from shard_files import good_members, write_tar

from compodistill.store.reader import open_store
from compodistill.tools.cli import cli


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    return make_world(tmp_path_factory.mktemp("command") / "world", shard_of)


def run(world, store, *more, shards=None):
    shards = shards or f"{world.root}/shard-{{0..2}}.tar"
    options = ("--teacher", world.teacher, "--store", store, "--top-k", 4, "--student-layers", 6)
    return CliRunner().invoke(cli, [str(a) for a in ("precompute", "--shards", shards, *options, *more)])


def test_it_says_what_came_out_and_the_same_command_again_does_nothing(world, tmp_path):
    done = run(world, tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert f"{tmp_path}/store: sealed, 9 samples in 3 fragments" in done.stdout
    assert_same_store(tmp_path / "store", world.reference)
    again = run(world, tmp_path / "store", "--json")
    facts = json.loads(again.stdout)
    assert (facts["samples"], facts["fragments"], facts["skipped"]) == (9, 3, 0)
    assert "3 of 3 shards were finished" in again.stderr


def test_the_log_has_the_plan_each_shard_and_the_end(world, tmp_path):
    assert run(world, tmp_path / "store", "--log-json", tmp_path / "log").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds[0] == "plan"
    assert kinds[-1] == "sealed"
    shards = [line for line in lines if line["event"] == "shard"]
    assert [line["n_samples"] for line in shards] == [3, 3, 3]
    assert sum(line["n_bytes"] for line in shards) == lines[-1]["bytes"]


def test_skipped_samples_are_told_and_counted(world, tmp_path):
    shard = write_tar(tmp_path / "shard.tar", [*good_members(2), ("bad.json", b"{")])
    stopped = run(world, tmp_path / "stopped", shards=shard)
    assert stopped.exit_code == 3
    assert "key bad" in stopped.stderr
    done = run(world, tmp_path / "store", "--on-error", "skip", shards=shard)
    assert done.exit_code == 0, done.output
    assert "1 samples were skipped" in done.stderr
    assert "key bad: not valid JSON" in done.stderr
    assert len(open_store(tmp_path / "store")) == 2


def test_a_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path):
    done = run(world, tmp_path / "store", "--dry-run", "--estimate-from", "3", "--workers", "4")
    assert done.exit_code == 0, done.output
    for words in (
        "samples",
        "supervised tokens",
        "visual tokens",
        "4 workers",
        "free disk",
        "lossless",
        "<- asked for",
    ):
        assert words in done.stdout
    facts = json.loads(run(world, tmp_path / "store", "--dry-run", "--estimate-from", "0", "--json").stdout)
    assert facts["samples"] == 9
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_and_workers_of_ones_own_exclude_each_other(world, tmp_path):
    done = run(world, tmp_path / "store", "--scheduler", "tcp://127.0.0.1:9", "--workers", "2")
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr
