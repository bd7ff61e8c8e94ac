"""LoRA: only its matrices and the adapter learn, and merging changes no logit."""

import pytest
import torch
from student_families import make_student
from torch import nn

from compodistill.errors import UsageError
from compodistill.train.lora import apply_lora, merge_lora
from compodistill.train.recipes import load_recipe
from compodistill.train.student import freeze_all_but


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_5_vl"])
def test_only_low_rank_matrices_and_the_adapter_learn_and_merging_changes_no_logit(family, tmp_path):
    case, student = make_student(family, tmp_path)
    before = student.state_dict().keys()
    freeze_all_but(student, ["adapter", "llm"], {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": None})
    learning = {n for n, p in student.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or ".student." in n for n in learning)
    assert any(".student." in n for n in learning)
    assert sum("lora_A" in n for n in learning) == 7 * 4  # every linear layer of four decoder layers
    for name, parameter in student.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    student.eval()
    with torch.no_grad():
        expected = student(**case.inputs).logits
        assert merge_lora(student) == 7 * 4
        torch.testing.assert_close(student(**case.inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert student.state_dict().keys() == before
    assert merge_lora(student) == 0


def test_stage_without_the_language_model_has_no_low_rank_matrices(tmp_path):
    _, student = make_student("llava", tmp_path)
    freeze_all_but(student, ["adapter"], {"rank": 4, "alpha": 8})
    assert not [n for n, _ in student.named_parameters() if "lora" in n]


def test_named_layers_only_and_an_unknown_name_is_refused_with_the_names_there_are(tmp_path):
    _, student = make_student("llava", tmp_path)
    assert len(apply_lora(student, 2, 4, ["q_proj", "v_proj"])) == 2 * 2 * 4
    with pytest.raises(UsageError, match="named 'query'") as caught:
        apply_lora(make_student("llava", tmp_path / "other")[1], 2, 4, ["query"])
    assert "down_proj" in caught.value.remedy


def test_recipe_switches_it_on_and_checks_its_fields():
    recipe = load_recipe("compodistill", overrides=["lora.rank=128", "lora.alpha=256"])
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (128, 256, 0.0)
    with pytest.raises(UsageError, match=r"lora\.rank"):
        load_recipe("compodistill", overrides=["lora.rank=0", "lora.alpha=256"])
