"""The numbers of a run do not depend on how it is computed: ranks, pieces, activation checkpointing."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.testing import assert_close
from training import build, command, history, launch, quick

from compodistill.attention import Tap
from compodistill.groups import understanding_layers
from compodistill.tools.cli import cli

THREE_STEPS = quick("stages.dft.max_steps=3")  # the third is the epoch's last batch: 6 of 8 samples


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    """The world, and `whole`: one rank, one piece a step."""
    root = tmp_path_factory.mktemp("world")
    build(root, shard_of)
    run(root, "whole")
    return root


def run(root, name, *more, settings=()):
    arguments = command(root, root / name, *more, settings=[*THREE_STEPS, *settings])
    done = CliRunner().invoke(cli, ["train", *arguments])
    assert done.exit_code == 0, done.output


def same_numbers(root, name):
    for one, other in zip(history(root / name / "dft"), history(root / "whole/dft"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    a, b = (load_file(root / n / "dft/model.safetensors") for n in (name, "whole"))
    for tensor in b:
        assert_close(a[tensor], b[tensor], rtol=1e-3, atol=1e-4, msg=tensor)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_pieces_equal_the_whole_batch(world, accumulate):
    run(world, f"pieces-{accumulate}", settings=[f"stages.dft.accumulate={accumulate}"])
    same_numbers(world, f"pieces-{accumulate}")


def test_activation_checkpointing_runs_tapped_layers_again_and_changes_no_gradient(world, monkeypatch):
    taken = []
    take = Tap.take
    monkeypatch.setattr(Tap, "take", lambda self, *a, **k: (taken.append(torch.is_grad_enabled()), take(self, *a, **k)))
    run(world, "checkpointing", settings=["activation_checkpointing=true"])
    same_numbers(world, "checkpointing")
    steps, layers = 3, len(understanding_layers(4))
    assert len(taken) == 2 * steps * layers


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_ranks_equal_one(world, accumulate):
    """With four pieces on each rank most hold one sample: some without images, and in the last batch none at all."""
    name = f"ranks-{accumulate}"
    settings = [*THREE_STEPS, f"stages.dft.accumulate={accumulate}"]
    launch(command(world, world / name, settings=settings), ranks=2)
    same_numbers(world, name)


@pytest.mark.slow
def test_error_on_one_rank_ends_all_with_the_same_message(world, tmp_path):
    arguments = command(world, tmp_path / "out", settings=[*THREE_STEPS, "max_length=30"])
    done = launch(arguments, ranks=2, check=False)
    assert done.codes == [3, 3], done.errors
    assert all("more than --max-length 30" in e and "Traceback" not in e for e in done.errors)
    assert not list((tmp_path / "out").iterdir())
