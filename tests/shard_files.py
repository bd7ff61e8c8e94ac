"""Builds tar files for tests by hand, so that a fault of our own writer cannot hide one of our reader."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

ANSWER = {"from": "gpt", "value": "a square"}


def record(marks: int = 1, **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "<image>\n" * marks + "What is this?"}, ANSWER], **fields}


def picture(color: str = "red", size: tuple[int, int] = (8, 6), format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format, **options)
    return buffer.getvalue()


def as_bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def write_tar(path: Path, members: list[tuple[str, Any]], **options: Any) -> Path:
    """Writes members in the order given; content that is not bytes becomes JSON."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(as_bytes(content))
            tar.addfile(info, io.BytesIO(as_bytes(content)))
    return path


def good_members(count: int = 3) -> list[tuple[str, Any]]:
    return [m for i in range(count) for m in ((f"k{i}.json", record()), (f"k{i}.png", picture()))]
