"""A user's mistake ends in one readable message, exit code 2, and no half-written result."""

import io
import shutil
import tarfile
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from tiny import samples, save_llava, text_config
from transformers import LlamaForCausalLM

from compodistill.tools.cli import cli


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    root = tmp_path_factory.mktemp("world")
    LlamaForCausalLM(text_config(4, 16)).save_pretrained(root / "llm")
    world = SimpleNamespace(
        root=root,
        teacher=save_llava(root / "teacher"),
        other_teacher=save_llava(root / "other", seed=9),
        llm=root / "llm",
        shard=shard_of(samples(), root / "shard.tar"),
        other_shard=shard_of(samples()[:1], root / "other.tar"),
        empty=root / "empty.tar",
        store=root / "store",
    )
    with tarfile.open(world.empty, "w"):
        pass
    done = run("precompute", "--shards", world.shard, "--teacher", world.teacher, "--store", world.store, "--top-k", 4)
    assert done.exit_code == 0, done.output
    return world


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def refused(done, *said):
    assert done.exit_code == 2, done.output
    for words in said:
        assert words in done.output
    assert "Traceback" not in done.output


def precompute(world, tmp_path, **changes):
    options = {"shards": world.shard, "teacher": world.teacher, "store": tmp_path / "store", "top-k": 4, **changes}
    return run("precompute", *(part for name, value in options.items() for part in (f"--{name}", value)))


def train(world, tmp_path, *more, **changes):
    options = {"store": world.store, "shards": world.shard, "student": world.llm, "out": tmp_path / "out", **changes}
    return run("train", *(part for name, value in options.items() for part in (f"--{name}", value)), *more)


@pytest.mark.parametrize("what", ["shards", "teacher"])
def test_precompute_of_a_path_that_is_not_there(world, tmp_path, what):
    refused(precompute(world, tmp_path, **{what: world.root / "nowhere.tar"}), "nowhere.tar")
    assert not (tmp_path / "store").exists()


def test_precompute_of_an_empty_shard(world, tmp_path):
    refused(precompute(world, tmp_path, shards=world.empty), "empty.tar")
    assert not (tmp_path / "store").exists()


def test_precompute_with_a_language_model_as_teacher(world, tmp_path):
    refused(precompute(world, tmp_path, teacher=world.llm), "'llama'", "not a vision-language model")
    assert not (tmp_path / "store").exists()


def test_precompute_with_weights_missing_from_the_checkpoint(world, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(world.teacher, tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher/model.safetensors")
    weights.pop("language_model.lm_head.weight")
    save_file(weights, tmp_path / "teacher/model.safetensors", metadata={"format": "pt"})
    refused(precompute(world, tmp_path, teacher=tmp_path / "teacher"), "missing keys", "lm_head.weight")
    assert not (tmp_path / "store").exists()


def test_precompute_into_the_store_of_another_teacher(world, tmp_path):
    before = {p: p.read_bytes() for p in world.store.rglob("*") if p.is_file()}
    refused(precompute(world, tmp_path, store=world.store, teacher=world.other_teacher), "fingerprint.weights")
    refused(precompute(world, tmp_path, store=world.store, **{"attention-rows": "text"}), "rows")
    assert {p: p.read_bytes() for p in world.store.rglob("*") if p.is_file()} == before


def test_precompute_with_two_kinds_of_grouping(world, tmp_path):
    refused(
        run(
            *("precompute", "--shards", world.shard, "--teacher", world.teacher, "--store", tmp_path / "store"),
            *("--per-layer", "--student-layers", 4),
        ),
        "exclude each other",
    )


@pytest.mark.parametrize("what", ["store", "shards", "student"])
def test_train_with_a_path_that_is_not_there(world, tmp_path, what):
    refused(train(world, tmp_path, **{what: world.root / "nowhere.tar"}), "nowhere.tar")
    assert not (tmp_path / "out").exists()


def test_train_with_shards_the_teacher_never_saw(world, tmp_path):
    refused(train(world, tmp_path, shards=world.other_shard), "no signals for this shard", "cdist precompute")
    assert not (tmp_path / "out").exists()


def test_train_with_an_unknown_recipe_or_key(world, tmp_path):
    refused(train(world, tmp_path, recipe="compo"), "no recipe 'compo'", "logit-kd")
    refused(train(world, tmp_path, "--set", "stages.dft.losses.atention=1"), "stages.dft.losses.atention")
    assert not (tmp_path / "out").exists()


def test_train_with_a_vision_language_model_as_student(world, tmp_path):
    refused(train(world, tmp_path, student=world.teacher), "not a causal language model")
    assert not (tmp_path / "out").exists()


def test_train_over_a_result_that_is_there(world, tmp_path):
    (tmp_path / "out/dpt").mkdir(parents=True)
    refused(train(world, tmp_path), "exists already")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["dpt"]


def test_train_of_a_stage_without_the_one_before_it(world, tmp_path):
    refused(train(world, tmp_path, stage="dft"), "goes on from dpt")
    assert not (tmp_path / "out").exists()


def test_train_with_a_store_grouped_for_another_depth(world, tmp_path):
    options = {"student-layers": 8, "store": tmp_path / "grouped"}
    assert precompute(world, tmp_path, **options).exit_code == 0
    refused(train(world, tmp_path, store=tmp_path / "grouped"), "--student-layers 4")
    assert not any((tmp_path / "out").glob("*"))


def test_damaged_sample_is_named_with_exit_code_three_and_nothing_is_published(world, tmp_path):
    shard = tmp_path / "bad.tar"
    with tarfile.open(world.shard) as source, tarfile.open(shard, "w") as target:
        for member in source:
            data = source.extractfile(member).read()
            if member.name == "two.1.png":
                data = data[: len(data) // 2]
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    done = precompute(world, tmp_path, shards=shard)
    assert done.exit_code == 3, done.output
    assert "bad.tar" in done.output
    assert "two" in done.output
    assert not list((tmp_path / "store/fragments").glob("*/zarr.json"))
    assert not (tmp_path / "store/manifest.jsonl").exists()
