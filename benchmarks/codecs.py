"""How small and how faithful the store's codecs are, and how fast they encode.

Measured on attention and logits of a real language model and of a generator, see `signals.py`: 12 samples of the real
model (50 with --full), written to a store by its ordinary writer; bytes are those of the objects on the disk, norms,
steps, shard indices and checksums included. Reported beside other keys:

attention_vs_fp16_*           bytes in float16 (all rows, causal zeros counted in) over stored bytes
attention_vs_context_entropy  stored bytes over the empirical entropy of each code given the codes to its left and
                              above (each clipped at 15): what an ideal coder with that context, knowing its tables
                              beforehand, would need
logits_kl                     KL divergence of the renormalised exact top-k from the renormalised stored one
logits_vs_distillkit          bytes a token over those of DistillKit's published layout (k ids of 18 bits, 16 values of
                              16 bits, a polynomial of six float32 terms for the others), its layout computed again
                              here, not its program run; with its KL on the same logits
encode_mb_per_s               float16 megabytes of attention encoded and compressed by one thread in a second

    python benchmarks/codecs.py --cache DIR [--json] [--full] [--samples N] [--codec compact|fine]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import signals

from compodistill.store import SampleSignals, create_store, open_store
from compodistill.store.codecs import attention
from compodistill.store.fidelity import kl_to_stored, row_cosines
from compodistill.store.fragment import bucket_of
from compodistill.store.payload import cuts
from compodistill.store.zarr3 import compress

DIGEST = "0" * 64
CLIP = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("bench-cache"), help="captured signals are kept here")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--full", action="store_true", help="50 samples")
    parser.add_argument("--codec", default="compact", choices=["compact", "fine"])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    n = 50 if options.full else options.samples
    real = measure(signals.real(options.cache, n), options.codec)
    made_up = measure(signals.generated(4), options.codec)
    ratios = {
        "attention_vs_fp16_real": real["vs_fp16"],
        "attention_vs_fp16_generator": made_up["vs_fp16"],
        "attention_vs_context_entropy": real["vs_context_entropy"],
        "attention_vs_context_entropy_generator": made_up["vs_context_entropy"],
        "logits_vs_distillkit": real["logits_bytes_per_token"] / real["distillkit_bytes_per_token"],
    }
    figures: dict[str, float] = {"samples": n, "answer_tokens": real["tokens"]}
    for prefix, found in (("", real), ("generator_", made_up)):
        for name in ("attention_cosine_mean", "attention_cosine_p01", "attention_bits_per_value", "attention_bytes"):
            figures[prefix + name] = found[name]
        for name in ("logits_bytes_per_token", "logits_kl", "logits_kl_with_tail", "encode_mb_per_s"):
            figures[prefix + name] = found[name]
        for name in ("distillkit_bytes_per_token", "distillkit_kl"):
            figures[prefix + name] = found[name]
    for name, value in (ratios | figures).items():
        print(f"{name:44} {value:14.6g}")
    if options.json:
        machine = {"platform": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
        print(json.dumps({"name": "codecs", "ratios": ratios, "figures": figures, "machine": machine}))


def measure(samples: Iterable[SampleSignals], codec: str) -> dict[str, float]:
    """All figures of one set of samples, which is read once."""
    spec, n_values, n_tokens = None, 0, 0
    entropy_bits, seconds = 0.0, []
    exact: dict[str, SampleSignals] = {}
    cosines, kl, kl_with_tail, theirs = [], [], [], []
    with tempfile.TemporaryDirectory() as place:
        for sample in samples:
            if spec is None:
                spec = signals.spec_of(len(sample.attention), codec=codec)
                writer = create_store(place + "/store", spec)
                block = writer.fragment("benchmark", DIGEST)
                fragment = block.__enter__()
            fragment.add(sample)
            seconds.append(encode_seconds(sample.attention, codec) / sample.attention.nbytes * 2e6)
            entropy_bits += context_entropy(codes(sample.attention, codec))
            n_values += sample.attention.size
            n_tokens += len(sample.logits.lse)
            theirs.append(distillkit_kl(sample.logits.logprobs))
            stored = roundtrip(sample.attention, codec)
            cosines.append(row_cosines(sample.attention, stored))
            sample.attention = sample.attention[:, :0]
            exact[sample.key] = sample
        block.__exit__(None, None, None)
        writer.seal([DIGEST])
        store = open_store(place + "/store")
        objects = store.fragment(DIGEST).objects
        nbytes = {s: sum(n for p, (n, _) in objects.items() if p.startswith(s)) for s in ("logits", "attention")}
        for key, sample in exact.items():
            got = store[key].logits
            kl_with_tail.append(kl_to_stored(sample.logits, got))
            kl.append(renormalised_kl(sample.logits, got))
    cosine = np.concatenate(cosines)
    return {
        "tokens": n_tokens,
        "vs_fp16": 2 * n_values / nbytes["attention"],
        "vs_context_entropy": 8 * nbytes["attention"] / entropy_bits,
        "attention_bits_per_value": 8 * nbytes["attention"] / n_values,
        "attention_bytes": nbytes["attention"] / len(exact),
        "attention_cosine_mean": float(cosine.mean()),
        "attention_cosine_p01": float(np.quantile(cosine, 0.01)),
        "logits_bytes_per_token": nbytes["logits"] / n_tokens,
        "logits_kl": float(np.concatenate(kl).mean()),
        "logits_kl_with_tail": float(np.concatenate(kl_with_tail).mean()),
        "distillkit_bytes_per_token": (signals.TOP_K * 18 + 16 * 16 + 6 * 32) / 8,
        "distillkit_kl": float(np.concatenate(theirs).mean()),
        "encode_mb_per_s": 1 / float(np.median(seconds)),
    }


def roundtrip(attention_GQV: np.ndarray, codec: str) -> np.ndarray:
    return attention.decode(attention.encode(attention_GQV, codec), attention_GQV.shape, codec)


def encode_seconds(attention_GQV: np.ndarray, codec: str) -> float:
    """Process seconds of encoding and compressing a sample, the best of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        payload = attention.encode(attention_GQV, codec)
        compress(payload.ljust(bucket_of(len(payload)), b"\0"), 1, cuts(payload))
        found.append(time.process_time() - start)
    return min(found)


def codes(attention_GQV: np.ndarray, codec: str) -> np.ndarray:
    """The codes the codec makes, as a plain array."""
    out = np.empty(attention_GQV.shape, np.uint8)
    for g, slice_QV in enumerate(attention_GQV):
        steps_Q = attention.row_steps(attention.row_scales(slice_QV, codec))
        out[g] = slice_QV / steps_Q[:, None] + np.float32(attention.ROUNDING)
    return out


def context_entropy(codes_GQV: np.ndarray) -> float:
    """Bits of all codes of a sample, each given the codes to the left and above, both clipped."""
    clipped = np.minimum(codes_GQV, CLIP).astype(np.int64)
    context = np.zeros_like(clipped)
    context[:, :, 1:] += clipped[:, :, :-1] * (CLIP + 1)
    context[:, 1:] += clipped[:, :-1]
    counts = np.bincount((context * 256 + codes_GQV).ravel(), minlength=(CLIP + 1) ** 2 * 256)
    counts = counts.reshape(-1, 256).astype(np.float64)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return float(-(counts * np.log2(np.maximum(share, 1e-300))).sum())


def renormalised_kl(exact: signals.Logits, stored: signals.Logits) -> np.ndarray:
    """(A,) KL of the exact top-k, made to sum to one, from the stored."""
    p, q = (np.take_along_axis(x.logprobs, np.argsort(x.ids, 1), 1).astype(np.float64) for x in (exact, stored))
    return _kl(p, q)


def distillkit_kl(logprobs_AK: np.ndarray) -> np.ndarray:
    """(A,) KL of the layout described above, with t scaled to 0..1 and the better of its 16-bit types."""
    t = np.linspace(0, 1, logprobs_AK.shape[1] - 16)
    terms = np.stack([t**0, t, t**2, t**3, t**4, np.sqrt(t)], 1)
    rest_AR = logprobs_AK[:, 16:].astype(np.float64)
    coefficients = np.linalg.lstsq(terms, rest_AR.T, rcond=None)[0].astype(np.float32)
    fitted_AR = (terms @ coefficients).T
    halves = logprobs_AK[:, :16].astype(np.float16).astype(np.float64)
    return _kl(logprobs_AK.astype(np.float64), np.concatenate([halves, fitted_AR], 1))


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(1)


if __name__ == "__main__":
    main()
