"""The students' classes: for each family the teacher's own class, with the student adapter behind its projector.

One mechanism for all: a subclass of the family's class whose projector is replaced, after construction, by the
teacher's projector (of the teacher's width) and one linear layer to the student's width. A family is a row in
`FAMILIES`. Importing this module registers the classes with transformers' Auto classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel

from compodistill.models import PROJECTORS

TEXT_WIDTH = "text_config.hidden_size"
PREFIX = "cdist_"


@dataclass(frozen=True)
class Family:
    """What differs between families.

    Attributes:
        base: the common beginning of the names of its transformers classes.
        width: the configuration field the projector's output width comes from.
        last: the projector's last linear layer, by its dotted name in the projector.
        first: its first one where its output has the projector's output width too (a hidden layer tied to the
            language model's width), else None.
        text_types: the types of language model its class can hold; empty where it takes any.
    """

    base: str
    width: str
    last: str
    first: str | None = None
    text_types: tuple[str, ...] = ()

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return getattr(transformers, f"{self.base}Config")

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, f"{self.base}ForConditionalGeneration")


FAMILIES = {
    "llava": Family("Llava", TEXT_WIDTH, "linear_2", "linear_1"),
    "llava_next": Family("LlavaNext", TEXT_WIDTH, "linear_2", "linear_1"),
    "llava_onevision": Family("LlavaOnevision", TEXT_WIDTH, "linear_2", "linear_1"),
    "internvl": Family("InternVL", TEXT_WIDTH, "linear_2", "linear_1"),
    "idefics3": Family("Idefics3", TEXT_WIDTH, "modality_projection.proj"),
    "smolvlm": Family("SmolVLM", TEXT_WIDTH, "modality_projection.proj"),
    "paligemma": Family("PaliGemma", "projection_dim", "linear", text_types=("gemma", "gemma2")),
    "qwen2_vl": Family("Qwen2VL", "vision_config.hidden_size", "mlp.2", text_types=("qwen2_vl_text",)),
    "qwen2_5_vl": Family("Qwen2_5_VL", "vision_config.out_hidden_size", "mlp.2", text_types=("qwen2_5_vl_text",)),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's, a plain student's or one of our students' configurations."""
    return FAMILIES[config.model_type.removeprefix(PREFIX)]


class FetchedAdapter(nn.Module):
    """The teacher's adapter followed by the student's: (..., vision width) -> (..., student width)."""

    def __init__(self, teacher: nn.Module, teacher_width: int, student_width: int, bias: bool = True) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = nn.Linear(teacher_width, student_width, bias=bias)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.student(self.teacher(*args, **kwargs))


class _WithFetchedAdapter:
    """Mixed into a family's class: its projector becomes the teacher's, with the student adapter behind."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        assert isinstance(self, PreTrainedModel)
        family = family_of(config)
        projector = projector_of(self)
        if family.width == TEXT_WIDTH:  # elsewhere the configuration still names the teacher's width
            middle = copy.deepcopy(config)
            middle.text_config.hidden_size = config.teacher_width
            projector = type(projector)(middle)
        # a bias where the teacher's last layer has one, so that the two can always be folded into one layer
        bias = projector.get_submodule(family.last).bias is not None
        set_projector(self, FetchedAdapter(projector, config.teacher_width, config.text_config.hidden_size, bias=bias))
        self.post_init()


def projector_of(model: PreTrainedModel) -> nn.Module:
    """The vision-to-LLM module of a teacher or student."""
    return model.get_submodule(PROJECTORS[model.config.model_type])


def set_projector(model: PreTrainedModel, projector: nn.Module) -> None:
    """Put another module in the projector's place."""
    model.set_submodule(PROJECTORS[model.config.model_type], projector)


def student_config(
    teacher: PreTrainedConfig, text_config: PreTrainedConfig, *, fetched: bool, tied: bool
) -> PreTrainedConfig:
    """The configuration of a student: the teacher's, with another language model.

    Args:
        fetched: with the teacher's adapter and one more layer; else the family's plain configuration, its
            projector of the student's width.
        tied: whether the language model's head is its embedding.
    """
    family = family_of(teacher)
    fields = teacher.to_dict()
    for name in ("model_type", "architectures", "text_config", "dtype", "transformers_version", "auto_map"):
        fields.pop(name, None)
    width = fields.pop("teacher_width", None) or teacher.text_config.hidden_size
    fields["tie_word_embeddings"] = tied
    if fetched:
        model_type = PREFIX + teacher.model_type.removeprefix(PREFIX)
        return STUDENTS[model_type][0](**fields, text_config=text_config, teacher_width=width)
    if family.width != TEXT_WIDTH:
        *parents, name = family.width.split(".")
        section = fields
        for parent in parents:
            section = section[parent]
        section[name] = text_config.hidden_size
    return family.config_class(**fields, text_config=text_config)


def _student_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    family = FAMILIES[model_type]
    config = type(
        f"Cdist{family.base}Config",
        (family.config_class,),
        {
            "__module__": __name__,
            "__doc__": f"{family.base}Config and the width the teacher's adapter was made for.",
            "__annotations__": {"teacher_width": int},
            "model_type": PREFIX + model_type,
            "teacher_width": 4096,
        },
    )
    model = type(
        f"Cdist{family.base}ForConditionalGeneration",
        (_WithFetchedAdapter, family.model_class),
        {
            "__module__": __name__,
            "__doc__": f"{family.base} with a fetched teacher adapter; loads, saves and generates like any other.",
            "config_class": config,
        },
    )
    return config, model


# model type -> (configuration class, model class); the classes are also names of this module, as pickling needs
STUDENTS = {PREFIX + model_type: _student_classes(model_type) for model_type in FAMILIES}
for _model_type, (_config, _model) in STUDENTS.items():
    globals()[_config.__name__], globals()[_model.__name__] = _config, _model
    AutoConfig.register(_model_type, _config)
    AutoModelForImageTextToText.register(_config, _model)
    _base = FAMILIES[_model_type.removeprefix(PREFIX)].base
    AutoProcessor.register(_config, getattr(transformers, f"{_base}Processor"))
