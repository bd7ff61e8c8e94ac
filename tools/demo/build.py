"""The parts a tiny LLaVA is made of: tokenizer, processor, configurations. All are ordinary Hugging Face objects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from compodistill.tools.demo.scenes import CELL

IMAGE, PAD, BOS, END = "<image>", "<|pad|>", "<|bos|>", "<|im_end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
VOCABULARY = 512
WIDTH = 64

# ChatML with one token for "a message of this role begins". Prefix-stable: the messages so far with a
# generation prompt are a prefix of the messages with the answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every word of the world is one token, and any other text is still representable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, END, *ROLES.values(), IMAGE]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        additional_special_tokens=list(ROLES.values()),
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, grid: int = 4) -> LlavaProcessor:
    side = CELL * grid
    images = SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def text_config(tokenizer: PreTrainedTokenizerFast, layers: int, width: int = WIDTH) -> Qwen3Config:
    """A small Qwen3 with grouped-query attention. The vocabulary is the tokenizer's, padded to VOCABULARY rows."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=max(VOCABULARY, len(tokenizer)),
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        # wide heads and a slow rotation leave enough dimensions to match words with what is seen at any distance
        head_dim=width // 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=1024,
        initializer_range=0.08,  # about 1/sqrt(width); with the usual .02 so narrow a model starts slowly
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast, grid: int = 4, layers: int = 8) -> LlavaConfig:
    """SigLIP whose patches are the world's cells (grid^2 visual tokens), a two-layer projector, a Qwen3."""
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=CELL * grid,
        patch_size=CELL,
        vision_use_head=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config(tokenizer, layers),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=grid * grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        dtype="float32",
    )


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=16,
    )


def write_student(out: str | Path, tokenizer: PreTrainedTokenizerFast, layers: int = 4, width: int = WIDTH) -> None:
    """A student's directory: a configuration without weights (random start by the run's seed) and the tokenizer."""
    text_config(tokenizer, layers, width).save_pretrained(out)
    tokenizer.save_pretrained(out)
