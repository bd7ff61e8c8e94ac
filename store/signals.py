"""The teacher's signals of one sample, as plain numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from compodistill.errors import StoreError


@dataclass
class Logits:
    """The K most likely next tokens at each of A supervised tokens.

    Attributes:
        ids: (A, K) int32, ordered by (log-probability descending, id ascending).
        logprobs: (A, K) float32, natural logarithm, under the softmax over the whole vocabulary.
        lse: (A,) float32, log-sum-exp of the raw logits; logprobs + lse gives the raw logits back.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    lse: np.ndarray


@dataclass
class SampledLogits:
    """Ids drawn with replacement from the distribution of each of A supervised tokens, for unbiased distillation.

    counts / draws is an unbiased estimate of the probabilities, so -sum(counts / draws * log q) one of the whole
    cross-entropy (arXiv 2503.16870).

    Attributes:
        ids: (A, N) int32, the distinct ids of each row ordered by (count descending, id ascending); -1 beyond them.
        counts: (A, N) int32, how often each was drawn; 0 beyond them.
        lse: (A,) float32, log-sum-exp of the raw logits.
    """

    ids: np.ndarray
    counts: np.ndarray
    lse: np.ndarray


@dataclass
class SampleSignals:
    """All signals of one sample.

    Attributes:
        key: the sample's key in its shard.
        digest: what the student's side must agree on: sha256 of `input_ids` and `labels` (hex), `visual_tokens`.
        supervised_positions: (A,) int32, strictly increasing; the logits are those that predict these tokens.
        query_positions: (Q,) int32, strictly increasing: where the kept rows of the attention stand.
        visual_positions: (V,) int32, strictly increasing: where its columns stand.
        logits: `Logits`, or `SampledLogits` in a store of draws.
        attention: (G, Q, V) float32, head-averaged and group-averaged; V = 0 in text-only samples.
        groups: (first, last) teacher layer of each of the G groups, both included; set by readers.
    """

    key: str
    digest: dict[str, str | int]
    supervised_positions: np.ndarray
    query_positions: np.ndarray
    visual_positions: np.ndarray
    logits: Logits | SampledLogits
    attention: np.ndarray
    groups: list[tuple[int, int]] = field(default_factory=list)


def check_signals(signals: SampleSignals, *, n_groups: int, top_k: int, draws: int, vocab_size: int) -> None:
    """Refuse signals that are not what the store promises: shapes, dtypes, order, ranges, NaN.

    Raises:
        StoreError: names the field and what is wrong with it.
    """
    check = _Checks(signals.key)
    for name in ("supervised_positions", "query_positions", "visual_positions"):
        positions = getattr(signals, name)
        if positions.ndim != 1 or positions.dtype != np.int32:
            check.refuse(name, f"must be one-dimensional int32, is {positions.dtype}{positions.shape}")
        if len(positions) and (positions[0] < 0 or (np.diff(positions) <= 0).any()):
            check.refuse(name, "must be non-negative and strictly increasing")
    n = len(signals.supervised_positions)
    if n == 0:
        check.refuse("supervised_positions", "are empty: the sample supervises nothing")
    shape = n_groups, len(signals.query_positions), len(signals.visual_positions)
    check.array("attention", signals.attention, shape, np.float32)
    # NaN fails both comparisons
    attention = signals.attention
    if attention.size and not (attention.min() >= 0 and attention.max() <= 1.001):
        check.refuse("attention", "must lie in 0..1 (NaN, infinity or a negative value found)")
    if isinstance(signals.logits, SampledLogits) != (draws > 0):
        check.refuse("logits", "must be draws in a store of draws, and top-k in one of top-k")
    check.array("logits.lse", signals.logits.lse, (n,), np.float32)
    if not np.isfinite(signals.logits.lse).all():
        check.refuse("logits", "contain NaN or infinity")
    if isinstance(signals.logits, SampledLogits):
        _check_draws(check, signals.logits, n, draws, vocab_size)
    else:
        _check_top_k(check, signals.logits, (n, top_k), vocab_size)


class _Checks:
    def __init__(self, key: str) -> None:
        self._key = key

    def refuse(self, name: str, what: str) -> None:
        raise StoreError(f"{name} {what}", where=f"key {self._key}")

    def array(self, name: str, array: np.ndarray, shape: tuple[int, ...], dtype: type) -> None:
        if array.shape != shape or array.dtype != dtype:
            self.refuse(name, f"must be {np.dtype(dtype)}{shape}, is {array.dtype}{array.shape}")


def _check_top_k(check: _Checks, logits: Logits, shape: tuple[int, int], vocab_size: int) -> None:
    check.array("logits.ids", logits.ids, shape, np.int32)
    check.array("logits.logprobs", logits.logprobs, shape, np.float32)
    if logits.ids.min() < 0 or logits.ids.max() >= vocab_size:
        check.refuse("logits.ids", f"reach outside the vocabulary of {vocab_size}")
    if (np.diff(np.sort(logits.ids, axis=1), axis=1) == 0).any():
        check.refuse("logits.ids", "repeat an id within a row")
    if not np.isfinite(logits.logprobs).all():
        check.refuse("logits", "contain NaN or infinity")
    if logits.logprobs.max() > 1e-3 or (np.diff(logits.logprobs, axis=1) > 0).any():
        check.refuse("logits.logprobs", "must be log-probabilities in descending order")


def _check_draws(check: _Checks, logits: SampledLogits, n: int, draws: int, vocab_size: int) -> None:
    shape = n, logits.ids.shape[-1]
    check.array("logits.ids", logits.ids, shape, np.int32)
    check.array("logits.counts", logits.counts, shape, np.int32)
    drawn = logits.counts > 0
    if logits.counts.min() < 0 or (logits.counts.sum(1) != draws).any():
        check.refuse("logits.counts", f"must add up to {draws} draws in each row")
    if (np.diff(logits.counts, axis=1) > 0).any() or (logits.ids[~drawn] != -1).any():
        check.refuse("logits.counts", "must descend along the row, with id -1 where they are 0")
    if logits.ids[drawn].min() < 0 or logits.ids.max() >= vocab_size:
        check.refuse("logits.ids", f"reach outside the vocabulary of {vocab_size}")
    ordered = np.sort(logits.ids, axis=1)
    if ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any():
        check.refuse("logits.ids", "repeat an id within a row")


def check_digest(digest: dict[str, str | int], key: str) -> None:
    """Refuse a digest that is not two sha256 and a count."""
    if set(digest) != {"input_ids", "labels", "visual_tokens"}:
        raise StoreError(
            "a digest has the fields input_ids, labels and visual_tokens", where=f"key {key}, {sorted(digest)}"
        )
    for name in ("input_ids", "labels"):
        try:
            good = len(bytes.fromhex(str(digest[name]))) == 32
        except ValueError:
            good = False
        if not good:
            raise StoreError("the digest must be a sha256 in hexadecimal", where=f"key {key}, {name}")
