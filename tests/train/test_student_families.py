"""Every family's student: one DFT step equals its online twin; it saves, loads and generates as any other model."""

import pytest
import torch
from student_families import LAYERS, TEACHERS, make_student
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from compodistill.attention import tap_attention, use_tappable_attention
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
    from transformers import AutoModelForCausalLM

    _, student = make_student(family, tmp_path)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            student.eval()(input_ids=ids).logits, text(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) <= set(TEACHERS)
