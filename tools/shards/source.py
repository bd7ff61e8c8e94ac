"""Where samples to be sharded come from. Here: a LLaVA JSON file and a folder of images."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from compodistill.errors import DataError, UsageError
from compodistill.records import check_marks, parse_record

MAX_KEY_BYTES = 80


@dataclass(frozen=True)
class SourceRecord:
    """One sample before it is written: a key safe inside a tar, the record as it came, and its images' files."""

    key: str
    record: dict[str, Any]
    images: tuple[Path, ...]
    where: str


def read_llava(source: Path, image_folder: Path | None) -> list[SourceRecord]:
    """Reads and checks a list of `{"id", "image": str | [str], "conversations" | "messages"}`; opens no image.

    Raises:
        UsageError: the file or folder is not there, or the list is empty.
        DataError: names the record and the field.
    """
    try:
        text = source.read_bytes()
    except OSError as error:
        raise UsageError(f"the source cannot be read: {error.strerror}", where=str(source)) from error
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", where=str(source), remedy="expected a LLaVA list") from error
    if not isinstance(raw, list):
        raise DataError("expected a list of records", where=str(source))
    if not raw:
        raise UsageError("the list of records is empty", where=str(source))
    if image_folder is not None and not image_folder.is_dir():
        raise UsageError("the image folder does not exist", where=str(image_folder))
    taken: dict[str, str] = {}
    return [_record(record, f"{source}, record {i}", image_folder, taken) for i, record in enumerate(raw)]


def safe_key(name: str) -> str:
    """A record's id as a tar name without folders or dots: anything but letters, digits, `_` and `-` becomes `_`."""
    return re.sub(r"[^\w-]", "_", name)


def _record(record: Any, where: str, image_folder: Path | None, taken: dict[str, str]) -> SourceRecord:
    turns = parse_record(record, where=where)
    name = record.get("id")
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise DataError("`id` must be a string or an integer", where=f"{where}, field id")
    name = str(name)
    where = f"{where} (id {name})"
    key = safe_key(name)
    if len(key.encode()) > MAX_KEY_BYTES:
        raise DataError(f"the id is longer than {MAX_KEY_BYTES} bytes", where=where)
    if key in taken:
        raise DataError(
            "the id occurs twice"
            if taken[key] == name
            else f"the ids {taken[key]!r} and {name!r} become one key {key!r}",
            where=where,
            remedy="ids must differ in letters, digits, `_` or `-`",
        )
    taken[key] = name
    images = _images(record.get("image"), where, image_folder)
    check_marks(turns, len(images), where=where)
    return SourceRecord(key, record, images, where)


def _images(value: Any, where: str, image_folder: Path | None) -> tuple[Path, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError("`image` must be a path or a list of paths", where=f"{where}, field image")
    if names and image_folder is None:
        raise UsageError("the records have images, but no image folder is given", where=where, remedy="--images DIR")
    paths = []
    for name in names:
        relative = PurePosixPath(name.replace("\\", "/"))
        if relative.is_absolute() or ".." in relative.parts:  # a foreign JSON must not pick files of this machine
            raise DataError(f"the image {name!r} lies outside the image folder", where=f"{where}, field image")
        path = Path(image_folder or "", *relative.parts)
        if not path.is_file():
            raise DataError(f"the image {name!r} is not in the image folder", where=where, remedy=f"expected {path}")
        paths.append(path)
    return tuple(paths)
