"""A killed and resumed run equals one that was never interrupted, step by step; half-written results never count."""

import json
import shutil
import signal

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from training import build, command, history, launch, quick

from compodistill.tools.cli import cli

KILL = """
import os, signal
from transformers import Trainer
step = Trainer.training_step
def killing(self, *args, **kwargs):
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
Trainer.training_step = killing
"""
SETTINGS = quick("save_every=2", "log_every=3")


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    """The world, and `whole`, a run that was never interrupted; 6 steps, two epochs of three."""
    root = tmp_path_factory.mktemp("world")
    build(root, shard_of)
    assert run(*command(root, root / "whole", settings=SETTINGS)).exit_code == 0
    return root


def run(*arguments):
    return CliRunner().invoke(cli, ["train", *arguments])


def equal(one, other):
    a, b = (load_file(x / "model.safetensors") for x in (one, other))
    return a.keys() == b.keys() and all((a[n] == b[n]).all() for n in a)


@pytest.fixture(scope="module")
def killed(world):
    """A run killed in its sixth step, in the middle of the second epoch; its last checkpoint is after the fourth."""
    done = launch(command(world, world / "killed", settings=SETTINGS), prelude=KILL.format(step=5), check=False)
    assert done.codes == [-signal.SIGKILL], done.errors
    assert [p.name for p in (world / "killed/.dft.partial").glob("checkpoint-*")] == ["checkpoint-4"]
    return world / "killed"


def test_killed_and_resumed_training_equals_uninterrupted_training_bit_for_bit(world, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "out")
    done = run(*command(world, tmp_path / "out", "--resume", settings=SETTINGS))
    assert done.exit_code == 0, done.output
    assert "goes on after step 4" in done.output
    assert equal(tmp_path / "out/dft", world / "whole/dft")
    assert history(tmp_path / "out/dft") == history(world / "whole/dft")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["dft"]


@pytest.mark.slow
def test_resumed_with_loader_workers_nothing_changes(world, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "out")
    done = run(*command(world, tmp_path / "out", "--resume", settings=[*SETTINGS, "workers=1"]))
    assert done.exit_code == 0, done.output
    assert equal(tmp_path / "out/dft", world / "whole/dft")
    assert history(tmp_path / "out/dft") == history(world / "whole/dft")


def test_checkpoint_holds_no_pickle_that_is_loaded_freely_and_only_what_learns(killed):
    checkpoint = killed / ".dft.partial/checkpoint-4"
    assert not (checkpoint / "training_args.bin").exists()
    assert not any(
        "vision_tower" in n or "projector.teacher" in n for n in load_file(checkpoint / "trained.safetensors")
    )


def test_pickle_in_a_checkpoint_is_refused(world, killed, tmp_path):
    import pickle

    shutil.copytree(killed, tmp_path / "out")
    target = tmp_path / "touched"
    (tmp_path / "out/.dft.partial/checkpoint-4/optimizer.pt").write_bytes(pickle.dumps(_Touch(str(target))))
    done = run(*command(world, tmp_path / "out", "--resume", settings=SETTINGS))
    assert done.exit_code == 3, done.output
    assert "optimizer.pt" in done.output
    assert not target.exists()
    assert (tmp_path / "out/.dft.partial/checkpoint-4").is_dir()


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_interrupted_run_is_not_overwritten_without_resume(world, killed):
    done = run(*command(world, killed, settings=SETTINGS))
    assert done.exit_code == 2
    assert "interrupted after step 4" in done.output
    assert "--resume" in done.output


@pytest.mark.parametrize(
    ("changed", "said"),
    [("seed=1", "seed was 0 and is 1"), ("stages.dft.batch_size=4", "stages.dft.batch_size was 8 and is 4")],
)
def test_resuming_with_other_settings_names_the_field_and_both_values(world, killed, changed, said):
    done = run(*command(world, killed, "--resume", settings=[*SETTINGS, changed]))
    assert done.exit_code == 2
    assert said in done.output
    assert (killed / ".dft.partial/checkpoint-4").is_dir()


def test_finished_stage_is_left_alone_under_resume(world):
    before = {p: p.stat().st_mtime_ns for p in (world / "whole").rglob("*")}
    done = run(*command(world, world / "whole", "--resume", settings=SETTINGS))
    assert done.exit_code == 0, done.output
    assert "stage dft is finished" in done.output
    assert {p: p.stat().st_mtime_ns for p in (world / "whole").rglob("*")} == before


def test_half_written_stage_or_checkpoint_never_counts(world, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "out")
    partial = tmp_path / "out/.dft.partial"
    shutil.copytree(partial / "checkpoint-4", partial / ".saving/checkpoint-6")
    (partial / ".saving/checkpoint-6/optimizer.pt").write_bytes(b"")
    (tmp_path / "out/.dft.new").mkdir()
    (tmp_path / "out/.dft.new/config.json").write_text(json.dumps({}))
    done = run(*command(world, tmp_path / "out", "--resume", settings=SETTINGS))
    assert done.exit_code == 0, done.output
    assert equal(tmp_path / "out/dft", world / "whole/dft")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["dft"]


@pytest.mark.slow
def test_resumption_goes_from_one_rank_to_two_and_back(world, tmp_path):
    """The same sequence of global batches: the log agrees to rounding, the sample the run goes on at exactly."""
    settings = quick("save_every=2", "log_every=1")
    arguments = command(world, tmp_path / "out", "--resume", settings=settings)
    whole = run(*command(world, tmp_path / "whole", settings=settings))
    assert whole.exit_code == 0, whole.output
    done = launch(arguments, prelude=KILL.format(step=2), check=False)
    assert done.codes == [-signal.SIGKILL], done.errors
    done = launch(arguments, ranks=2, prelude=KILL.format(step=4), check=False)
    assert signal.SIGKILL in [-c for c in done.codes], done.errors
    assert (tmp_path / "out/.dft.partial/checkpoint-4").is_dir(), done.errors
    launch(arguments)
    for one, other in zip(history(tmp_path / "out/dft"), history(tmp_path / "whole/dft"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
