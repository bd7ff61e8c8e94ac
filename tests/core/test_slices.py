"""The slice and its gradient equal those of plain softmax attention, for every kind of mask."""

import pytest
import torch

from compodistill.slices import VisualSlice, log_sum_exp, softcapped_attention

T, E, HEADS, KEY_HEADS = 150, 8, 4, 2  # longer than one chunk of queries
ROWS = torch.cat([torch.arange(3, 60), torch.arange(70, T)])
COLUMNS = torch.cat([torch.arange(3, 20), torch.arange(40, 55)])
SCALE = E**-0.5


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(HEADS, T, E, generator=g).requires_grad_()
    key = torch.randn(KEY_HEADS, T, E, generator=g).requires_grad_()
    return query, key


def masks():
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    window = causal & ~torch.ones(T, T, dtype=torch.bool).tril(-25)
    block = causal.clone()
    block[3:20, 3:20] = True
    additive = torch.zeros(T, T).masked_fill(~causal, -torch.inf)
    return {
        "none": (None, False),
        "causal": (None, True),
        "boolean": (causal, True),
        "window": (window, True),
        "bidirectional block": (block, True),
        "additive": (additive, True),
    }


def plain(query, key, mask, causal, softcap):
    scores = query @ key.repeat_interleave(HEADS // KEY_HEADS, 0).transpose(1, 2) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", masks())
def test_slice_and_gradient_equal_plain_attention(name, softcap):
    mask, causal = masks()[name]
    query, key = inputs()
    weight = torch.randn(len(ROWS), len(COLUMNS), generator=torch.Generator().manual_seed(1))
    expected = plain(query, key, mask, causal, softcap).mean(0)[ROWS][:, COLUMNS]
    expected_grads = torch.autograd.grad((expected * weight).sum(), (query, key))
    lse = log_sum_exp(query, key, mask, SCALE, causal, softcap)
    got = VisualSlice.apply(query, key, lse, mask, ROWS, COLUMNS, SCALE, causal, softcap)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), (query, key)), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", masks())
def test_soft_capped_output_equals_plain_attention(name):
    mask, causal = masks()[name]
    query, key = inputs()
    value = torch.randn(KEY_HEADS, T, E, generator=torch.Generator().manual_seed(5))
    expected = plain(query, key, mask, causal, 1.5) @ value.repeat_interleave(HEADS // KEY_HEADS, 0)
    mask_BHTT = None if mask is None else mask[None, None]
    got = softcapped_attention(query[None], key[None], value[None], mask_BHTT, SCALE, causal, 1.5)
    torch.testing.assert_close(got[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_sample_without_rows_or_columns_has_an_empty_slice():
    query, key = inputs()
    none = torch.empty(0, dtype=torch.int64)
    lse = log_sum_exp(query, key, None, SCALE, True, None)
    assert VisualSlice.apply(query, key, lse, None, none, none, SCALE, True, None).shape == (0, 0)
    assert VisualSlice.apply(query, key, lse, None, ROWS, none, SCALE, True, None).shape == (len(ROWS), 0)
