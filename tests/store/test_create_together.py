"""Writers that make the same store at the same moment all end up with it."""

import multiprocessing as mp

import synthetic

from compodistill.store import create_store


def make(root: str, barrier, said) -> None:
    barrier.wait()
    try:
        create_store(root, synthetic.spec())
        said.put("")
    except Exception as error:
        said.put(str(error))


def test_four_writers_make_one_store_together(tmp_path):
    fork = mp.get_context("fork")  # spawned children would start too far apart to meet
    for i in range(20):
        barrier, said = fork.Barrier(4), fork.Queue()
        writers = [fork.Process(target=make, args=(str(tmp_path / str(i)), barrier, said)) for _ in range(4)]
        for writer in writers:
            writer.start()
        assert [said.get(timeout=60) for _ in writers] == [""] * 4
        for writer in writers:
            writer.join()
