"""Tiny random models, processors and samples, built in code and saved as ordinary Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from compodistill.samples import Sample, Turn

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<image>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
PATCH, SIDE = 6, 24  # 16 visual tokens an image


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text, 256 + special ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|end|>")
    out.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return out


def llava_processor() -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=0,
    )


def text_config(layers: int = 8, width: int = 32, vocab: int | None = None) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab or len(tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough that attention is far from uniform
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=5,
    )


def llava(seed: int = 0, layers: int = 8, width: int = 32) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(layers, width),
        image_token_index=1,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def save_llava(path: Path, **kwargs: int) -> Path:
    llava(**kwargs).save_pretrained(path)
    llava_processor().save_pretrained(path)
    return path


def image(seed: int, width: int = 30, height: int = 26) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(key: str, *turns: tuple[str, str], seed: int = 0) -> Sample:
    """A sample from (role, text) pairs; `<image>` in a text becomes an image mark."""
    made = []
    for role, text in turns:
        parts: list[str | None] = []
        for i, piece in enumerate(text.split("<image>")):
            parts += ([None] if i else []) + ([piece] if piece else [])
        made.append(Turn(role, tuple(parts)))
    n_images = sum(p is None for t in made for p in t.parts)
    return Sample(key, tuple(made), tuple(image(seed + i) for i in range(n_images)))


def samples() -> list[Sample]:
    """The hard inputs: unequal lengths, no image, two images, image in the second turn, RTL text, one-token answer."""
    return [
        sample("one", ("user", "<image>what is this?"), ("assistant", "a cat on a mat"), seed=1),
        sample("text", ("user", "say something"), ("assistant", "something"), seed=2),
        sample("two", ("user", "<image>and<image>differ how?"), ("assistant", "in colour"), seed=3),
        sample(
            "second-turn",
            ("system", "be brief"),
            ("user", "hello"),
            ("assistant", "hi"),
            ("user", "look: <image>"),
            ("assistant", "a dog"),
            seed=5,
        ),
        sample("rtl", ("user", "<image>מה זה?"), ("assistant", "חתול על מחצלת"), seed=6),
        sample("short", ("user", "<image>?"), ("assistant", "y"), seed=7),
    ]
