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
class SampleSignals:
    """All signals of one sample.

    Attributes:
        key: the sample's key in its shard.
        digest: what the student's side must agree on: sha256 of `input_ids` and `labels` (hex), `visual_tokens`.
        supervised_positions: (A,) int32, strictly increasing; the logits are those that predict these tokens.
        query_positions: (Q,) int32, strictly increasing: where the kept rows of the attention stand.
        visual_positions: (V,) int32, strictly increasing: where its columns stand.
        logits: see `Logits`.
        attention: (G, Q, V) float32, head-averaged and group-averaged; V = 0 in text-only samples.
        groups: (first, last) teacher layer of each of the G groups, both included; set by readers.
    """

    key: str
    digest: dict[str, str | int]
    supervised_positions: np.ndarray
    query_positions: np.ndarray
    visual_positions: np.ndarray
    logits: Logits
    attention: np.ndarray
    groups: list[tuple[int, int]] = field(default_factory=list)


def check_signals(signals: SampleSignals, *, n_groups: int, top_k: int, vocab_size: int) -> None:
    """Refuse signals that are not what the store promises: shapes, dtypes, order, ranges, NaN.

    Raises:
        StoreError: names the field and what is wrong with it.
    """

    def refuse(name: str, what: str) -> None:
        raise StoreError(f"{name} {what}", where=f"key {signals.key}")

    for name in ("supervised_positions", "query_positions", "visual_positions"):
        positions = getattr(signals, name)
        if positions.ndim != 1 or positions.dtype != np.int32:
            refuse(name, f"must be one-dimensional int32, is {positions.dtype}{positions.shape}")
        if len(positions) and (positions[0] < 0 or (np.diff(positions) <= 0).any()):
            refuse(name, "must be non-negative and strictly increasing")
    n = len(signals.supervised_positions)
    if n == 0:
        refuse("supervised_positions", "are empty: the sample supervises nothing")
    logits = signals.logits
    for name, array, shape, dtype in (
        ("logits.ids", logits.ids, (n, top_k), np.int32),
        ("logits.logprobs", logits.logprobs, (n, top_k), np.float32),
        ("logits.lse", logits.lse, (n,), np.float32),
        (
            "attention",
            signals.attention,
            (n_groups, len(signals.query_positions), len(signals.visual_positions)),
            np.float32,
        ),
    ):
        if array.shape != shape or array.dtype != dtype:
            refuse(name, f"must be {np.dtype(dtype)}{shape}, is {array.dtype}{array.shape}")
    if logits.ids.min() < 0 or logits.ids.max() >= vocab_size:
        refuse("logits.ids", f"reach outside the vocabulary of {vocab_size}")
    if (np.diff(np.sort(logits.ids, axis=1), axis=1) == 0).any():
        refuse("logits.ids", "repeat an id within a row")
    if not (np.isfinite(logits.logprobs).all() and np.isfinite(logits.lse).all()):
        refuse("logits", "contain NaN or infinity")
    if logits.logprobs.max() > 1e-3 or (np.diff(logits.logprobs, axis=1) > 0).any():
        refuse("logits.logprobs", "must be log-probabilities in descending order")
    # NaN fails both comparisons
    attention = signals.attention
    if attention.size and not (attention.min() >= 0 and attention.max() <= 1.001):
        refuse("attention", "must lie in 0..1 (NaN, infinity or a negative value found)")


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
