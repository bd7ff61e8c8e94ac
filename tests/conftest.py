"""Shared fixtures: one thread (spinning threads on busy cores give no usable times), shards of tiny samples."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from compodistill.samples import Sample

torch.set_num_threads(1)


def _shard_of(samples: Sequence[Sample], path: Path) -> Path:
    """Write samples as a WebDataset shard, images as PNG."""
    with tarfile.open(path, "w") as tar:
        for s in samples:
            for i, image in enumerate(s.images):
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                _add(tar, f"{s.key}.{i}.png", buffer.getvalue())
            content = [
                [{"type": "image"} if p is None else {"type": "text", "text": p} for p in t.parts] for t in s.turns
            ]
            messages = [{"role": t.role, "content": c} for t, c in zip(s.turns, content, strict=True)]
            _add(tar, f"{s.key}.json", json.dumps({"messages": messages}).encode())
    return path


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def shard_of() -> Callable[[Sequence[Sample], Path], Path]:
    return _shard_of
