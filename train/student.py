"""The student: the teacher's own class with a smaller language model and a student adapter between.

Visual features go through the teacher's frozen vision tower and frozen adapter, then through a small trainable
module that brings them to the student's width (teacher adapter fetch, CompoDistill section 4.2).
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from compodistill.attention import use_tappable_attention
from compodistill.errors import MismatchError, UsageError
from compodistill.models import PROJECTORS, VISION_FILE, load_config, vision_side
from compodistill.store.reader import Store
from compodistill.train.language import check_vocabulary, fit_text_config, load_language_model
from compodistill.train.lora import apply_lora
from compodistill.train.student_classes import FAMILIES, STUDENTS, FetchedAdapter, projector_of, student_config

ADAPTERS = ("fetched", "own")
NEWLINE = "model.image_newline"  # LLaVA-NeXT and OneVision: a learned vector of the LLM's width at the end of each row


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
            MismatchError: tokenizer, vocabulary or type of the language model disagree with the teacher's.
        """
        return build_student(store.teacher_dir(), Path(llm), adapter=adapter, seed=seed)


def build_student(teacher_dir: Path, llm: Path, *, adapter: str = "fetched", seed: int = 0) -> PreTrainedModel:
    """`Student.from_store` from the teacher's files in a directory (config.json, processor, vision weights)."""
    if adapter not in ADAPTERS:
        raise UsageError(f"unknown adapter {adapter!r}", remedy=f"one of {', '.join(ADAPTERS)}")
    torch.manual_seed(seed)
    teacher = load_config(teacher_dir)
    if teacher.model_type not in FAMILIES:
        raise UsageError(
            f"no student class for a teacher of type {teacher.model_type!r}",
            where=str(teacher_dir),
            remedy="cdist export makes a plain model of a student of ours"
            if teacher.model_type in STUDENTS
            else f"teachers a student can be made for: {', '.join(FAMILIES)}",
        )
    text = load_language_model(llm)
    check_vocabulary(llm, text.config, teacher, teacher_dir)
    fit_text_config(text.config, teacher, llm)  # refuses before anything is resized
    if text.config.vocab_size < teacher.text_config.vocab_size:
        text.resize_token_embeddings(teacher.text_config.vocab_size, mean_resizing=False)
    student = _assemble(teacher, text.config, adapter, llm)
    _load_vision(student, teacher_dir)
    _load_language(student, text, llm)
    if (teacher_dir / "generation_config.json").is_file():  # the chat template's end of turn is the teacher's
        student.generation_config = GenerationConfig.from_pretrained(teacher_dir, local_files_only=True)
    use_tappable_attention(student)
    _require_same_text(student, text, llm)
    return student


def trainable_parts(student: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The parameters a recipe's `train` list can name: `adapter` and `llm`."""
    projector = projector_of(student)
    adapter = list((projector.student if isinstance(projector, FetchedAdapter) else projector).parameters())
    adapter += [p for name, p in student.named_parameters() if name == NEWLINE]
    llm = [*student.get_decoder().parameters(), *student.get_output_embeddings().parameters()]
    return {"adapter": adapter, "llm": llm}


def freeze_all_but(student: PreTrainedModel, parts: list[str], lora: dict[str, Any] | None = None) -> None:
    """Let the named parts learn and nothing else.

    Args:
        lora: where given, `llm` learns through low-rank matrices alone: the arguments of `apply_lora`.
            `merge_lora` takes them out again.
    """
    student.requires_grad_(False)
    for part in parts:
        if part == "llm" and lora is not None:
            continue
        for parameter in trainable_parts(student)[part]:
            parameter.requires_grad_(True)
    if "llm" in parts and lora is not None:
        learning = [p for p in student.parameters() if p.requires_grad]
        for parameter in [*apply_lora(student, **lora), *learning]:  # peft freezes all that is not its own
            parameter.requires_grad_(True)


def _assemble(teacher: PreTrainedConfig, llm: PreTrainedConfig, adapter: str, where: Path) -> PreTrainedModel:
    text_config = fit_text_config(llm, teacher, where)
    fetched = adapter == "fetched"
    try:
        config = student_config(teacher, text_config, fetched=fetched, tied=llm.tie_word_embeddings)
        model_class = STUDENTS[config.model_type][1] if fetched else FAMILIES[config.model_type].model_class
        return model_class(config)
    except (AttributeError, TypeError, ValueError) as e:
        raise MismatchError(
            f"a {teacher.model_type} model cannot be made with a language model of type {llm.model_type}: {e}",
            where=str(where),
            remedy=f"choose a language model of the teacher's type, {teacher.text_config.model_type}",
        ) from e


def _load_vision(student: PreTrainedModel, teacher_dir: Path) -> None:
    """The teacher's vision tower, and its projector where it is fetched."""
    projector = PROJECTORS[student.config.model_type]
    adapter = projector_of(student)
    fetched = isinstance(adapter, FetchedAdapter)
    weights = {name: tensor.float() for name, tensor in load_file(teacher_dir / VISION_FILE).items()}
    newline = weights.pop(NEWLINE, None)
    new = {name for name in vision_side(student) if name == NEWLINE}
    if fetched:
        new |= {n for n in vision_side(student) if n.startswith(f"{projector}.student.")}
        inside, outside = f"{projector}.", f"{projector}.teacher."
        weights = {n.replace(inside, outside, 1) if n.startswith(inside) else n: t for n, t in weights.items()}
    else:
        new |= {n for n in vision_side(student) if n.startswith(f"{projector}.")}
        weights = {n: t for n, t in weights.items() if not n.startswith(f"{projector}.")}
    wrong = sorted(weights.keys() ^ (vision_side(student).keys() - new))
    shapes = student.state_dict()
    wrong += [n for n, t in weights.items() if n in shapes and t.shape != shapes[n].shape]
    if wrong:
        raise MismatchError(
            f"the teacher's vision side in the store does not fit its own configuration: {', '.join(wrong[:3])}",
            where=str(teacher_dir / VISION_FILE),
            remedy="write the store again with this version of cdist",
        )
    student.load_state_dict(weights, strict=False)
    if newline is not None and isinstance(
        adapter, FetchedAdapter
    ):  # it stands among the projector's outputs, so it goes the same way at first
        with torch.no_grad():
            student.get_parameter(NEWLINE).copy_(adapter.student(newline))


def _load_language(student: PreTrainedModel, text: PreTrainedModel, llm: Path) -> None:
    try:
        student.get_decoder().load_state_dict(text.get_decoder().state_dict())
        student.get_output_embeddings().load_state_dict(text.get_output_embeddings().state_dict())
    except RuntimeError as e:
        raise MismatchError(
            f"the language model's weights do not fit the student's decoder: {e}",
            where=str(llm),
            remedy="choose a language model of the teacher's text type, with an output layer without bias",
        ) from e


@torch.no_grad()
def _require_same_text(student: PreTrainedModel, text: PreTrainedModel, llm: Path) -> None:
    """On a few tokens without image the student computes what its language model computes.

    Some language models do more around their decoder than a vision-language class does (scale or cap their logits),
    and would be silently another model inside it.
    """
    special = {v for k, v in student.config.to_dict().items() if k.endswith(("_token_id", "_token_index"))}
    ids = torch.tensor([[i for i in range(3, text.config.vocab_size) if i not in special][:8]])
    more = {}
    if "token_type_ids" in inspect.signature(student.forward).parameters:  # PaliGemma: 1 is causal text
        more["token_type_ids"] = torch.ones_like(ids)
    modes = student.training, text.training
    ours = student.eval()(input_ids=ids, **more, use_cache=False).logits
    theirs = text.eval()(input_ids=ids, use_cache=False).logits
    student.train(modes[0])
    text.train(modes[1])
    off = float((ours - theirs).abs().max())
    if not off <= 1e-3 * float(theirs.abs().max().clamp_min(1)):
        raise MismatchError(
            f"inside a {student.config.model_type} the language model computes something else than alone: on text "
            f"without image their logits differ by {off:.3g}, where the largest is {float(theirs.abs().max()):.3g}",
            where=str(llm),
            remedy="choose a language model of another type: this one does more around its decoder than the "
            "teacher's class would",
        )
