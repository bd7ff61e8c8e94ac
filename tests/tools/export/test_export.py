"""An exported student computes what the student computes, where cdist cannot be imported."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import student_families
import torch
from click.testing import CliRunner
from student_families import TEACHERS, make_student, teacher_files
from tiny import image, llava, llava_processor, text_config
from torch import nn
from transformers import LlamaForCausalLM, pipeline
from transformers.models.qwen2 import Qwen2Config

from compodistill.errors import CdistError, UsageError
from compodistill.models import load_model
from compodistill.tools.cli import cli
from compodistill.tools.export import run, write
from compodistill.tools.export.fold import fold, folded_linear
from compodistill.tools.export.run import export, probes
from compodistill.train.lora import apply_lora
from compodistill.train.student import build_student

TIED_TO_TEXT = ("llava", "llava_next", "llava_onevision", "internvl")
NARROW, AS_WIDE_AS_THE_TEACHER, WIDER = 16, 32, 40


def saved_student(out, width=NARROW, adapter="fetched"):
    """A LLaVA student's directory with its processor, as a training stage leaves it."""
    teacher = teacher_files(llava(), out / "teacher")
    llava_processor().save_pretrained(teacher)
    torch.manual_seed(5)
    LlamaForCausalLM(text_config(4, width)).save_pretrained(out / "llm")
    build_student(teacher, out / "llm", adapter=adapter).save_pretrained(out / "student")
    llava_processor().save_pretrained(out / "student")
    return out / "student"


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False), (False, True)])
def test_two_linear_layers_fold_into_one_exactly(biases):
    torch.manual_seed(0)
    first, second = nn.Linear(24, 40, bias=biases[0]), nn.Linear(40, 16, bias=biases[1])
    x = torch.randn(200, 24)
    with torch.no_grad():
        torch.testing.assert_close(folded_linear(first, second)(x), second(first(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [NARROW, WIDER], ids=["narrow", "wide"])
@pytest.mark.parametrize("family", TEACHERS)
def test_every_family_exports_to_its_plain_class_where_the_shapes_allow(family, width, tmp_path, monkeypatch):
    if width == WIDER:
        if family not in TIED_TO_TEXT:
            pytest.skip("plain at any width")
        wide = Qwen2Config(**{**student_families.SHAPE, "hidden_size": WIDER})
        monkeypatch.setitem(student_families.TEXTS, family, wide)
    case, student = make_student(family, tmp_path)
    folded = fold(student.eval())
    write.write(folded, tmp_path / "out")
    exported = write.load_exported(tmp_path / "out", torch.float32)
    assert write.difference(student, exported, case.inputs) < 5e-5
    plain = width == WIDER or family not in TIED_TO_TEXT
    assert (type(exported) is type(case.model)) == plain
    assert (folded.middle is None) == plain
    assert (tmp_path / "out" / "modeling_cdist.py").exists() != plain


FORMS = {  # width of the student, adapter, whether the directory needs its own code
    "with-its-code": (NARROW, "fetched", True),
    "as-wide": (AS_WIDE_AS_THE_TEACHER, "fetched", False),
    "widened": (WIDER, "fetched", False),
    "own-projector": (NARROW, "own", False),
}


def test_exported_directories_load_without_cdist_and_give_the_students_logits(tmp_path):
    expected = {}
    for form, (width, adapter, own_code) in FORMS.items():
        student_dir = saved_student(tmp_path / form, width, adapter)
        done = export(student_dir, tmp_path / form / "out")
        assert done.own_code == own_code
        assert max(done.verified.image, done.verified.text) < 1e-4
        student = load_model(student_dir)
        inputs = probes(student.processor, student.model)
        torch.save(inputs, tmp_path / "inputs.pt")
        with torch.no_grad():
            expected[form] = [student.model(**i).logits for i in inputs]
    script = textwrap.dedent(f"""
        import sys, torch
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "compodistill":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Refuse())
        from transformers import AutoModelForImageTextToText, AutoProcessor
        torch.set_num_threads(1)
        inputs = torch.load("inputs.pt")
        for form, (_, _, own_code) in {FORMS!r}.items():
            model = AutoModelForImageTextToText.from_pretrained(form + "/out", trust_remote_code=own_code)
            assert AutoProcessor.from_pretrained(form + "/out").chat_template
            with torch.no_grad():
                torch.save([model(**i).logits for i in inputs], form + ".logits")
            model.generate(**inputs[0], max_new_tokens=2, do_sample=False)
    """)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "m")}
    done_there = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done_there.returncode == 0, done_there.stderr
    for form, logits in expected.items():
        for ours, theirs in zip(logits, torch.load(tmp_path / f"{form}.logits"), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_lora_is_merged(tmp_path):
    case, student = make_student("llava", tmp_path)
    for parameter in apply_lora(student, 4, 8):
        nn.init.normal_(parameter, std=0.1)
    student.eval()
    with torch.no_grad():
        expected = student(**case.inputs).logits
    plain = fold(student).model
    assert not [n for n, _ in plain.named_parameters() if "lora" in n]
    torch.testing.assert_close(plain(**case.inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_export_that_computes_something_else_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    student_dir = saved_student(tmp_path)

    def spoiled(student):
        folded = fold(student)
        with torch.no_grad():
            folded.model.get_submodule("model.multi_modal_projector.linear_2").bias.add_(0.1)
        return folded

    monkeypatch.setattr(run, "fold", spoiled)
    with pytest.raises(CdistError, match="logits differ from the student's by"):
        export(student_dir, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_existing_directory_and_foreign_model_are_refused(tmp_path):
    LlamaForCausalLM(text_config(1, 8)).save_pretrained(tmp_path / "llama")
    with pytest.raises(UsageError, match="model type is 'llama'"):
        export(tmp_path / "llama", tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        export(tmp_path / "llama", tmp_path / "llama")


def test_command_reports_and_the_card_tells_recipe_and_teacher(tmp_path, monkeypatch):
    student_dir = saved_student(tmp_path)
    stage = {"train": ["adapter", "llm"], "losses": {"lm": 1.0, "kl": 0.5, "attention": 0.0}}
    stage |= {"learning_rate": 2e-4, "batch_size": 8}
    recipe = {"name": "mine", "seed": 3, "adapter": "fetched", "stages": {"dft": stage}}
    teacher = {"name": "a-teacher", "model_type": "llava", "layers": 8, "revision": "abc", "licence": "apache-2.0"}
    (student_dir / "training_log.json").write_text(json.dumps({"recipe": recipe, "teacher": teacher, "stage": "dft"}))
    uploads = []
    monkeypatch.setattr(run, "push", lambda path, repository: uploads.append((path.name, repository)) or "hub/me/it")
    arguments = [
        "export",
        "--model",
        str(student_dir),
        "--out",
        str(tmp_path / "out"),
        "--push-to-hub",
        "me/it",
        "--json",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["own_code"]
    assert report["architecture"] == "LlavaWideProjectorForConditionalGeneration"
    assert report["verified"]["image"] < 1e-4
    assert uploads == [("out", "me/it")]
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "license: apache-2.0",
        "Teacher: a-teacher",
        "Recipe `mine`",
        "1 lm + 0.5 kl",
        "trust_remote_code=True",
    ):
        assert said in card


def test_refused_upload_names_repository_and_remedy(tmp_path, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    def refuse(*_, **__):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UsageError, match="the hub does not take me/it") as caught:
        run.push(tmp_path, "me/it")
    assert "hf auth login" in caught.value.remedy


@pytest.mark.parametrize("form", ["student", "exported"])
def test_pipeline_answers_about_an_image(tmp_path, form):
    student_dir = saved_student(tmp_path)
    path = student_dir if form == "student" else export(student_dir, tmp_path / "out").path
    pipe = pipeline("image-text-to-text", model=str(path), trust_remote_code=form == "exported")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image(1)}, {"type": "text", "text": "what is it?"}]}
    ]
    answer = pipe(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    assert isinstance(answer, str)
