"""Dask workers: the same bytes as one process, whatever dies."""

import collections
import subprocess
import sys
from functools import partial

import pytest
from passes import OPTIONS, assert_same_store, make_world
from worker_tasks import die_always_at_three, die_once_at_three, fail_at_three, note

from compodistill.errors import DataError, UsageError
from compodistill.precompute.cluster import ClusterError, runner
from compodistill.precompute.options import ClusterOptions, PassOptions
from compodistill.precompute.run import precompute


@pytest.fixture(scope="module")
def two():
    with runner(ClusterOptions(workers=2), PassOptions()) as workers:
        yield workers


def test_two_workers_leave_the_bytes_of_one_process(tmp_path, shard_of):
    world = make_world(tmp_path / "world", shard_of)
    options, cluster = PassOptions(**OPTIONS), ClusterOptions(workers=2)
    precompute(world.shards, world.teacher, str(tmp_path / "store"), options, cluster)
    assert_same_store(tmp_path / "store", world.reference)


def test_one_worker_needs_no_dask():
    code = (
        "import sys\nfrom compodistill.precompute.run import *\n"
        "from compodistill.precompute.cluster import runner\n"
        "with runner(ClusterOptions(), PassOptions()) as run: assert list(run.each(abs, [-1])) == [1]\n"
        "assert not {'dask', 'distributed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_a_few_tasks_a_worker_are_in_flight(two):
    taken = []
    results = two.each(partial(pow, 2), (taken.append(i) or i for i in range(40)))
    first = next(results)
    assert len(taken) <= 4  # two workers, two each
    assert {first, *results} == {2**i for i in range(40)}


def test_an_error_of_a_task_arrives_whole_and_ends_the_pass(two):
    with pytest.raises(DataError) as caught:
        list(two.each(fail_at_three, range(100)))
    assert str(caught.value) == "a bad shard\n  where: shard 3\n  remedy: mend it"
    assert list(two.each(abs, [-1])) == [1]  # and the workers are fit for the next


def test_what_a_dying_worker_had_in_hand_is_done_by_another(two, tmp_path):
    assert sorted(two.each(partial(die_once_at_three, tmp_path), range(12))) == list(range(12))
    redone = {p.name for p in tmp_path.iterdir() if p.read_text() != "x"}
    assert "3" in redone
    assert len(redone) <= 4  # of instant tasks, results on their way may be lost, too; a shard's fragment is not


def test_a_task_that_kills_every_worker_is_named_after_all_others_are_done(two, tmp_path):
    done = []
    results = two.each(partial(die_always_at_three, tmp_path), range(8))
    with pytest.raises(ClusterError, match="where: 3"):
        collections.deque(map(done.append, results), maxlen=0)
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7]


def test_tasks_of_two_passes_on_one_scheduler_do_not_mix(two, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert sorted(two.each(partial(note, tmp_path / "a"), range(4))) == list(range(4))
    assert sorted(two.each(partial(note, tmp_path / "b"), range(4))) == list(range(4))
    assert len(list(tmp_path.glob("b/*"))) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "localhost:8786"},
        {"scheduler": "tls://localhost:8786"},
        {"scheduler": "tcp://localhost:8786", "tls_ca": "ca.pem", "tls_cert": "c.pem", "tls_key": "k.pem"},
        {"scheduler": "tls://localhost:8786", "tls_ca": "ca.pem"},
        {"tls_ca": "ca.pem"},
    ],
)
def test_a_scheduler_address_and_its_tls_files_belong_together(options):
    with pytest.raises(UsageError):
        ClusterOptions(**options)


def test_a_missing_tls_file_is_named():
    cluster = ClusterOptions(1, "tls://127.0.0.1:9", "nowhere-ca.pem", "nowhere.pem", "nowhere-key.pem")
    with pytest.raises(UsageError, match="nowhere-ca"), runner(cluster, PassOptions()):
        pass


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("compodistill.precompute.cluster.CONNECT_SECONDS", 1.0)
    with (
        pytest.raises(UsageError, match=r"127\.0\.0\.1:9"),
        runner(ClusterOptions(scheduler="tcp://127.0.0.1:9"), PassOptions()),
    ):
        pass
