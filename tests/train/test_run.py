"""Stages, what they leave behind, and a user's mistakes about shards and store."""

import io
import json
import shutil
import tarfile

import pytest
from click.testing import CliRunner
from training import build, command, history, quick

from compodistill.models import load_model
from compodistill.store.reader import open_store
from compodistill.store.writer import create_store
from compodistill.tools.cli import cli
from compodistill.train.join import JoinedDataset
from compodistill.train.survey import survey

SETTINGS = quick("stages.dft.max_steps=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    root = tmp_path_factory.mktemp("world")
    build(root, shard_of, depths=(4, 7))
    return root


def run(*arguments):
    return CliRunner().invoke(cli, ["train", *arguments])


def refused(done, code, *said):
    assert done.exit_code == code, done.output
    for words in said:
        assert words in done.output
    assert "Traceback" not in done.output


def without(source, target, member):
    """A copy of a shard without the members of one key."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for m in old:
            if not m.name.startswith(member + "."):
                new.addfile(m, io.BytesIO(old.extractfile(m).read()))


@pytest.fixture(scope="module")
def lacking(world, tmp_path_factory):
    """A store that has no signals of sample `two`, as a pass that skips faulty samples leaves it."""
    store, path = open_store(world / "store"), tmp_path_factory.mktemp("lacking") / "store"
    writer = create_store(str(path), store.info.spec)
    for digest, name, _ in store.fragments:
        with writer.fragment(name, digest) as fragment:
            for key in store.keys(digest):
                if key != "two":
                    fragment.add(store.get(digest, key))
    writer.add_teacher_files(store.teacher_dir())
    writer.seal([digest for digest, _, _ in store.fragments])
    return path


def test_samples_without_signals_are_refused_by_shard_and_key(world, tmp_path, lacking):
    done = run(*command(world, tmp_path / "out", settings=SETTINGS, store=lacking))
    refused(done, 2, "no signals for 1 of 22 samples", "a.tar, key two", "--on-missing skip")
    assert not (tmp_path / "out").exists()


def test_samples_left_out_on_request_are_counted_and_listed(world, tmp_path, lacking):
    done = run(*command(world, tmp_path / "out", "--on-missing", "skip", settings=SETTINGS, store=lacking))
    assert done.exit_code == 0, done.output
    assert "1 samples without signals are left out (21 remain): a.tar: two" in done.output
    assert (tmp_path / "out/dft/missing_keys.txt").read_text() == "a.tar\ttwo\n"
    assert "21 samples, 1 left out" in (tmp_path / "out/dft/README.md").read_text()


def test_shard_that_changed_since_the_pass_is_refused_with_both_digests(world, tmp_path):
    without(world / "b.tar", tmp_path / "b.tar", "more-5")
    arguments = command(world, tmp_path / "out", "--on-missing", "skip", settings=SETTINGS, shards=tmp_path / "b.tar")
    digest = next(d for d, name, _ in open_store(world / "store").fragments if name == "b.tar")
    refused(run(*arguments), 2, "changed since the teacher's pass", f"{digest} in the store", "b.tar")
    assert not (tmp_path / "out").exists()


def test_store_without_a_seal_is_refused(world, tmp_path):
    shutil.copytree(world / "store", tmp_path / "store")
    (tmp_path / "store/manifest.jsonl").unlink()
    refused(
        run(*command(world, tmp_path / "out", settings=SETTINGS, store=tmp_path / "store")),
        3,
        "not sealed",
        "--allow-partial",
    )


def test_tokens_that_differ_name_the_field_and_both_values_from_inside_a_worker(world, tmp_path, monkeypatch):
    from compodistill.train import run as module

    def other(path):
        processor = load_processor(path)
        processor.chat_template = processor.chat_template.replace("<|end|>", "<|end|> ", 1)
        return processor

    load_processor = module.load_processor
    monkeypatch.setattr(module, "load_processor", other)
    done = run(*command(world, tmp_path / "out", settings=[*SETTINGS, "workers=1"]))
    refused(done, 2, "input_ids differ", " here, ", " in the store", "key ")
    assert not list((tmp_path / "out").iterdir())


def test_loss_that_is_no_number_stops_the_run_and_leaves_nothing(world, tmp_path):
    done = run(*command(world, tmp_path / "out", settings=quick("stages.dft.learning_rate=1e30")))
    refused(done, 1, "the loss is not finite", "learning_rate")
    assert not list((tmp_path / "out").iterdir())


def test_tracker_that_is_not_installed_is_refused_before_training(world, tmp_path, monkeypatch):
    monkeypatch.setattr("compodistill.train.run.find_spec", lambda name: None)
    refused(run(*command(world, tmp_path / "out", settings=quick("report_to=[wandb]"))), 2, "wandb is not installed")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_models_are_refused_in_words(world, tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    refused(run(*command(world, tmp_path / "out", settings=SETTINGS)), 2, f"does not run under {name}", "torchrun")


def test_stage_leaves_log_card_and_tensorboard_events(world, tmp_path):
    settings = [s for s in SETTINGS if not s.startswith("report_to")]
    done = run(*command(world, tmp_path / "out", settings=settings))
    assert done.exit_code == 0, done.output
    stage = tmp_path / "out/dft"
    (line,) = json.loads((stage / "training_log.json").read_text())["history"]
    assert {"loss", "lm", "kl", "attention", "attention_similarity", "learning_rate", "grad_norm"} <= line.keys()
    assert 0 <= line["data_wait_fraction"] <= 1
    assert line["loss"] == pytest.approx(line["lm"] + 0.7 * line["kl"] + 1.3 * line["attention"], rel=1e-5)
    card = (stage / "README.md").read_text()
    info = open_store(world / "store").info
    assert info.content_sha256 in card
    assert info.spec.fingerprint["weights"] in card
    assert info.spec.teacher.name in card
    assert list(stage.glob("runs/**/events.out.tfevents.*"))


def test_bfloat16_trains_and_leaves_float32_weights(world, tmp_path):
    done = run(*command(world, tmp_path / "out", settings=[*SETTINGS, "bf16=true"]))
    assert done.exit_code == 0, done.output
    assert {str(p.dtype) for p in load_model(tmp_path / "out/dft").model.parameters()} == {"torch.float32"}


def test_per_layer_store_serves_students_of_two_depths(world, tmp_path):
    for depth in (4, 7):
        out = tmp_path / f"out-{depth}"
        done = run(*command(world, out, settings=SETTINGS, student=world / f"llm-{depth}"))
        assert done.exit_code == 0, done.output
        assert load_model(out / "dft").n_layers == depth
        assert 0 < history(out / "dft")[0]["attention_similarity"] < 1


def test_numbering_of_samples_follows_from_content_not_from_names(world, tmp_path):
    store = open_store(world / "store")
    names = [world / "a.tar", world / "b.tar", world / "c.tar"]
    renamed = [shutil.copy(p, tmp_path / n) for p, n in zip(names, ("z.tar", "y.tar", "x.tar"), strict=True)]
    one, other = survey(store, names), survey(store, list(reversed(renamed)))
    assert [s.digest for s in one.shards] == [s.digest for s in other.shards]
    assert JoinedDataset(store, one, None, 1).sizes == JoinedDataset(store, other, None, 1).sizes
