"""The bundled teacher is an ordinary model directory that knows what its log says it knows."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from compodistill.tools.demo import STUDENT, TEACHER
from compodistill.tools.demo.questions import COMPOSITION
from compodistill.tools.demo.scenes import Draws, draw_scene, render
from compodistill.tools.demo.train_teacher import answers_only
from compodistill.tools.demo.world import FAMILIES, ask, write_world
from compodistill.tools.evaluate.scoring import evaluate
from compodistill.tools.evaluate.tasks import load_task

LOG = json.loads((TEACHER / "training_log.json").read_text())


@pytest.fixture(scope="module")
def teacher():
    model, info = LlavaForConditionalGeneration.from_pretrained(TEACHER, output_loading_info=True)
    return model.eval(), AutoProcessor.from_pretrained(TEACHER), info


def test_it_loads_without_a_missing_or_unexpected_key(teacher):
    model, processor, info = teacher
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.text_config.num_hidden_layers == 8
    assert processor.chat_template
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_it_is_small_enough_to_ship(teacher):
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 4_000_000


@pytest.mark.parametrize("task", ["recognition", "composition"])
def test_it_is_as_good_on_fresh_scenes_as_its_log_says(teacher, tmp_path, task):
    model, processor, _ = teacher
    write_world(tmp_path, 0, 20, seed=123)
    result = evaluate(model, processor, load_task(tmp_path / "eval" / f"{task}.json"), batch_size=50)
    assert len(result.verdicts) == 100
    expected = LOG["held_out"][task]["accuracy"]
    standard_error = (expected * (1 - expected) / len(result.verdicts)) ** 0.5
    assert abs(result.accuracy - expected) <= 3 * standard_error + 0.005


def test_its_log_shows_relations_learnt_and_reports_every_kind():
    kinds = LOG["held_out"]["composition"]["kinds"]
    assert set(kinds) == set(COMPOSITION)
    # it does not tell which colour goes with which shape as well: the replaced and swapped attributes
    assert min(kinds[k]["accuracy"] for k in ("relation_yes_no", "replace_relation", "swap_object")) >= 0.9


def test_it_generates_a_short_answer_that_ends(teacher):
    model, processor, _ = teacher
    scene = draw_scene(99)
    thing = scene.things[0]
    content = [{"type": "image"}, {"type": "text", "text": f"is there a {thing.name}?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=render(scene), text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    out = model.generate(**inputs)
    answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "yes"
    assert out[0, -1] == processor.tokenizer.eos_token_id


def test_the_chat_template_is_prefix_stable_for_strings_and_parts(teacher):
    _, processor, _ = teacher
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "this"},
        {"role": "user", "content": "and that?"},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    for i in (2, 4):
        before = processor.apply_chat_template(messages[:i], add_generation_prompt=True)
        assert processor.apply_chat_template(messages[: i + 1]).startswith(before)
    assert processor.apply_chat_template(messages).count("<image>") == 1


def test_words_of_questions_are_one_token_each_and_any_text_survives(teacher):
    tokenizer = teacher[1].tokenizer
    for i in range(20):
        for question in ask(draw_scene(5, i), Draws(i), {"recognition": 3, "composition": 3, "localisation": 3}):
            words = question.text.replace("?", " ?").replace(".", " .").replace("(", "( ").replace(")", " )").split()
            assert len(tokenizer.encode(question.text)) <= len(words)
    text = "Ein Bär sieht 12 Äpfel, 日本 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert set(FAMILIES) == {"recognition", "composition", "localisation"}


def test_training_supervises_answers_with_their_end_and_nothing_else():
    ids = torch.tensor([[9, 1, 5, 6, 2, 9, 1, 7, 2, 0]])
    assert answers_only(ids, begin=1, end=2).tolist() == [[-100, -100, 5, 6, 2, -100, -100, 7, 2, -100]]


def test_the_student_is_a_smaller_model_of_the_same_vocabulary_without_weights(teacher):
    config, teachers = AutoConfig.from_pretrained(STUDENT), teacher[0].config.text_config
    assert not list(STUDENT.glob("*.safetensors"))
    assert config.model_type == teachers.model_type
    assert config.vocab_size == teachers.vocab_size
    assert config.num_hidden_layers < teachers.num_hidden_layers
    assert AutoTokenizer.from_pretrained(STUDENT).get_vocab() == teacher[1].tokenizer.get_vocab()
    torch.manual_seed(3)
    first = AutoModelForCausalLM.from_config(config).lm_head.weight.clone()
    torch.manual_seed(3)
    assert torch.equal(first, AutoModelForCausalLM.from_config(config).lm_head.weight)
