"""The student's language model: read from its directory, held against the teacher's vocabulary, fitted to its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen2VLTextConfig,
)

from compodistill.errors import MismatchError, UsageError
from compodistill.models import load_config, load_processor, refuse_incomplete
from compodistill.train.student_classes import family_of

MROPE_TEXTS = (Qwen2VLTextConfig, Qwen2_5_VLTextConfig)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
PADDING = 0.02  # vocabularies of one tokenizer differ by a few added tokens and padded rows, not by more


def load_language_model(llm: Path) -> PreTrainedModel:
    """The causal language model of a directory, float32; at random where it has a config.json and no weights.

    Raises:
        UsageError: no causal language model, or its checkpoint does not fit.
    """
    config = load_config(llm)
    if isinstance(config, MROPE_TEXTS):  # a decoder taken out of a Qwen-VL: on text alone it is a Qwen2
        fields = _plain_fields(config)
        rope = {k: v for k, v in fields["rope_parameters"].items() if k != "mrope_section"}
        config = Qwen2Config(**{**fields, "rope_parameters": rope})
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"model type {config.model_type!r} is not a causal language model",
            where=str(llm),
            remedy="--student takes a language model directory; the vision side comes from the store",
        )
    if any(llm.glob("*.safetensors")):
        model, info = AutoModelForCausalLM.from_pretrained(
            llm, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        refuse_incomplete(info, llm)
        return model
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_vocabulary(llm: Path, student: PreTrainedConfig, teacher: PreTrainedConfig, teacher_dir: Path) -> None:
    """Every token of the language model must have the teacher's id: distillation compares logits id by id.

    With a tokenizer beside the language model its tokens are compared; without one, weights there are must at least
    be of a vocabulary of about the teacher's size. A language model without weights has no vocabulary of its own yet.

    Raises:
        MismatchError: names a token and both ids, or both sizes.
    """
    if any((llm / name).is_file() for name in TOKENIZER_FILES):
        _compare_tokenizers(llm, teacher_dir)
    elif any(llm.glob("*.safetensors")):
        ours, theirs = student.vocab_size, teacher.get_text_config(decoder=True).vocab_size
        if abs(ours - theirs) > PADDING * theirs:
            raise MismatchError(
                f"the student's vocabulary has {ours} tokens and the teacher's {theirs}, and the directory has no "
                "tokenizer by which its tokens could be compared",
                where=str(llm),
                remedy="put the language model's tokenizer files beside its config.json, or choose a language model "
                "of the teacher's family",
            )


def _compare_tokenizers(llm: Path, teacher_dir: Path) -> None:
    teacher = load_processor(teacher_dir).tokenizer.get_vocab()
    try:
        student = AutoTokenizer.from_pretrained(llm, trust_remote_code=False, local_files_only=True).get_vocab()
    except (ValueError, OSError, ImportError, KeyError) as e:
        raise UsageError(
            f"the student's tokenizer cannot be loaded: {e}",
            where=str(llm),
            remedy="save it again with save_pretrained, or remove its files if its tokens have the teacher's ids",
        ) from e
    moved = [t for t, i in student.items() if t in teacher and teacher[t] != i]
    foreign = [t for t in student if t not in teacher]
    if moved or len(foreign) > PADDING / 2 * len(student):
        token = (moved or foreign)[0]
        raise MismatchError(
            f"the student's tokenizer is not the teacher's: token {token!r} is {student[token]} in the student and "
            f"{teacher.get(token, 'absent')} in the teacher; of the student's {len(student)} tokens {len(moved)} have "
            f"another id there and {len(foreign)} are unknown to it",
            where=str(llm),
            remedy="distillation compares logits id by id: choose a language model of the teacher's family",
        )


def fit_text_config(llm: PreTrainedConfig, teacher: PreTrainedConfig, where: Path) -> PreTrainedConfig:
    """The language model's configuration in the form the teacher's class takes.

    Families that take any decoder get it as it is. Qwen2-VL and Qwen2.5-VL take their own text type, which computes
    what a Qwen2 does and reads positions in three dimensions: its sections of the rotary frequencies are the
    teacher's, in proportion where the head is narrower; the frequencies stay those the language model was trained with.

    Raises:
        MismatchError: a type the family's class cannot hold, or a head the sections do not divide.
    """
    types = family_of(teacher).text_types
    if not types or llm.model_type in types:
        return llm
    text = teacher.text_config
    if not isinstance(text, MROPE_TEXTS) or llm.model_type != "qwen2":
        takes = " or ".join(types) if not isinstance(text, MROPE_TEXTS) else f"qwen2 or {types[0]}"
        raise MismatchError(
            f"a {teacher.model_type} model holds a language model of type {takes}, this one is {llm.model_type}",
            where=str(where),
            remedy=f"choose a language model of type {takes}",
        )
    fields = _plain_fields(llm)
    fields["rope_parameters"] = {
        **fields["rope_parameters"],
        "mrope_section": _sections(text, llm.hidden_size // llm.num_attention_heads, where),
    }
    return type(text)(**fields)


def _sections(teacher: PreTrainedConfig, head_dim: int, where: Path) -> list[int]:
    sections = teacher.rope_parameters.get("mrope_section", [16, 24, 24])
    scaled = [s * (head_dim // 2) / sum(sections) for s in sections]
    if head_dim % 2 or any(s != int(s) or s == 0 for s in scaled):
        raise MismatchError(
            f"mrope_section {list(sections)} of the teacher (head_dim {2 * sum(sections)}) cannot be divided in the "
            f"same proportion over the student's head_dim {head_dim}",
            where=str(where),
            remedy="choose a language model whose head_dim is the teacher's, or a fraction of it",
        )
    return [int(s) for s in scaled]


def _plain_fields(config: PreTrainedConfig) -> dict[str, Any]:
    left_out = ("model_type", "architectures", "dtype", "transformers_version", "_name_or_path")
    return {k: v for k, v in config.to_dict().items() if k not in left_out}
