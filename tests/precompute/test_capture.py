import numpy as np
import pytest
import torch
from tiny import samples, save_llava

from compodistill.models import load_model
from compodistill.precompute.capture import CaptureSettings, capture, top_k
from compodistill.precompute.run import PassOptions, same_length, signals_of_shard
from compodistill.tokens import BUCKET, tokenize

SETTINGS = CaptureSettings([(2, 4), (3, 5)], "all", 16)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_model(save_llava(tmp_path_factory.mktemp("teacher")))


def equal(a, b):
    return (
        a.key == b.key
        and a.digest == b.digest
        and all(
            np.array_equal(getattr(a, n), getattr(b, n))
            for n in ("supervised_positions", "query_positions", "visual_positions", "attention")
        )
        and all(np.array_equal(getattr(a.logits, n), getattr(b.logits, n)) for n in ("ids", "logprobs", "lse"))
    )


def test_signals_of_a_sample_do_not_depend_on_its_neighbours_in_the_shard(teacher, tmp_path, shard_of):
    together = [
        s for s, _ in signals_of_shard(teacher, shard_of(samples(), tmp_path / "s.tar"), SETTINGS, PassOptions())
    ]
    assert [s.key for s in together] == [s.key for s in samples()]
    for i, sample in enumerate(samples()):
        shard = shard_of([sample], tmp_path / f"{i}.tar")
        ((alone, _),) = signals_of_shard(teacher, shard, SETTINGS, PassOptions())
        assert equal(alone, together[i])


def test_text_only_sample_has_logits_and_an_empty_slice(teacher):
    tokens = tokenize(teacher.processor, samples()[1], 1)
    (signals,) = capture(teacher, [tokens], SETTINGS)
    assert signals.attention.shape == (2, 0, 0)
    assert signals.logits.ids.shape == (len(tokens.supervised_positions), 16)


def test_group_is_the_mean_of_its_layers(teacher):
    tokens = tokenize(teacher.processor, samples()[0], 1)
    (grouped,) = capture(teacher, [tokens], SETTINGS)
    (single,) = capture(teacher, [tokens], CaptureSettings([(i, i) for i in range(2, 6)], "all", 4))
    np.testing.assert_allclose(grouped.attention[0], single.attention[:3].mean(0), atol=1e-7)
    np.testing.assert_allclose(grouped.attention[1], single.attention[1:].mean(0), atol=1e-7)


def test_top_k_orders_by_logit_then_id_also_where_a_tie_is_cut():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    ids, logprobs, lse = top_k(logits, 3)
    assert ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    np.testing.assert_allclose(lse, logits.logsumexp(-1).numpy())
    np.testing.assert_allclose(logprobs, np.take_along_axis(logits.log_softmax(-1).numpy(), ids, 1), atol=1e-6)


def test_batches_hold_one_padded_length_and_every_sample_once(teacher):
    tokens = [tokenize(teacher.processor, s, 1) for s in samples() for _ in range(3)]
    batches = list(same_length(tokens, 4))
    assert sorted(i for b in batches for i in b) == list(range(len(tokens)))
    for batch in batches:
        assert len(batch) <= 4
        assert len({-(-len(tokens[i].input_ids) // BUCKET) for i in batch}) == 1
