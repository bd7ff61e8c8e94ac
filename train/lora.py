"""Low-rank adaptation of the student's language model: put in before a stage, merged into the weights after it."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from compodistill.errors import UsageError


def apply_lora(
    student: PreTrainedModel,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
) -> list[nn.Parameter]:
    """Put low-rank matrices beside linear layers of the decoder, in place, and freeze everything else.

    Args:
        targets: names of layers (`q_proj`, `down_proj`, ...); None takes every linear layer of the decoder. The LM
            head and the embeddings are never among them.

    Returns:
        The new parameters, the only ones that learn.

    Raises:
        UsageError: no layer of the decoder has one of the names.
    """
    decoder = student.get_decoder()
    prefix = next(name for name, module in student.named_modules() if module is decoder)
    linear = [n for n, m in decoder.named_modules() if isinstance(m, nn.Linear)]
    leaves = {n.rpartition(".")[2] for n in linear}
    if targets is not None and (unknown := sorted(set(targets) - leaves)):
        raise UsageError(
            f"no linear layer of the student's decoder is named {unknown[0]!r}",
            where="lora.targets",
            remedy=f"its layers: {', '.join(sorted(leaves))}",
        )
    chosen = [f"{prefix}.{n}" for n in linear if targets is None or n.rpartition(".")[2] in targets]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, bias="none"), student
    )
    return [p for p in decoder.parameters() if p.requires_grad]


def merge_lora(student: PreTrainedModel) -> int:
    """Add the low-rank products to the weights and take the matrices out again, in place.

    Returns:
        How many layers were merged; 0 where the student has none.
    """
    layers = [(n, m) for n, m in student.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)  # raises where the product is not finite
        student.set_submodule(name, layer.get_base_layer())
    if hasattr(student, "peft_config"):
        del student.peft_config
    return len(layers)
