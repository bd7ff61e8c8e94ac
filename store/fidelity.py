"""How faithful what was stored is to what the teacher said, measured at writing."""

from __future__ import annotations

import numpy as np

from compodistill.store.codecs import attention, logits
from compodistill.store.signals import Logits, SampledLogits, SampleSignals
from compodistill.store.spec import StoreSpec


def kl_to_stored(exact: Logits, stored: Logits) -> np.ndarray:
    """(A,) KL divergence of the exact distribution from the stored one, over the kept tokens and one tail bucket."""
    order, stored_order = np.argsort(exact.ids, axis=1), np.argsort(stored.ids, axis=1)
    p = np.take_along_axis(exact.logprobs, order, 1).astype(np.float64)
    q = np.take_along_axis(stored.logprobs, stored_order, 1).astype(np.float64)
    tail_p, tail_q = (np.maximum(-np.expm1(np.minimum(logits.kept_mass(x), 0)), 1e-12) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(1) + tail_p * (np.log(tail_p) - np.log(tail_q))


def row_cosines(exact_GQV: np.ndarray, stored_GQV: np.ndarray) -> np.ndarray:
    """Cosine of each row that is not all zeros."""
    dot, a, b = (
        np.einsum("gqv,gqv->gq", x, y, dtype=np.float32)
        for x, y in ((exact_GQV, stored_GQV), (exact_GQV, exact_GQV), (stored_GQV, stored_GQV))
    )
    rows = a > 0
    return dot[rows] / np.sqrt(np.maximum(a[rows] * b[rows], 1e-38))


class Fidelity:
    """Collects figures of a fragment, from every sample of `lossless` and every 8th otherwise."""

    def __init__(self, spec: StoreSpec, every: int = 8) -> None:
        self._spec, self._every, self._n, self._compared = spec, every, 0, 0
        self._kl: list[np.ndarray] = []
        self._tail: list[np.ndarray] = []
        self._cosine: list[np.ndarray] = []

    def add(self, signals: SampleSignals, logits_payload: bytes, attention_payload: bytes) -> None:
        """Decode the payloads of a sample and compare."""
        self._n += 1
        exact, spec = signals.logits, self._spec
        if not isinstance(exact, SampledLogits):  # draws are stored as they are
            self._tail.append(-np.expm1(np.minimum(logits.kept_mass(exact.logprobs), 0)))
        if (self._n - 1) % self._every:
            return
        self._compared += 1
        if not isinstance(exact, SampledLogits):
            stored = logits.decode(logits_payload, exact.ids.shape, spec.codec, spec.vocab_size)
            self._kl.append(kl_to_stored(exact, stored))
        if attention_payload:
            decoded = attention.decode(attention_payload, signals.attention.shape, spec.codec)
            self._cosine.append(row_cosines(signals.attention, decoded))

    def summary(self) -> dict[str, float | int]:
        """Rounded, so that the last bit of a mean does not make two workers' fragments differ."""
        found: dict[str, float | int] = {"samples_compared": self._compared}
        if self._tail:
            found["tail_mass_mean"] = _rounded(np.concatenate(self._tail).mean())
            found["logits_kl_mean"] = _rounded(np.concatenate(self._kl).mean())
        if self._cosine:
            cosine = np.concatenate(self._cosine)
            if len(cosine):
                found["attention_cosine_mean"] = round(float(cosine.mean()), 5)
                found["attention_cosine_p01"] = round(float(np.quantile(cosine, 0.01)), 5)
        return found


def _rounded(value: float) -> float:
    return 0.0 if abs(value) < 1e-12 else float(f"{value:.3g}")
