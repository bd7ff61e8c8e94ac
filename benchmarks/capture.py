"""What it costs to capture visual attention inside a forward pass.

A random LLaVA: 24 decoder layers, width 512, 8 heads (4 for keys), 960 tokens, 729 of them visual; the middle 40% of
the layers are captured. One thread. Each repetition runs every variant once, in turn:

    plain    SDPA forward, nothing captured          plain_again  the same: the noise of the comparison
    all      capture, every query from the image on  text         capture, queries that are not visual tokens
    eager    `output_attentions=True`, head mean, visual columns: what one writes without cdist

Memory is the growth of the resident peak over the loaded model, each variant in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from common import paired, parser, peak_mib, ratio, report
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from compodistill.attention import tap_attention, use_tappable_attention
from compodistill.groups import understanding_layers

LAYERS, WIDTH, TOKENS, SIDE = 24, 512, 960, 27
FIRST_VISUAL = 31  # as in the paper's prompts
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE * 4,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    use_tappable_attention(model)
    ids = torch.randint(10, 2048, (1, TOKENS))
    ids[:, FIRST_VISUAL : FIRST_VISUAL + SIDE**2] = 1
    pixels = torch.randn(1, 3, SIDE * 4, SIDE * 4).to(dtype)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class Variants:
    """The forward passes that are compared; none computes logits of more than one position."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model, self.inputs = build(dtype)
        self.columns = torch.nonzero(self.inputs["input_ids"][0] == 1).flatten()
        after = torch.arange(FIRST_VISUAL, TOKENS)
        self.rows = {"all": after, "text": after[~torch.isin(after, self.columns)]}

    def plain(self) -> object:
        return self.model(**self.inputs, use_cache=False, logits_to_keep=1)

    def captured(self, rows: str) -> object:
        layers = understanding_layers(LAYERS)
        with tap_attention(self.model, layers, [self.rows[rows]], [self.columns]) as tap:
            self.plain()
        return tap.slices

    def eager(self) -> object:
        self.model.set_attn_implementation("eager")
        out = self.model(**self.inputs, use_cache=False, logits_to_keep=1, output_attentions=True)
        slices = [
            out.attentions[i][0].mean(0)[self.rows["all"]][:, self.columns].float()
            for i in understanding_layers(LAYERS)
        ]
        self.model.set_attn_implementation("sdpa")
        use_tappable_attention(self.model)
        return slices

    def by_name(self) -> dict[str, object]:
        return {
            "plain": self.plain,
            "all": lambda: self.captured("all"),
            "text": lambda: self.captured("text"),
            "eager": self.eager,
        }


def memory_of(variant: str, dtype: str) -> float:
    """Growth of the resident peak, MiB, in a fresh process."""
    code = f"import capture; print(capture.growth({variant!r}, {dtype!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return float(done.stdout)


@torch.inference_mode()
def growth(variant: str, dtype: str) -> float:
    torch.set_num_threads(1)
    variants = Variants(DTYPES[dtype])
    before = peak_mib()
    variants.by_name()[variant]()
    return peak_mib() - before


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        variants = Variants(dtype)
        runs = {**variants.by_name(), "plain_again": variants.plain}
        times = paired(runs, 25 if options.full else 9)
        for rows in ("all", "text"):
            ratios[f"capture_{name}_{rows}"] = ratio(times, rows, "plain")
        ratios[f"plain_over_plain_{name}"] = ratio(times, "plain_again", "plain")
        ratios["eager_over_capture" if name == "fp32" else "eager_over_capture_bf16"] = ratio(times, "eager", "all")
        figures[f"plain_forward_s_{name}"] = sorted(times["plain"])[len(times["plain"]) // 2]
    memory = {variant: memory_of(variant, "fp32") for variant in ("plain", "all", "eager")}
    figures |= {f"memory_{variant}_mib": mib for variant, mib in memory.items()}
    ratios["extra_memory_vs_eager"] = (memory["all"] - memory["plain"]) / (memory["eager"] - memory["plain"])
    report("capture", ratios, figures, options.json)


if __name__ == "__main__":
    main()
