"""Question files: what they look like, and everything that can be wrong with one, found before a model is loaded.

A task is a JSON list of `{"id", "image", "question", "options": [...], "answer", "kind"}`. Image paths are
relative to the parent of the file's folder (`OUT/eval/NAME.json` and `OUT/images/...`); `image` may be left
out for a question about text alone, and `kind` (what results are broken down by) defaults to "all".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from compodistill.errors import UsageError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
REMEDY = 'each question is {"id", "image", "question", "options": [two or more], "answer", "kind"}'


@dataclass(frozen=True)
class TaskQuestion:
    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str
    image: Path | None
    image_name: str | None  # as the file has it

    def load_image(self) -> Image.Image | None:
        if self.image is None:
            return None
        with Image.open(self.image, formats=FORMATS) as image:
            return image.convert("RGB")


@dataclass(frozen=True)
class Task:
    name: str
    path: Path
    questions: tuple[TaskQuestion, ...]

    def __len__(self) -> int:
        return len(self.questions)


def load_task(path: str | Path, name: str | None = None) -> Task:
    """Reads and checks a question file; the task is called `name`, or as the file is.

    Raises:
        UsageError: naming the file, the question and the field that is wrong or the image that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            "there is no such question file", where=str(path), remedy="give --task NAME=PATH of a JSON file"
        )
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the question file is not JSON ({error})", where=str(path), remedy=REMEDY) from error
    if not isinstance(records, list) or not records:
        raise UsageError("the question file is not a list of questions", where=str(path), remedy=REMEDY)
    root = path.absolute().parent.parent
    questions = tuple(_question(record, f"{path}, question {i}", root) for i, record in enumerate(records))
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UsageError(
                "two questions have the same id", where=f"{path}, id {question.id}", remedy="make ids unique"
            )
        seen.add(question.id)
    return Task(name or path.stem, path, questions)


def _question(record: Any, where: str, root: Path) -> TaskQuestion:
    if not isinstance(record, dict):
        raise UsageError("a question is not an object", where=where, remedy=REMEDY)
    where = f"{where} (id {record['id']})" if isinstance(record.get("id"), str) else where
    for field in ("id", "question", "answer"):
        if not isinstance(record.get(field), str) or not record[field]:
            raise UsageError(f'field "{field}" is missing or not a text', where=where, remedy=REMEDY)
    kind = record.get("kind", "all")
    if not isinstance(kind, str):
        raise UsageError('field "kind" is not a text', where=where, remedy=REMEDY)
    options = record.get("options")
    if (
        not isinstance(options, list)
        or not all(isinstance(o, str) and o for o in options)
        or not 2 <= len(set(options)) == len(options)
    ):
        raise UsageError('field "options" is not a list of two or more different texts', where=where, remedy=REMEDY)
    if record["answer"] not in options:
        raise UsageError('field "answer" is not one of the options', where=where, remedy=REMEDY)
    name = record.get("image")
    image = None if name is None else _image(name, where, root)
    return TaskQuestion(record["id"], record["question"], tuple(options), record["answer"], kind, image, name)


def _image(name: Any, where: str, root: Path) -> Path:
    if not isinstance(name, str) or not name:
        raise UsageError('field "image" is not a path', where=where, remedy=REMEDY)
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:  # a question file is data: it may not reach elsewhere
        raise UsageError(f'image "{name}" leaves its folder', where=where, remedy=f"paths are relative to {root}")
    path = root / relative
    if not path.is_file():
        raise UsageError(f'image "{name}" is missing', where=where, remedy=f"paths are relative to {root}")
    try:
        with Image.open(path, formats=FORMATS) as opened:  # reads the header only
            pixels = opened.width * opened.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f'image "{name}" cannot be read', where=where, remedy="PNG, JPEG or WebP") from error
    if pixels > MAX_PIXELS:
        raise UsageError(f'image "{name}" has {pixels} pixels', where=where, remedy=f"at most {MAX_PIXELS}")
    return path
