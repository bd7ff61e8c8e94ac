"""Teachers of every family and what a student needs of them, as a store would hold it; no processor needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import torch
from families import Case
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config

from compodistill.models import VISION_FILE, vision_side
from compodistill.train.student import build_student

LAYERS, WIDTH = 4, 16
SHAPE = {
    "vocab_size": families.VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}


def llava() -> Case:
    """Not among the families of tests/families.py, which tests/tiny.py's LLaVA precedes."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=families.CLIP,
        text_config={**families.TEXT, "model_type": "llama"},
        image_token_index=families.IMAGE,
        vision_feature_layer=-1,
    )
    pixels = {"pixel_values": families._random(3, 3, 16, 16)}
    return families._case(LlavaForConditionalGeneration(config), [(2, [16], 7), (5, [16, 16], 3)], pixels)


TEACHERS: dict[str, Callable[[], Case]] = {
    "llava": llava,
    **{
        n: families.FAMILIES[n]
        for n in (
            "llava_next",
            "llava_onevision",
            "internvl",
            "idefics3",
            "smolvlm",
            "paligemma",
            "paligemma2",
            "qwen2_vl",
            "qwen2_5_vl",
        )
    },
}
# LLaVA's student is of another type than its teacher's llama; the heads of Qwen-VL's are 8 wide as the teacher's are
TEXTS = {
    "paligemma": GemmaConfig(**SHAPE, head_dim=8),
    "paligemma2": Gemma2Config(
        **SHAPE,
        head_dim=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
        sliding_window=6,
    ),
    "idefics3": LlamaConfig(**SHAPE, tie_word_embeddings=True),
}


def text_config(family: str):
    return TEXTS.get(family, Qwen2Config(**SHAPE))


def teacher_files(model: PreTrainedModel, out: Path) -> Path:
    """What precompute leaves of a teacher, processor apart."""
    out.mkdir(parents=True)
    model.config.save_pretrained(out)
    save_file({n: t.contiguous() for n, t in vision_side(model).items()}, out / VISION_FILE)
    return out


def make_student(family: str, out: Path, adapter: str = "fetched", seed: int = 3) -> tuple[Case, PreTrainedModel]:
    """A teacher with a batch for it, and a student made from its files and a language model with weights."""
    torch.manual_seed(0)
    case = TEACHERS[family]()
    teacher_files(case.model, out / "teacher")
    AutoModelForCausalLM.from_config(text_config(family)).save_pretrained(out / "llm")
    return case, build_student(out / "teacher", out / "llm", adapter=adapter, seed=seed)
