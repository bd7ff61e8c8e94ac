"""A vision-language model directory, plus what cdist needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from compodistill.attention import use_tappable_attention
from compodistill.errors import UsageError

VISION_FILE = "vision.safetensors"  # among a store's teacher files: vision tower and projector, by their model names

# model type -> where its vision-to-LLM module (adapter, projector, connector, merger) hangs
PROJECTORS = {
    "llava": "model.multi_modal_projector",
    "llava_next": "model.multi_modal_projector",
    "llava_onevision": "model.multi_modal_projector",
    "internvl": "model.multi_modal_projector",
    "paligemma": "model.multi_modal_projector",
    "gemma3": "model.multi_modal_projector",
    "idefics3": "model.connector",
    "smolvlm": "model.connector",
    "qwen2_vl": "model.visual.merger",
    "qwen2_5_vl": "model.visual.merger",
    "qwen3_vl": "model.visual.merger",
}
# our students, registered with transformers by compodistill.train.student
PROJECTORS |= {f"cdist_{name}": where for name, where in PROJECTORS.items()}


@dataclass(frozen=True)
class VisionLanguageModel:
    """A loaded model and its processor.

    Attributes:
        model: the transformers model, eval mode, its decoder open to `tap_attention`.
        processor: its processor (tokenizer, image processor, chat template).
        path: where it was loaded from.
    """

    model: PreTrainedModel
    processor: Any
    path: Path

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def pad_token_id(self) -> int:
        return pad_token_id(self.processor)

    @property
    def n_layers(self) -> int:
        return len(self.model.get_decoder().layers)

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]


def load_config(path: Path) -> PreTrainedConfig:
    """The configuration of a model directory.

    Raises:
        UsageError: no such directory, no config.json, or a model type transformers does not know.
    """
    if not path.is_dir():
        raise UsageError(f"no model directory at {path}", remedy="give the path of a Hugging Face model directory")
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} has no config.json", remedy="give the path of a Hugging Face model directory")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as e:
        raise UsageError(f"the configuration cannot be read: {e}", where=str(path / "config.json")) from e


def load_processor(path: Path) -> Any:
    """The processor of a model directory.

    Raises:
        UsageError: it cannot be loaded, or has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, ImportError, KeyError) as e:
        raise UsageError(f"the processor cannot be loaded: {e}", where=str(path)) from e
    if not getattr(processor, "chat_template", None):
        raise UsageError(
            "the processor has no chat template",
            where=str(path),
            remedy="add chat_template.jinja to the directory: conversations are rendered by it",
        )
    return processor


def pad_token_id(processor: Any) -> int:
    """The id sequences are padded with (masked out, so any id will do where the tokenizer names none)."""
    return 0 if processor.tokenizer.pad_token_id is None else processor.tokenizer.pad_token_id


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VisionLanguageModel:
    """Load a vision-language model and its processor; runs no code of the directory.

    Raises:
        UsageError: not a directory, not a vision-language model cdist knows, or weights that are missing,
            unexpected or of the wrong shape (transformers would only log it and go on with random ones).
    """
    path = Path(path)
    config = load_config(path)
    projector_name(config, path)
    processor = load_processor(path)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError) as e:
        raise UsageError(f"the weights cannot be loaded: {e}", where=str(path)) from e
    refuse_incomplete(info, path)
    model.eval().requires_grad_(False).to(device)
    use_tappable_attention(model)
    return VisionLanguageModel(model, processor, path)


def refuse_incomplete(info: dict[str, Any], path: Path) -> None:
    """Raise UsageError where transformers' loading report names a key that was not loaded as it stands."""
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(fault) or ())):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UsageError(
                f"the checkpoint does not fit the model: {fault.replace('_', ' ')}: {shown}",
                where=str(path),
                remedy="save the model again with save_pretrained of the class its config.json names",
            )


def projector_name(config: PreTrainedConfig, path: Path) -> str:
    """The dotted name of the vision-to-LLM module.

    Raises:
        UsageError: the model type is not a vision-language model cdist can serve.
    """
    if config.model_type not in PROJECTORS:
        raise UsageError(
            f"model type {config.model_type!r} is not a vision-language model cdist can serve",
            where=str(path),
            remedy=f"supported: {', '.join(sorted(PROJECTORS))}",
        )
    return PROJECTORS[config.model_type]


def vision_side(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that are not the language model's: vision tower and projector, by their names in the model."""
    language = {id(p) for p in model.get_decoder().parameters()}
    language |= {id(p) for p in model.get_output_embeddings().parameters()}
    named = [
        *model.named_parameters(),
        *((n, b) for n, b in model.named_buffers() if n in model.state_dict()),
    ]
    decoder_buffers = {id(b) for b in model.get_decoder().buffers()}
    return {n: t.detach() for n, t in named if id(t) not in language and id(t) not in decoder_buffers}


@contextmanager
def logits_at(model: PreTrainedModel, positions: list[torch.Tensor], *, float32: bool = False) -> Iterator[None]:
    """Let the LM head see only some positions: inside, `model(...).logits` is (1, sum of A, C).

    The head's input is narrowed on its way in, so whatever the model does behind the head (soft-capping,
    scaling) still happens, and T x C logits never exist.

    Args:
        positions: for each sample of the batch, (A,) int64.
        float32: run the head in float32 whatever the model's dtype: bf16 logits have ties inside any top-k.
    """
    head: nn.Linear = model.get_output_embeddings()

    def narrow(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (_kept(args[0], positions)[None],)

    def widen(_: nn.Module, args: tuple[torch.Tensor, ...], __: torch.Tensor) -> torch.Tensor:
        weight, bias = head.weight, head.bias
        return nn.functional.linear(args[0].float(), weight.float(), None if bias is None else bias.float())

    handles = [head.register_forward_pre_hook(narrow)]
    if float32 and head.weight.dtype != torch.float32:
        handles.append(head.register_forward_hook(widen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hidden_at(model: PreTrainedModel, positions: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Collect the LM head's inputs at some positions instead of running it: a list that gets one (sum of A, D) tensor.

    Inside, `model(...).logits` is empty; `behind_the_head` says what the model would do to the logits.
    """
    head: nn.Linear = model.get_output_embeddings()
    collected: list[torch.Tensor] = []

    def collect(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        collected.append(_kept(args[0], positions))
        return (args[0][:, :0],)

    handle = head.register_forward_pre_hook(collect)
    try:
        yield collected
    finally:
        handle.remove()


def _kept(hidden_BTD: torch.Tensor, positions: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([hidden_BTD[b, p.to(hidden_BTD.device)] for b, p in enumerate(positions)])


def behind_the_head(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the model does to its head's output before it calls it logits.

    Raises:
        UsageError: it scales them in a way cdist does not know.
    """
    text = model.config.get_text_config(decoder=True)
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise UsageError(
                f"the model scales its logits ({name}), which the losses do not know",
                remedy="choose another student language model",
            )
    cap = getattr(text, "final_logit_softcapping", None)
    if cap is None:
        return lambda logits: logits
    return lambda logits: torch.tanh(logits / cap) * cap
