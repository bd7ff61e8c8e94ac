"""A tiny random model of each family cdist serves, and a batch for it, at model level (no processor, no torchvision).

Each batch has two samples of unequal length with different numbers of images or visual tokens, right-padded; the
second one's image does not stand at the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE, START = 1, 2
VOCAB, LAYERS, WIDTH = 96, 8, 32
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
CLIP = {**{k: v for k, v in SIGLIP.items() if k != "vision_use_head"}, "model_type": "clip_vision_model"}


@dataclass
class Case:
    """A model, its inputs, and for each sample the kept queries and the visual positions."""

    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    rows: list[torch.Tensor]
    columns: list[torch.Tensor]


def _case(
    model: PreTrainedModel, layout: list[tuple[int, list[int], int]], pixels: dict[str, Any], **marks: int
) -> Case:
    """`layout`: for each sample (text before, visual tokens of each image, text after each image)."""
    generator = torch.Generator().manual_seed(1)

    def words(n: int) -> list[int]:
        return torch.randint(10, VOCAB, (n,), generator=generator).tolist()

    rows_of_ids = []
    for before, images, after in layout:
        ids = words(before)
        for n in images:
            ids += [START] * marks.get("start", 0) + [IMAGE] * n + words(after)
        rows_of_ids.append(ids)
    length = -(-max(map(len, rows_of_ids)) // 8) * 8
    ids = torch.tensor([r + [0] * (length - len(r)) for r in rows_of_ids])
    mask = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows_of_ids])
    columns = [torch.nonzero(r == IMAGE).flatten() for r in ids]
    rows = [torch.arange(int(c[0]), len(r)) for c, r in zip(columns, rows_of_ids, strict=True)]
    inputs = {"input_ids": ids, "attention_mask": mask, **pixels}
    if marks.get("mm_types"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if marks.get("token_types"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return Case(model.eval(), inputs, rows, columns)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def llava_next() -> Case:
    config = LlavaNextConfig(
        vision_config=CLIP,
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        vision_feature_layer=-1,
    )
    # base image 4 x 4 and two tiles side by side, 4 x 8 and a newline a row: 16 + 4 * 9
    pixels = {"pixel_values": _random(2, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32], [16, 32]])}
    return _case(LlavaNextForConditionalGeneration(config), [(2, [52], 5), (6, [52], 9)], pixels)


def llava_onevision() -> Case:
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
    )
    pixels = {
        "pixel_values": _random(2, 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32], [16, 32]]),
        "batch_num_images": torch.tensor([1, 1]),
    }
    return _case(LlavaOnevisionForConditionalGeneration(config), [(2, [52], 5), (6, [52], 9)], pixels)


def _qwen(config_class: Any, model_class: Any, vision: dict[str, Any], patch_values: int, **text: Any) -> Case:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = config_class(
        text_config={**TEXT, "rope_parameters": rope, **text},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
    )
    grids = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 4, 4]])  # merged 2 x 2: 6, 8 and 4 visual tokens
    pixels = {"image_grid_thw": grids, "pixel_values": _random(int(grids.prod(1).sum()), patch_values)}
    return _case(model_class(config), [(3, [6], 12), (5, [8, 4], 4)], pixels, start=1, mm_types=1)


def qwen2_vl() -> Case:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision, 3 * 2 * 4 * 4)


def qwen2_5_vl() -> Case:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "fullatt_block_indexes": [1],
        "window_size": 16,
    }
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision, 3 * 2 * 4 * 4)


def qwen3_vl() -> Case:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision, 3 * 2 * 4 * 4)


def internvl() -> Case:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    }
    config = InternVLConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE, downsample_ratio=0.5
    )
    pixels = {"pixel_values": _random(3, 3, 16, 16)}  # 4 x 4 patches shuffled to 4 tokens a tile
    return _case(InternVLForConditionalGeneration(config), [(2, [4], 7), (5, [4, 4], 3)], pixels)


def _idefics(config_class: Any, model_class: Any) -> Case:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = config_class(
        vision_config=vision, text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE, scale_factor=2
    )
    pixel_values = _random(2, 3, 3, 16, 16)  # tiles; those of zeros alone are padding and leave the batch
    pixel_values[0, 1:] = 0
    pixels = {"pixel_values": pixel_values, "pixel_attention_mask": torch.ones(2, 3, 16, 16, dtype=torch.bool)}
    return _case(model_class(config), [(4, [4], 9), (3, [4, 4, 4], 2)], pixels)  # visual positions with gaps


def idefics3() -> Case:
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration)


def smolvlm() -> Case:
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration)


def paligemma(text_type: str = "gemma", **text: Any) -> Case:
    config = PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": WIDTH},
        text_config={**TEXT, "model_type": text_type, **text},
        image_token_index=IMAGE,
        projection_dim=WIDTH,
    )
    case = _case(
        PaliGemmaForConditionalGeneration(config), [(0, [16], 9), (0, [16], 5)], {"pixel_values": _random(2, 3, 16, 16)}
    )
    # image and prompt see each other (0), the answer is causal (1)
    types = torch.zeros_like(case.inputs["input_ids"])
    types[:, 19:] = 1
    case.inputs["token_type_ids"] = types
    return case


def paligemma2() -> Case:
    """Gemma 2 below: soft-capped attention and logits, sliding windows in every other layer."""
    return paligemma(
        "gemma2",
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
        sliding_window=6,
    )


def gemma3() -> Case:
    """Bidirectional image blocks, and windows so short that some rows see no visual key."""
    config = Gemma3Config(
        vision_config={**SIGLIP, "image_size": 16},
        text_config={
            **TEXT,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    )
    pixels = {"pixel_values": _random(3, 3, 16, 16)}
    return _case(Gemma3ForConditionalGeneration(config), [(2, [4], 14), (5, [4, 4], 6)], pixels, token_types=1)


FAMILIES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        idefics3,
        smolvlm,
        paligemma,
        paligemma2,
        gemma3,
    )
}
