"""The student: the teacher's own class with a smaller language model and a student adapter between.

Visual features go through the teacher's frozen vision tower and frozen adapter, then through a small trainable
module that brings them to the student's width (teacher adapter fetch, CompoDistill section 4.2).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from compodistill.attention import use_tappable_attention
from compodistill.errors import MismatchError, UsageError
from compodistill.models import VISION_FILE, load_config, load_processor, projector_name, refuse_incomplete
from compodistill.store.reader import Store

ADAPTERS = ("fetched", "own")


class FetchedAdapter(nn.Module):
    """The teacher's adapter followed by the student's: (..., vision width) -> (..., student width)."""

    def __init__(self, teacher: nn.Module, teacher_width: int, student_width: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = nn.Linear(teacher_width, student_width)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.student(self.teacher(*args, **kwargs))


class CdistLlavaConfig(LlavaConfig):
    """LLaVA's configuration and the width of the teacher's language model, which its adapter was made for."""

    model_type = "cdist_llava"
    teacher_width: int = 4096


class CdistLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with a fetched teacher adapter; loads, saves and generates like any other transformers model."""

    config_class = CdistLlavaConfig

    def __init__(self, config: CdistLlavaConfig) -> None:
        super().__init__(config)
        middle = copy.deepcopy(config)
        middle.text_config.hidden_size = config.teacher_width
        projector = type(self.model.multi_modal_projector)(middle)
        self.model.multi_modal_projector = FetchedAdapter(
            projector, config.teacher_width, config.text_config.hidden_size
        )
        self.post_init()


AutoConfig.register(CdistLlavaConfig.model_type, CdistLlavaConfig)
AutoModelForImageTextToText.register(CdistLlavaConfig, CdistLlavaForConditionalGeneration)
AutoProcessor.register(CdistLlavaConfig, LlavaProcessor)


class Student:
    """How a student is made."""

    @staticmethod
    def from_store(store: Store, llm: str | Path, *, adapter: str = "fetched", seed: int = 0) -> PreTrainedModel:
        """Build the student from the teacher's side in a store and a language model directory.

        Args:
            store: an open store; the teacher's checkpoint itself is not needed.
            llm: a causal language model directory. With a config.json and no weights it starts at random.
            adapter: `fetched` (the teacher's frozen adapter and a trainable one after it) or `own` (a new projector
                of the student's width, as a student without teacher would have it).
            seed: of every weight that starts at random.

        Raises:
            UsageError: the directory is no causal language model, or its checkpoint does not fit.
            MismatchError: tokenizer or vocabulary disagree with the teacher's.
        """
        torch.manual_seed(seed)
        llm, teacher_dir = Path(llm), store.teacher_dir()
        teacher_config = load_config(teacher_dir)
        text = _language_model(llm)
        _check_tokenizer(llm, teacher_dir)
        if text.config.vocab_size < teacher_config.text_config.vocab_size:
            text.resize_token_embeddings(teacher_config.text_config.vocab_size, mean_resizing=False)
        student = _assemble(teacher_config, text.config, adapter, teacher_dir)
        _load_vision(student, teacher_dir, projector_name(teacher_config, teacher_dir), adapter)
        _load_language(student, text)
        use_tappable_attention(student)
        return student


def trainable_parts(student: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """The modules a recipe's `train` list can name: `adapter` and `llm`."""
    projector = student.model.multi_modal_projector
    adapter = projector.student if isinstance(projector, FetchedAdapter) else projector
    return {"adapter": [adapter], "llm": [student.get_decoder(), student.get_output_embeddings()]}


def freeze_all_but(student: PreTrainedModel, parts: list[str]) -> None:
    """Let the named parts learn and nothing else."""
    student.requires_grad_(False)
    modules = trainable_parts(student)
    for part in parts:
        for module in modules[part]:
            module.requires_grad_(True)


def _language_model(llm: Path) -> PreTrainedModel:
    config = load_config(llm)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"model type {config.model_type!r} is not a causal language model",
            where=str(llm),
            remedy="--student takes a language model directory; the vision side comes from the store",
        )
    if any(llm.glob("*.safetensors")):
        model, info = AutoModelForCausalLM.from_pretrained(
            llm, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        refuse_incomplete(info, llm)
        return model
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _check_tokenizer(llm: Path, teacher_dir: Path) -> None:
    """Where the language model brings its own tokenizer, every token must have the teacher's id."""
    if not any((llm / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return
    teacher = load_processor(teacher_dir).tokenizer.get_vocab()
    student = AutoTokenizer.from_pretrained(llm, local_files_only=True).get_vocab()
    wrong = [t for t, i in student.items() if t in teacher and teacher[t] != i]
    foreign = [t for t in student if t not in teacher]
    if wrong or len(foreign) > len(student) // 100:
        token = (wrong or foreign)[0]
        raise MismatchError(
            f"the student's tokenizer is not the teacher's: token {token!r} is {student[token]} in the student and "
            f"{teacher.get(token, 'absent')} in the teacher ({len(wrong)} differ, {len(foreign)} are unknown to it)",
            where=str(llm),
            remedy="distillation compares logits id by id: choose a language model of the teacher's family",
        )


def _assemble(
    teacher_config: PreTrainedConfig, text_config: PreTrainedConfig, adapter: str, teacher_dir: Path
) -> PreTrainedModel:
    if teacher_config.model_type != "llava":
        raise UsageError(
            f"no student class for a teacher of type {teacher_config.model_type!r} yet",
            where=str(teacher_dir),
        )
    fields = teacher_config.to_dict()
    for name in ("model_type", "architectures", "text_config", "dtype", "transformers_version"):
        fields.pop(name, None)
    fields["tie_word_embeddings"] = text_config.tie_word_embeddings
    if adapter == "own":
        return LlavaForConditionalGeneration(LlavaConfig(**fields, text_config=text_config))
    width = teacher_config.text_config.hidden_size
    return CdistLlavaForConditionalGeneration(CdistLlavaConfig(**fields, text_config=text_config, teacher_width=width))


def _load_vision(student: PreTrainedModel, teacher_dir: Path, projector: str, adapter: str) -> None:
    weights = {}
    for name, tensor in load_file(teacher_dir / VISION_FILE).items():
        if name.startswith(projector + "."):
            if adapter == "own":
                continue
            name = name.replace(projector, f"{projector}.teacher", 1)
        weights[name] = tensor.float()
    language_or_new = set(student.state_dict()) - set(weights)
    result = student.load_state_dict(weights, strict=False)
    if result.unexpected_keys or any("vision_tower" in k or ".teacher." in k for k in language_or_new):
        raise MismatchError(
            "the teacher's vision side in the store does not fit its own configuration: "
            f"{sorted(result.unexpected_keys or language_or_new)[:3]}",
            where=str(teacher_dir / VISION_FILE),
            remedy="write the store again with this version of cdist",
        )


def _load_language(student: PreTrainedModel, text: PreTrainedModel) -> None:
    student.get_decoder().load_state_dict(text.get_decoder().state_dict())
    student.get_output_embeddings().load_state_dict(text.get_output_embeddings().state_dict())
