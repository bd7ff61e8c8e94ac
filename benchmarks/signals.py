"""Signals the benchmarks of the store are measured on: of a real language model, and made up by a generator.

The real ones are those of the teacher `benchmarks/real/models.py` assembles around SmolLM2-135M-Instruct, on the
hand-written conversations over photographs and on crops and mirror images of them, at 729 visual tokens, grouped for
a student of half the depth. Each sample is a photograph with its conversation and the next two as further turns, which
makes about 50 answer tokens: instruction data for these models have several questions to a picture. The vocabulary of
49,153 is spread over 151,936 (that of Qwen) by a fixed permutation, so that ids cost what they would there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from compodistill.store import Logits, SampleSignals, StoreSpec, TeacherInfo

REAL = Path(__file__).parent / "real"
VOCABULARY = 151_936
TOP_K = 64
VISUAL = 729
CONVERSATIONS = 3
FIELDS = ("supervised_positions", "query_positions", "visual_positions", "attention")


def spec_of(n_groups: int, **changes: object) -> StoreSpec:
    """The spec of a store of these signals."""
    settings = {
        "groups": [(i, i + 5) for i in range(n_groups)],
        "top_k": TOP_K,
        "vocab_size": VOCABULARY,
        "fingerprint": {"weights": "benchmark"},
        "teacher": TeacherInfo(name="benchmark"),
    }
    return StoreSpec.model_validate(settings | changes)


def real(cache: Path, n: int) -> Iterator[SampleSignals]:
    """The first n samples of the real model; captured where they are not in `cache` yet."""
    for path in capture_real(cache, n):
        with np.load(path) as data:
            ids = np.random.default_rng(0).permutation(VOCABULARY).astype(np.int32)[data["ids"]]
            order = np.lexsort((ids, -data["logprobs"]), axis=-1)
            logits = Logits(
                np.take_along_axis(ids, order, -1), np.take_along_axis(data["logprobs"], order, -1), data["lse"]
            )
            yield SampleSignals(path.stem, digest(path.stem), logits=logits, **{f: data[f] for f in FIELDS})


def digest(key: str) -> dict[str, str | int]:
    return {f: hashlib.sha256(f"{f} {key}".encode()).hexdigest() for f in ("input_ids", "labels")} | {
        "visual_tokens": VISUAL
    }


def capture_real(cache: Path, n: int) -> list[Path]:
    """Files of the first n samples' signals, in the cache."""
    paths = [cache / f"{key}.npz" for key in islice(_keys(), n)]
    if len(paths) < n:
        raise SystemExit(f"there are {len(paths)} samples, not {n}")
    if all(p.exists() for p in paths):
        return paths
    sys.path.insert(0, str(REAL))
    from models import language_model, save_teacher

    from compodistill.groups import layer_groups, understanding_layers
    from compodistill.models import load_model
    from compodistill.precompute.capture import CaptureSettings, capture
    from compodistill.tokens import tokenize

    if not (cache / "teacher" / "model.safetensors").exists():
        save_teacher(cache / "teacher", *language_model())
    teacher = load_model(cache / "teacher")
    layers = understanding_layers(teacher.n_layers)
    groups = layer_groups(layers, len(understanding_layers(teacher.n_layers // 2)))
    settings = CaptureSettings(groups, "all", TOP_K)
    for path, sample in zip(paths, _samples(), strict=False):
        if path.exists():
            continue
        print(f"capturing {path.stem}", file=sys.stderr, flush=True)
        (signals,) = capture(teacher, [tokenize(teacher.processor, sample, teacher.image_token_id)], settings)
        arrays = {f: getattr(signals, f) for f in FIELDS} | vars(signals.logits)
        with (cache / "part").open("wb") as f:
            np.savez(f, **arrays)
        (cache / "part").rename(path)
    return paths


def _keys() -> Iterator[str]:
    for variant in ("whole", "mirrored", "cropped", "cropped-mirrored"):
        for record in json.loads((REAL / "conversations.json").read_text()):
            if isinstance(record.get("image"), str):
                yield f"{record['id']}-{variant}"


def _samples() -> Iterator[object]:
    from PIL import Image, ImageOps

    from compodistill.samples import Sample, Turn

    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise SystemExit("scikit-image is not installed: pip install 'compodistill[bench]'")
    records = {r["id"]: r for r in json.loads((REAL / "conversations.json").read_text())}
    names = [n for n, r in records.items() if isinstance(r.get("image"), str)]
    for key in _keys():
        name, variant = next((key[: -len(v) - 1], v) for v in _VARIANTS if key.endswith(f"-{v}"))
        image = Image.open(Path(found.origin).parent / "data" / records[name]["image"]).convert("RGB")
        if "cropped" in variant:
            w, h = image.size
            image = image.crop((w // 10, h // 10, w - w // 10, h - h // 10))
        if "mirrored" in variant:
            image = ImageOps.mirror(image)
        at = names.index(name)
        turns = []
        for i, turn in enumerate(t for n in (names * 2)[at : at + CONVERSATIONS] for t in records[n]["conversations"]):
            before, mark, after = turn["value"].partition("<image>")
            if mark and i > 0:
                before, mark, after = before + after.removeprefix("\n"), "", ""
            parts = (before, None, after.removeprefix("\n")) if mark else (before,)
            role = "assistant" if turn["from"] == "gpt" else "user"
            turns.append(Turn(role, tuple(p for p in parts if p != "")))
        yield Sample(key, tuple(turns), (image,))


_VARIANTS = ("cropped-mirrored", "mirrored", "cropped", "whole")  # longest first: names end in one another


def generated(n: int, n_groups: int = 8, n_answers: int = 40, seed: int = 0) -> Iterator[SampleSignals]:
    """n made-up samples with the gross statistics of real ones.

    Attention: each head-averaged row is a softmax over the causal keys of a per-column salience (sinks and objects),
    a smooth spatial field around the query and noise; three quarters of the mass go to text, as in real models.
    Logits: Zipf-like, half of the candidates shared by the sample's tokens.
    """
    rng = np.random.default_rng(seed)
    first, queries = 30, np.arange(30, 30 + VISUAL + 200)
    visual = np.arange(first, first + VISUAL)
    side = int(VISUAL**0.5)
    y, x = np.divmod(np.arange(VISUAL), side)
    seen_QV = visual[None] <= queries[:, None]
    at = np.minimum(queries - first, VISUAL - 1)
    near_QV = -np.hypot(y[at][:, None] - y[None], x[at][:, None] - x[None]) / 6
    for i in range(n):
        salience_GV = rng.gumbel(0, 0.8, (n_groups, 1, VISUAL))
        noise = rng.normal(0, 0.35, (n_groups, len(queries), VISUAL)).astype(np.float32)
        weights = np.exp((salience_GV + near_QV + noise).astype(np.float32)) * seen_QV
        weights /= weights.sum(-1, keepdims=True) * rng.uniform(3, 5, (n_groups, len(queries), 1))
        pool = rng.permutation(VOCABULARY)[:400]
        ids = np.stack([rng.permutation(pool)[:TOP_K] for _ in range(n_answers)])
        for row in ids:
            others = rng.permutation(VOCABULARY)[:96]
            row[32:] = others[~np.isin(others, row[:32])][:32]
            rng.shuffle(row)
        raw = -np.sort(-rng.gumbel(0, 1, (n_answers, TOP_K)) * 0.5 + np.log(np.arange(1, TOP_K + 1)) * 1.6, axis=1)
        raw = -np.sort(-raw, axis=1)
        logprobs = raw - np.log(np.exp(raw).sum(1, keepdims=True)) + np.log(rng.uniform(0.85, 0.999, (n_answers, 1)))
        lse = rng.normal(18, 2, n_answers)
        yield SampleSignals(
            key=f"generated-{i}",
            digest=digest(f"generated-{i}"),
            supervised_positions=np.arange(queries[-1] - n_answers, queries[-1], dtype=np.int32),
            query_positions=queries.astype(np.int32),
            visual_positions=visual.astype(np.int32),
            logits=Logits(ids.astype(np.int32), logprobs.astype(np.float32), lse.astype(np.float32)),
            attention=weights.astype(np.float32),
        )
