"""Two linear layers are one: the student adapter goes into the last layer of the teacher's projector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from compodistill.errors import UsageError
from compodistill.models import PROJECTORS
from compodistill.train.lora import merge_lora
from compodistill.train.student_classes import PREFIX, Family, FetchedAdapter, family_of, projector_of, student_config


@dataclass(frozen=True)
class Folded:
    """A student without its fetched adapter.

    Attributes:
        model: of the family's plain class; where `middle` is not None, of that class but for the projector's width.
        middle: the width of the projector's hidden layer where no plain class can have it, else None.
    """

    model: PreTrainedModel
    middle: int | None


def fold(student: PreTrainedModel) -> Folded:
    """Merge LoRA, fold the student adapter, and give back a model of the family's plain class.

    Where a family ties the width of the projector's hidden layer to the language model's, a narrower teacher's layer
    is widened with zeros, which changes nothing; a wider teacher's keeps its width.
    """
    merge_lora(student)
    projector = projector_of(student)
    if not isinstance(projector, FetchedAdapter):
        return Folded(student, None)
    family, config = family_of(student.config), student.config
    plain = family.model_class(
        student_config(config, config.text_config, fetched=False, tied=config.tie_word_embeddings)
    )
    layers = {name: module for name, module in projector.teacher.named_modules() if isinstance(module, nn.Linear)}
    last = folded_linear(layers[family.last], projector.student)
    state = {f"{name}.{field}": tensor for name, tensor, field in _parameters(family.last, last)}
    middle = None
    if family.first is not None:
        width, room = config.teacher_width, config.text_config.hidden_size
        if width > room:
            middle = width
            widen_to(plain, family, width)
        else:
            _require_zero_at_zero(config.projector_hidden_act)
            first = layers[family.first]
            state.update({f"{n}.{field}": _padded(t, 0, room) for n, t, field in _parameters(family.first, first)})
            state[f"{family.last}.weight"] = _padded(state[f"{family.last}.weight"], 1, room)
    where = PROJECTORS[config.model_type]
    weights = {n: t for n, t in student.state_dict().items() if not n.startswith(f"{where}.")}
    for name, tensor in {**projector.teacher.state_dict(), **state}.items():
        weights[f"{where}.{name}"] = tensor
    plain.load_state_dict(weights)
    plain.generation_config = student.generation_config
    return Folded(plain.to(student.dtype).eval(), middle)


def folded_linear(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """The one layer that computes second(first(x)), worked out in float64."""
    has_bias = first.bias is not None or second.bias is not None
    folded = nn.Linear(first.in_features, second.out_features, bias=has_bias)
    with torch.no_grad():
        folded.weight.copy_(second.weight.double() @ first.weight.double())
        if has_bias:
            bias = torch.zeros(second.out_features, dtype=torch.float64)
            if first.bias is not None:
                bias += second.weight.double() @ first.bias.double()
            if second.bias is not None:
                bias += second.bias.double()
            folded.bias.copy_(bias)
    return folded


def widen_to(plain: PreTrainedModel, family: Family, middle: int) -> None:
    """Give the projector of a plain model a hidden layer of another width, as the exported modelling file does."""
    projector = projector_of(plain)
    first, last = projector.get_submodule(family.first or ""), projector.get_submodule(family.last)
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    bias = last.bias is not None
    projector.set_submodule(family.first or "", nn.Linear(first.in_features, middle, bias=first.bias is not None))
    projector.set_submodule(family.last, nn.Linear(middle, last.out_features, bias=bias))


def custom_type(model_type: str) -> str:
    """The model type of an exported directory with its own modelling file.

    Not the students' `cdist_...`: where cdist is installed that one is the class with the adapter still unfolded.
    """
    return f"{model_type.removeprefix(PREFIX)}_wide_projector"


def _parameters(name: str, layer: nn.Linear) -> list[tuple[str, torch.Tensor, str]]:
    return [(name, tensor.detach(), field) for field, tensor in layer.named_parameters()]


def _padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _require_zero_at_zero(activation: str) -> None:
    if float(ACT2FN[activation](torch.zeros(()))) != 0:
        raise UsageError(
            f"the projector's activation {activation!r} is not 0 at 0: its hidden layer cannot be widened with zeros",
            remedy="export to a language model of the teacher's width, or load the student with cdist installed",
        )
