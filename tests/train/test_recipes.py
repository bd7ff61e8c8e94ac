import pytest

from compodistill.errors import UsageError
from compodistill.train.recipes import builtin, load_recipe


@pytest.mark.parametrize("name", builtin())
def test_every_recipe_of_the_package_is_valid_and_named_after_its_file(name):
    assert load_recipe(name).name == name


def test_recipes_are_the_papers():
    ours, kd, sft = load_recipe("compodistill"), load_recipe("logit-kd"), load_recipe("sft")
    assert [ours.signals(s) for s in ("dpt", "dft", "sft")] == [{"logits"}, {"logits", "attention"}, set()]
    assert [kd.signals(s) for s in ("dpt", "dft", "sft")] == [{"logits"}, {"logits"}, set()]
    assert all(sft.signals(s) == set() for s in ("dpt", "dft", "sft"))
    assert (ours.adapter, kd.adapter, sft.adapter) == ("fetched", "own", "own")
    assert ours.stages["dpt"].train == ["adapter"]


def test_overrides_lie_over_a_config_file_which_lies_over_the_recipe(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("seed: 5\nstages: {dft: {batch_size: 3, learning_rate: 1.0e-4}}\n")
    recipe = load_recipe("compodistill", config, ["stages.dft.batch_size=7"])
    assert (recipe.seed, recipe.stages["dft"].batch_size, recipe.stages["dft"].learning_rate) == (5, 7, 1e-4)
    assert recipe.stages["dft"].losses.attention == 1.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.dft.lerning_rate=1", "stages.dft.lerning_rate"),
        ("stages.dft.losses.attnetion=1", "attnetion"),
        ("stages.dft.batch_size=0", "greater than or equal to 1"),
        ("stages.dft.tail=cut", "bucket"),
        ("stages.xft.batch_size=1", "xft"),
        ("=", ""),
    ],
)
def test_wrong_key_or_value_is_named(override, said):
    with pytest.raises(UsageError) as e:
        load_recipe("compodistill", overrides=[override])
    assert said in str(e.value)


def test_unknown_recipe_lists_the_known():
    with pytest.raises(UsageError, match="compodistill, logit-kd, sft"):
        load_recipe("compodistil")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "!!python/object/apply:os.system ['true']"])
def test_config_that_is_no_plain_mapping_is_refused_and_runs_nothing(tmp_path, text):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(UsageError):
        load_recipe("compodistill", config)


def test_interpolation_in_a_config_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    config = tmp_path / "c.yaml"
    config.write_text("name: ${oc.env:SECRET}\n")
    assert "hunter2" not in load_recipe("compodistill", config).name
