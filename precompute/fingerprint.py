"""The fingerprint: named digests of all that determines the teacher's signals."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from compodistill.tokens import BUCKET

WEIGHT_SUFFIXES = (".safetensors",)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def fingerprint(
    teacher: Path, *, dtype: str, device: str, batch_size: int, capture: dict[str, object], max_length: int | None
) -> dict[str, str]:
    """Digest of each ingredient by name, so that a difference can be told by name.

    Args:
        teacher: the model directory.
        dtype: numeric type of the pass, e.g. `float32`.
        device: its type, `cpu` or `cuda`: kernels differ in the last bits.
        batch_size: samples in every forward pass, likewise.
        capture: rows, groups and the like: what was kept.
    """
    weights = sorted(p for p in teacher.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    return {
        "weights": _files(weights),
        "config": _files([teacher / "config.json"]),
        "processor": _files([p for n in PROCESSOR_FILES if (p := teacher / n).is_file()]),
        "chat_template": _files(sorted(teacher.glob("chat_template*"))),
        "capture": hashlib.sha256(json.dumps(capture, sort_keys=True).encode()).hexdigest(),
        "dtype": dtype,
        "device": device,
        "batch_size": str(batch_size),
        "padding": f"right, to a multiple of {BUCKET}",
        "max_length": str(max_length),
        "transformers": ".".join(version("transformers").split(".")[:2]),
    }


def _files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()
