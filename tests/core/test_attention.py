"""Captured slices equal those computed from eager `output_attentions`."""

import pytest
import torch
from tiny import llava, llava_processor, samples, tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from compodistill.attention import tap_attention, use_tappable_attention
from compodistill.models import logits_at
from compodistill.tokens import collate, query_positions, tokenize


def eager(model, inputs, layer):
    """(B, T, T) head-averaged attention, and (B, T, C) logits, by transformers' own eager path."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, use_cache=False)
    return out.attentions[layer].mean(1), out.logits


def captured(model, inputs, layers, rows, columns, positions):
    use_tappable_attention(model)
    with torch.no_grad(), tap_attention(model, layers, rows, columns) as tap, logits_at(model, positions):
        logits = model(**inputs, use_cache=False).logits[0]
    return tap.slices, logits


def check(model, inputs, rows, columns):
    layers = range(2, 6)
    positions = [r[:3] for r in rows]
    slices, logits = captured(model, inputs, layers, rows, columns, positions)
    start = 0
    for layer in layers:
        expected, full_logits = eager(model, inputs, layer)
        for b, (r, c) in enumerate(zip(rows, columns, strict=True)):
            torch.testing.assert_close(slices[layer][b], expected[b][r][:, c], rtol=0, atol=1e-5)
    for b, p in enumerate(positions):
        torch.testing.assert_close(logits[start : start + len(p)], full_logits[b][p], rtol=1e-5, atol=1e-5)
        start += len(p)


@pytest.mark.parametrize("rows", ["all", "visual", "text", "answer"])
def test_llava_slices_and_logits_equal_eager_in_a_batch_of_unequal_lengths(rows):
    processor = llava_processor()
    tokens = [tokenize(processor, s, 1) for s in samples()]
    check(
        llava(),
        collate(tokens, 0),
        [query_positions(t, rows) for t in tokens],
        [t.visual_positions for t in tokens],
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_the_slices(side):
    processor = llava_processor()
    t = tokenize(processor, samples()[0], 1)
    n, pad = len(t.input_ids), 13
    shift = pad if side == "left" else 0
    inputs = collate([t], 0, bucket=1)
    for name in ("input_ids", "attention_mask"):
        filled = torch.zeros(1, n + pad, dtype=torch.int64)
        filled[:, shift : shift + n] = inputs[name]
        inputs[name] = filled
    check(llava(), inputs, [query_positions(t, "all") + shift], [t.visual_positions + shift])


def qwen2_5_vl():
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        image_token_id=1,
        vision_start_token_id=2,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def test_qwen2_5_vl_slices_and_logits_equal_eager_with_dynamic_numbers_of_visual_tokens():
    model = qwen2_5_vl()
    generator = torch.Generator().manual_seed(3)
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]])  # merged 2x2: 6 and 8 visual tokens
    lengths, starts, visual = [25, 31], [4, 9], [6, 8]
    ids = torch.zeros(2, 40, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b in range(2):
        ids[b, : lengths[b]] = torch.randint(10, 200, (lengths[b],), generator=generator)
        ids[b, starts[b] - 1] = 2
        ids[b, starts[b] : starts[b] + visual[b]] = 1
        mask[b, : lengths[b]] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == 1).long(),
        "image_grid_thw": grids,
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator),
    }
    columns = [torch.nonzero(ids[b] == 1).flatten() for b in range(2)]
    rows = [torch.arange(starts[b], lengths[b]) for b in range(2)]
    check(model, inputs, rows, columns)


def test_gradient_through_a_slice_equals_the_gradient_through_eager_attention():
    processor = llava_processor()
    tokens = [tokenize(processor, s, 1) for s in samples()[:3]]
    inputs = collate(tokens, 0)
    rows, columns = [query_positions(t, "all") for t in tokens], [t.visual_positions for t in tokens]
    weights = [
        torch.randn(len(r), len(c), generator=torch.Generator().manual_seed(b))
        for b, (r, c) in enumerate(zip(rows, columns, strict=True))
    ]
    grads = []
    for way in ("eager", "tap"):
        model = llava()
        if way == "eager":
            model.set_attn_implementation("eager")
            attention = model(**inputs, output_attentions=True, use_cache=False).attentions[3].mean(1)
            slices = [attention[b][r][:, c] for b, (r, c) in enumerate(zip(rows, columns, strict=True))]
        else:
            use_tappable_attention(model)
            with tap_attention(model, [3], rows, columns) as tap:
                model(**inputs, use_cache=False)
            slices = tap.slices[3]
        sum((w * s).sum() for w, s in zip(weights, slices, strict=True)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-5)


def test_a_tap_leaves_the_output_of_the_model_alone():
    processor = llava_processor()
    tokens = [tokenize(processor, samples()[0], 1)]
    inputs = collate(tokens, 0)
    model = llava()
    use_tappable_attention(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with tap_attention(model, [2], [query_positions(tokens[0], "all")], [tokens[0].visual_positions]):
            tapped = model(**inputs).logits
    assert torch.equal(plain, tapped)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
