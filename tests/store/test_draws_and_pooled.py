import numpy as np
import pytest
import synthetic

from compodistill.errors import StoreError
from compodistill.store import SampledLogits, create_store, open_store
from compodistill.store.pooled import pool_visual

DRAWS = 50


def drawn(rng, n, vocab_size):
    """DRAWS ids a row from a skewed distribution."""
    rows = []
    for _ in range(n):
        p = rng.dirichlet(np.full(vocab_size, 0.02))
        ids, counts = np.unique(rng.choice(vocab_size, DRAWS, p=p), return_counts=True)
        order = np.lexsort((ids, -counts))
        rows.append((ids[order], counts[order]))
    width = max(len(ids) for ids, _ in rows)
    ids = np.stack([np.pad(i, (0, width - len(i)), constant_values=-1) for i, _ in rows]).astype(np.int32)
    counts = np.stack([np.pad(c, (0, width - len(c))) for _, c in rows]).astype(np.int32)
    return SampledLogits(ids, counts, rng.normal(18, 2, n).astype(np.float32))


@pytest.mark.parametrize("codec", ["lossless", "compact"])
def test_draws_come_back_exactly(tmp_path, codec):
    rng = np.random.default_rng(0)
    spec = synthetic.spec(codec=codec, draws=DRAWS)
    samples = synthetic.zoo(spec)
    for s in samples:
        s.logits = drawn(rng, len(s.supervised_positions), spec.vocab_size)
    writer = create_store(tmp_path / "s", spec)
    with writer.fragment("a.tar", synthetic.sha("a.tar")) as f:
        for s in samples:
            f.add(s)
    writer.seal([synthetic.sha("a.tar")])
    store = open_store(tmp_path / "s")
    assert "logits_kl_mean" not in store.fragment(synthetic.sha("a.tar")).fidelity
    for s in samples:
        got = store[s.key].logits
        assert isinstance(got, SampledLogits)
        for name in ("ids", "counts", "lse"):
            np.testing.assert_array_equal(getattr(got, name), getattr(s.logits, name))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.counts.__setitem__((0, 0), 7), "add up to 50 draws"),
        (lambda x: x.ids.__setitem__((0, 0), 1000), "outside the vocabulary"),
        (lambda x: x.ids.__setitem__((0, 0), x.ids[0, 1]), "repeat an id"),
        (lambda x: x.lse.__setitem__(0, np.nan), "NaN"),
    ],
)
def test_draws_that_cannot_be_are_refused(tmp_path, change, says):
    spec = synthetic.spec(draws=DRAWS)
    bad = synthetic.zoo(spec)[0]
    bad.logits = drawn(np.random.default_rng(1), len(bad.supervised_positions), spec.vocab_size)
    change(bad.logits)
    writer = create_store(tmp_path / "s", spec)
    with pytest.raises(StoreError, match=says), writer.fragment("a.tar", synthetic.sha("a.tar")) as f:
        f.add(bad)


def test_a_store_of_draws_refuses_top_k_and_the_other_way_round(tmp_path):
    for draws in (0, DRAWS):
        spec = synthetic.spec(draws=draws)
        sample = synthetic.zoo(spec)[0]
        if draws == 0:
            sample.logits = drawn(np.random.default_rng(1), len(sample.supervised_positions), spec.vocab_size)
        writer = create_store(tmp_path / str(draws), spec)
        refused = pytest.raises(StoreError, match="must be draws in a store of draws")
        with refused, writer.fragment("a.tar", synthetic.sha("a.tar")) as f:
            f.add(sample)


def test_draws_cost_less_than_40_bytes_a_token_log_sum_exp_included():
    from compodistill.store.codecs import sampled
    from compodistill.store.zarr3 import compress

    rng = np.random.default_rng(0)
    n, vocabulary = 200, 151_936
    ids, counts = [], []
    for _ in range(n):  # about a dozen distinct ids in 50 draws, half of them common to the sample
        pool = np.concatenate([np.arange(0, 60_000, 1_000), rng.integers(0, vocabulary, 60)])
        p = rng.dirichlet(np.full(len(pool), 0.06))
        i, c = np.unique(rng.choice(pool, DRAWS, p=p), return_counts=True)
        ids.append(i), counts.append(c)
    width = max(map(len, ids))
    logits = SampledLogits(
        np.stack([np.pad(i, (0, width - len(i)), constant_values=-1) for i in ids]).astype(np.int32),
        np.stack([np.pad(c, (0, width - len(c))) for c in counts]).astype(np.int32),
        rng.normal(18, 2, n).astype(np.float32),
    )
    assert len(compress(sampled.encode(logits), 1)) / n < 40


def test_pooling_keeps_what_is_not_a_sink_and_averages_over_queries():
    block = np.full((1, 4, 4), 0.1, np.float32)
    block[0, :, 2] = 0.1, 0.1, 0.9, 0.1  # a sink at one query
    block[0, 0, 3] = 0.02
    got = pool_visual(block)
    assert got.shape == (1, 1, 4)
    np.testing.assert_allclose(got[0, 0], [0.1, 0.1, 0.1, (0.02 + 0.3) / 4], rtol=1e-6)


def test_pooled_rows_are_stored_like_any_row(tmp_path):
    spec = synthetic.spec(rows="pooled", codec="compact")
    sample = synthetic.zoo(spec)[0]
    sample.attention = pool_visual(sample.attention[:, :12])
    sample.query_positions = sample.visual_positions[-1:]
    writer = create_store(tmp_path / "s", spec)
    with writer.fragment("a.tar", synthetic.sha("a.tar")) as f:
        f.add(sample)
    writer.seal([synthetic.sha("a.tar")])
    got = open_store(tmp_path / "s")[sample.key].attention
    for a, b in zip(got[:, 0], sample.attention[:, 0], strict=True):
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9985
