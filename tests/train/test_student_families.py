"""Every family's student: one DFT step equals its online twin; it saves, loads and generates as any other model."""

import json

import pytest
import torch
from families import FAMILIES as FAMILIES_CAPTURED
from student_families import LAYERS, SHAPE, TEACHERS, make_student, teacher_files
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, Qwen2Config

from compodistill.attention import tap_attention, use_tappable_attention
from compodistill.errors import MismatchError, UsageError
from compodistill.groups import layer_groups, understanding_layers
from compodistill.models import PROJECTORS
from compodistill.train.recipes import Losses, Stage
from compodistill.train.step import Matching, Targets, step_losses
from compodistill.train.student import build_student, freeze_all_but
from compodistill.train.student_classes import FAMILIES, FetchedAdapter, projector_of

STAGE = Stage(train=["adapter", "llm"], losses=Losses(lm=1.0, kl=0.7, attention=1.3))
SUPERVISED = 3  # the last tokens of each sample


def matching():
    layers = list(understanding_layers(LAYERS))
    return Matching(layers, [(g, g) for g in range(len(layers))])


def groups():
    return layer_groups(understanding_layers(8), len(understanding_layers(LAYERS)))


def supervised(case):
    """For each sample the positions that predict its last tokens, and those tokens."""
    positions = [r[-SUPERVISED:] - 1 for r in case.rows]
    labels = [case.inputs["input_ids"][b, p + 1] for b, p in enumerate(positions)]
    return positions, torch.cat(labels)


def captured_targets(case):
    """What a lossless store would hold of the teacher: every logit and the grouped slices."""
    use_tappable_attention(case.model)
    positions, labels = supervised(case)
    layers = range(groups()[0][0], groups()[-1][1] + 1)
    with torch.no_grad(), tap_attention(case.model, layers, case.rows, case.columns) as tap:
        logits = case.model(**case.inputs, use_cache=False).logits
    logprobs, ids = torch.cat([logits[b, p] for b, p in enumerate(positions)]).log_softmax(-1).sort(descending=True)
    attention = [
        torch.stack([torch.stack([tap.slices[i][b] for i in range(a, z + 1)]).mean(0) for a, z in groups()])
        for b in range(len(positions))
    ]
    return Targets(positions, labels, ids, logprobs, attention, case.rows, case.columns)


def online_losses(case, student):
    """The paper's losses written plainly, the teacher in memory, eager attention, full logits."""
    for model in (case.model, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        t = case.model(**case.inputs, output_attentions=True, use_cache=False)
    s = student(**case.inputs, output_attentions=True, use_cache=False)
    positions, labels = supervised(case)
    s_logits, t_logits = (torch.cat([m.logits[b, p] for b, p in enumerate(positions)]) for m in (s, t))
    lm = F.cross_entropy(s_logits, labels)
    kl = F.kl_div(s_logits.log_softmax(-1), t_logits.log_softmax(-1), log_target=True, reduction="batchmean")
    per_sample = []
    for b, (rows, columns) in enumerate(zip(case.rows, case.columns, strict=True)):
        cosines = []
        for layer, (first, last) in zip(understanding_layers(LAYERS), groups(), strict=True):
            target = torch.stack([t.attentions[i][b].mean(0) for i in range(first, last + 1)]).mean(0)
            ours = s.attentions[layer][b].mean(0)
            row = F.cosine_similarity(target[rows][:, columns], ours[rows][:, columns], dim=-1)
            seen = target[rows][:, columns].norm(dim=-1) > 0  # a sliding window may hide every image
            cosines.append(row[seen])
        per_sample.append(torch.cat(cosines).mean())
    terms = {"lm": lm, "kl": kl, "attention": 1 - torch.stack(per_sample).mean()}
    return {**terms, "total": sum(getattr(STAGE.losses, n) * x for n, x in terms.items())}


@pytest.mark.parametrize("adapter", ["fetched", "own"])
@pytest.mark.parametrize("family", TEACHERS)
def test_dft_step_equals_the_step_with_the_teacher_in_memory(family, adapter, tmp_path):
    case, offline_student = make_student(family, tmp_path, adapter)
    online_student = build_student(tmp_path / "teacher", tmp_path / "llm", adapter=adapter, seed=3)
    for student in (offline_student, online_student):
        freeze_all_but(student, ["adapter", "llm"])
        student.train()
    offline = step_losses(offline_student, offline_student, case.inputs, captured_targets(case), STAGE, matching())
    online = online_losses(case, online_student)
    assert offline.keys() == online.keys()
    for name in offline:
        torch.testing.assert_close(offline[name], online[name], rtol=1e-5, atol=1e-6)
    offline["total"].backward()
    online["total"].backward()
    learned = 0
    for (name, a), (_, b) in zip(offline_student.named_parameters(), online_student.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            learned += 1
            scale = b.grad.abs().max().clamp_min(1e-3)
            assert float((a.grad - b.grad).abs().max() / scale) < 2e-5, name
    assert float(projector_gradient(offline_student)) > 0  # the image reached the student, and the loss came back
    assert learned > 4 * LAYERS


def projector_gradient(student):
    projector = projector_of(student)
    last = projector.student if isinstance(projector, FetchedAdapter) else projector
    return max(p.grad.abs().max() for p in last.parameters())


@pytest.mark.parametrize("family", TEACHERS)
def test_fetched_side_is_the_teachers_and_only_it_is_frozen(family, tmp_path):
    case, student = make_student(family, tmp_path)
    where = PROJECTORS[case.model.config.model_type]
    for name, tensor in projector_of(case.model).state_dict().items():
        assert torch.equal(student.state_dict()[f"{where}.teacher.{name}"], tensor)
    freeze_all_but(student, ["adapter", "llm"])
    frozen = {n for n, p in student.named_parameters() if not p.requires_grad}
    text = {n for n, _ in student.get_decoder().named_parameters()}
    assert frozen
    assert not {n for n in frozen if any(n.endswith(f".{t}") and "vision" not in n and "visual" not in n for t in text)}
    assert all(n in frozen for n, _ in student.named_parameters() if n.startswith(f"{where}.teacher."))
    freeze_all_but(student, ["adapter"])
    learning = {n for n, p in student.named_parameters() if p.requires_grad}
    assert all(n.startswith(f"{where}.student.") or n.endswith("image_newline") for n in learning)


@pytest.mark.parametrize("adapter", ["fetched", "own"])
@pytest.mark.parametrize("family", TEACHERS)
def test_student_saves_loads_and_generates_as_an_ordinary_model(family, adapter, tmp_path):
    case, student = make_student(family, tmp_path, adapter)
    student.eval().save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(student)
    with torch.no_grad():
        expected = student(**case.inputs).logits
        torch.testing.assert_close(loaded(**case.inputs).logits, expected, rtol=1e-5, atol=1e-5)
        assert float((expected - case.model(**case.inputs).logits).abs().max()) > 1e-3
    shortest = {k: v for k, v in case.inputs.items()}
    out = loaded.generate(**shortest, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= case.inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", [f for f in TEACHERS if not f.startswith("paligemma")])
def test_text_alone_goes_through_the_student_as_through_its_language_model(family, tmp_path):
    _, student = make_student(family, tmp_path)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            student.eval()(input_ids=ids).logits, text(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def language_model(path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_rotary_sections_are_the_teachers_and_frequencies_the_language_models(family, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    teacher = teacher_files(TEACHERS[family]().model, tmp_path / "teacher")
    llm = language_model(tmp_path / "llm", Qwen2Config(**SHAPE, rope_parameters=rope))
    parameters = build_student(teacher, llm).config.text_config.rope_parameters
    assert (parameters["mrope_section"], parameters["rope_theta"]) == ([1, 1, 2], 5e5)
    twice = language_model(tmp_path / "twice", Qwen2Config(**{**SHAPE, "num_attention_heads": 1}))
    assert build_student(teacher, twice).config.text_config.rope_parameters["mrope_section"] == [2, 2, 4]
    odd = language_model(tmp_path / "odd", Qwen2Config(**{**SHAPE, "hidden_size": 24}))
    with pytest.raises(MismatchError, match=r"mrope_section \[1, 1, 2\] .* head_dim 12") as caught:
        build_student(teacher, odd)
    assert "head_dim is the teacher's" in caught.value.remedy


def test_text_part_of_a_qwen_vl_is_taken_as_a_language_model(tmp_path):
    model = TEACHERS["qwen2_5_vl"]().model
    teacher = teacher_files(model, tmp_path / "teacher")
    model.config.text_config.save_pretrained(tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "qwen2_5_vl_text"
    assert build_student(teacher, tmp_path / "text").config.text_config.num_hidden_layers == 8


@pytest.mark.parametrize(
    ("family", "takes"), [("qwen2_5_vl", "qwen2 or qwen2_5_vl_text"), ("paligemma", "gemma or gemma2")]
)
def test_language_model_of_another_type_is_refused_where_the_class_cannot_hold_it(family, takes, tmp_path):
    teacher = teacher_files(TEACHERS[family]().model, tmp_path / "teacher")
    llm = language_model(tmp_path / "llm", LlamaConfig(**SHAPE))
    with pytest.raises(MismatchError, match=f"of type {takes}, this one is llama"):
        build_student(teacher, llm)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_teacher_without_a_student_class_is_refused_with_those_there_are(family, tmp_path):
    teacher = teacher_files(FAMILIES_CAPTURED[family]().model, tmp_path / "teacher")
    with pytest.raises(UsageError, match=f"no student class for a teacher of type '{family}'") as caught:
        build_student(teacher, language_model(tmp_path / "llm", LlamaConfig(**SHAPE)))
    assert "qwen2_5_vl" in caught.value.remedy


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) <= set(TEACHERS)
