"""Signals made up for tests of the store: right shapes, plausible numbers, no model."""

import hashlib

import numpy as np

from compodistill.store.signals import Logits, SampleSignals
from compodistill.store.spec import StoreSpec, TeacherInfo

FINGERPRINT = {"weights": "w" * 64, "config": "c" * 64, "dtype": "float32"}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def spec(**changes) -> StoreSpec:
    settings = {
        "rows": "all",
        "groups": [(3, 5), (4, 6)],
        "top_k": 8,
        "codec": "lossless",
        "vocab_size": 1000,
        "fingerprint": FINGERPRINT,
        "teacher": TeacherInfo(name="tiny"),
    }
    return StoreSpec(**(settings | changes))


def top_k(rng, n, k, vocab_size) -> Logits:
    """Top-k of n random distributions over the whole vocabulary, so that lse and tail are real."""
    raw = rng.normal(0, 3, (n, vocab_size)).astype(np.float32)
    most = raw.max(1, keepdims=True)
    lse = (np.log(np.exp(raw - most, dtype=np.float64).sum(1)) + most[:, 0]).astype(np.float32)
    ids = np.argsort(-raw, axis=1, kind="stable")[:, :k].astype(np.int32)
    return Logits(ids, np.take_along_axis(raw, ids, 1) - lse[:, None], lse)


def attention(rng, n_groups, queries, visual, causal=True) -> np.ndarray:
    """Slices (G, Q, V) of softmax rows with strong columns, cut at the diagonal if causal."""
    q, v = len(queries), len(visual)
    logit = rng.normal(0, 1, (n_groups, 1, v)) * 1.5 + rng.normal(0, 1, (n_groups, q, v))
    weights = np.exp(logit)
    if causal:
        weights = np.where(np.asarray(visual)[None, :] <= np.asarray(queries)[:, None], weights, 0)
    return (weights / (weights.sum(-1, keepdims=True) + v)).astype(np.float32)


def sample(key, rng, spec, *, visual=None, n_queries=20, n_answers=5, causal=True) -> SampleSignals:
    """A sample; `visual` are the positions of its visual tokens (none: text-only)."""
    visual = np.arange(2, 14) if visual is None else np.asarray(visual, dtype=np.int64)
    first = int(visual[0]) if len(visual) else 0
    queries = np.arange(first, first + n_queries) if len(visual) else np.zeros(0, np.int64)
    answers = np.arange(30, 30 + n_answers)
    return SampleSignals(
        key=key,
        digest={"input_ids": sha("ids" + key), "labels": sha("labels" + key), "visual_tokens": len(visual)},
        supervised_positions=answers.astype(np.int32),
        query_positions=queries.astype(np.int32),
        visual_positions=visual.astype(np.int32),
        logits=top_k(rng, n_answers, spec.top_k, spec.vocab_size),
        attention=attention(rng, len(spec.groups), queries, visual, causal),
    )


def zoo(spec, seed=0, prefix="s") -> list[SampleSignals]:
    """One sample of each kind that has to go through: one image, several, none, one answer token, long, not causal."""
    rng = np.random.default_rng(seed)
    return [
        sample(f"{prefix}-one-image", rng, spec),
        sample(f"{prefix}-text-only", rng, spec, visual=[]),
        sample(f"{prefix}-two-images", rng, spec, visual=[*range(3, 9), *range(15, 21), 25]),
        sample(f"{prefix}-one-answer", rng, spec, n_answers=1),
        sample(f"{prefix}-long", rng, spec, visual=range(5, 69), n_queries=90, n_answers=40),
        sample(f"{prefix}-bidirectional", rng, spec, causal=False),
    ]


def assert_equal(stored: SampleSignals, exact: SampleSignals) -> None:
    """Every field equal, bit for bit."""
    assert stored.key == exact.key
    assert stored.digest == exact.digest
    for name in ("supervised_positions", "query_positions", "visual_positions", "attention"):
        a, b = getattr(stored, name), getattr(exact, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    for name in ("ids", "logprobs", "lse"):
        np.testing.assert_array_equal(getattr(stored.logits, name), getattr(exact.logits, name), err_msg=name)
