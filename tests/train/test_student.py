import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from tiny import llava_processor, samples, save_llava, text_config, tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.vit.configuration_vit import ViTConfig

from compodistill.errors import MismatchError, UsageError
from compodistill.precompute.run import PassOptions, precompute
from compodistill.store.reader import open_store
from compodistill.tokens import collate, tokenize
from compodistill.train.recipes import load_recipe
from compodistill.train.run import train
from compodistill.train.student import Student, freeze_all_but
from compodistill.train.student_classes import FetchedAdapter


@pytest.fixture(scope="module")
def root(tmp_path_factory, shard_of):
    root = tmp_path_factory.mktemp("world")
    LlamaForCausalLM(text_config(4, 16)).save_pretrained(root / "llm")
    shard = shard_of(samples(), root / "shard.tar")
    precompute([shard], save_llava(root / "teacher"), str(root / "store"), PassOptions(student_layers=4, top_k=8))
    shutil.rmtree(root / "teacher")
    return root


@pytest.mark.parametrize("adapter", ["fetched", "own"])
def test_student_saves_loads_and_generates_as_an_ordinary_model(root, tmp_path, adapter):
    student = Student.from_store(open_store(root / "store"), root / "llm", adapter=adapter).eval()
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = collate([tokenize(llava_processor(), samples()[2], 1)], 0, bucket=1)
    with torch.no_grad():
        assert torch.equal(student(**inputs).logits, loaded(**inputs).logits)
    out = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_only_the_named_parts_learn(root):
    student = Student.from_store(open_store(root / "store"), root / "llm")
    projector = student.model.multi_modal_projector
    assert isinstance(projector, FetchedAdapter)
    freeze_all_but(student, ["adapter"])
    assert {n for n, p in student.named_parameters() if p.requires_grad} == {
        "model.multi_modal_projector.student.weight",
        "model.multi_modal_projector.student.bias",
    }
    freeze_all_but(student, ["adapter", "llm"])
    frozen = {n for n, p in student.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("vision_tower" in n or "projector.teacher" in n for n in frozen)


def test_weights_of_the_language_model_arrive_unchanged(root):
    student = Student.from_store(open_store(root / "store"), root / "llm")
    llm = LlamaForCausalLM.from_pretrained(root / "llm")
    for name, tensor in llm.model.state_dict().items():
        assert torch.equal(student.get_decoder().state_dict()[name], tensor)
    assert torch.equal(student.lm_head.weight, llm.lm_head.weight)


def test_language_model_without_weights_starts_at_random_by_seed(root, tmp_path):
    text_config(4, 16).save_pretrained(tmp_path)
    store = open_store(root / "store")
    a, b, c = (Student.from_store(store, tmp_path, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_slightly_smaller_vocabulary_is_widened_to_the_teachers(root, tmp_path):
    LlamaForCausalLM(text_config(4, 16, vocab=len(tokenizer()) - 4)).save_pretrained(tmp_path)
    student = Student.from_store(open_store(root / "store"), tmp_path)
    assert student.get_output_embeddings().weight.shape[0] == len(tokenizer())


def test_vocabulary_of_another_size_without_a_tokenizer_is_refused_with_both_sizes(root, tmp_path):
    LlamaForCausalLM(text_config(4, 16, vocab=200)).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=f"has 200 tokens and the teacher's {len(tokenizer())}") as caught:
        Student.from_store(open_store(root / "store"), tmp_path)
    assert "tokenizer files" in caught.value.remedy


def test_vocabulary_of_another_size_with_the_teachers_tokenizer_is_taken(root, tmp_path):
    LlamaForCausalLM(text_config(4, 16, vocab=400)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert Student.from_store(open_store(root / "store"), tmp_path).config.text_config.vocab_size == 400


def test_tokenizer_that_cannot_be_loaded_is_refused(root, tmp_path):
    shutil.copytree(root / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        Student.from_store(open_store(root / "store"), tmp_path / "llm")


def test_language_model_that_scales_its_logits_is_refused_with_the_difference(root, tmp_path):
    config = Gemma2Config(**{**text_config(4, 16).to_dict(), "head_dim": 8, "final_logit_softcapping": 0.5})
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="logits differ by"):
        Student.from_store(open_store(root / "store"), tmp_path)


def test_end_of_turn_of_the_teacher_is_the_students(root):
    student = Student.from_store(open_store(root / "store"), root / "llm")
    assert student.generation_config.eos_token_id == 5


def test_language_model_with_another_tokenizer_is_refused_by_token(root, tmp_path):
    shutil.copytree(root / "llm", tmp_path / "llm")
    vocab = {t: i for t, i in tokenizer().get_vocab().items()}
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    backend = tokenizer().backend_tokenizer
    backend.model = type(backend.model)(vocab=vocab, merges=[])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "llm")
    message = r"token '[ab]' is .* in the student and .* in the teacher; of the student's 262 tokens 2 have another id"
    with pytest.raises(MismatchError, match=message) as caught:
        Student.from_store(open_store(root / "store"), tmp_path / "llm")
    assert "teacher's family" in caught.value.remedy


def test_tokenizer_with_foreign_tokens_is_refused_by_token(root, tmp_path):
    shutil.copytree(root / "llm", tmp_path / "llm")
    added = tokenizer()
    added.add_tokens([f"word{i}" for i in range(9)])
    added.save_pretrained(tmp_path / "llm")
    with pytest.raises(MismatchError, match=r"'word.' is .* in the student and absent in the teacher"):
        Student.from_store(open_store(root / "store"), tmp_path / "llm")


def test_directory_that_is_no_language_model_is_refused(root, tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="not a causal language model"):
        Student.from_store(open_store(root / "store"), tmp_path)


def test_training_needs_no_teacher_directory_and_never_imports_precompute(root, tmp_path):
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from compodistill.store.reader import open_store
        from compodistill.train.recipes import load_recipe
        from compodistill.train.run import train
        settings = [f"stages.{{s}}.{{x}}" for s in ("dpt", "dft", "sft") for x in ("max_steps=2", "batch_size=3")]
        recipe = load_recipe("compodistill", overrides=settings)
        root, out = Path({str(root)!r}), Path({str(tmp_path)!r}) / "out"
        last = train(open_store(root / "store"), [root / "shard.tar"], root / "llm", out, recipe)
        assert last == out / "sft"
        assert not (root / "teacher").exists()
        assert not [m for m in sys.modules if m.startswith("compodistill.precompute")]
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage in ("dpt", "dft", "sft"):
        _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / stage, output_loading_info=True)
        assert not info["missing_keys"]
        assert (tmp_path / "out" / stage / "processor_config.json").is_file()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dft", "dpt", "sft"]


def test_lora_of_a_recipe_trains_and_leaves_full_weights(root, tmp_path):
    overrides = ["lora.rank=2", "lora.alpha=4", "save_every=0", "stages.dft.learning_rate=0.01"]
    overrides += [f"stages.{s}.{x}" for s in ("dpt", "dft") for x in ("max_steps=2", "batch_size=3")]
    recipe = load_recipe("compodistill", overrides=overrides)
    shards, store = [root / "shard.tar"], open_store(root / "store")
    train(store, shards, root / "llm", tmp_path / "out", recipe, stages=["dpt", "dft"])
    before, after = (load_file(tmp_path / "out" / s / "model.safetensors") for s in ("dpt", "dft"))
    assert before.keys() == after.keys()
    changed = {n: after[n] - before[n] for n in before if not torch.equal(before[n], after[n])}
    low_rank = [difference for n, difference in changed.items() if ".layers." in n]
    assert len(low_rank) == 7 * 4  # every linear layer of the decoder
    assert all(int(torch.linalg.matrix_rank(d, rtol=1e-3)) <= 2 for d in low_rank)
    assert {n for n in changed if ".layers." not in n} == {
        "model.multi_modal_projector.student.weight",
        "model.multi_modal_projector.student.bias",
    }
