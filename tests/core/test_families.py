"""Every family: captured slices and logits equal eager attention and full logits, whatever the mask does."""

import pytest
import torch
from families import FAMILIES

from compodistill.attention import tap_attention, use_tappable_attention
from compodistill.models import PROJECTORS, logits_at


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_and_logits_equal_eager(family):
    torch.manual_seed(0)
    case = FAMILIES[family]()
    layers = range(2, 6)
    positions = [r[-3:] for r in case.rows]
    use_tappable_attention(case.model)
    with (
        torch.no_grad(),
        tap_attention(case.model, layers, case.rows, case.columns) as tap,
        logits_at(case.model, positions),
    ):
        logits = case.model(**case.inputs, use_cache=False).logits[0]
    case.model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = case.model(**case.inputs, use_cache=False, output_attentions=True)
    for layer in layers:
        for b, (rows, columns) in enumerate(zip(case.rows, case.columns, strict=True)):
            expected = eager.attentions[layer][b].mean(0)[rows][:, columns]
            torch.testing.assert_close(tap.slices[layer][b], expected, rtol=0, atol=1e-5)
            assert float(expected.max()) > 1e-3
    expected_logits = torch.cat([eager.logits[b, p] for b, p in enumerate(positions)])
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_projector_is_where_the_table_says(family):
    model = FAMILIES[family]().model
    assert model.get_submodule(PROJECTORS[model.config.model_type]) is not None
