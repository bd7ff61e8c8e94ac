"""One conversation as JSON, in LLaVA's form or as a `messages` list, to turns."""

from __future__ import annotations

import json
from typing import Any

from compodistill.errors import DataError
from compodistill.samples import Turn

MARK = "<image>"
MAX_JSON_BYTES = 8 * 2**20

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MESSAGE_ROLES = ("system", "user", "assistant")


def parse_json(data: bytes, *, where: str) -> Any:
    """Parses JSON from untrusted bytes: bounded, and no exception but `DataError`."""
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"the JSON is larger than {MAX_JSON_BYTES:,} bytes", where=where)
    try:
        return json.loads(data)
    except RecursionError:
        raise DataError("the JSON is nested too deeply", where=where) from None
    except ValueError as error:  # also undecodable text and integers of absurd length
        raise DataError(f"not valid JSON: {error}", where=where) from error


def parse_record(record: Any, *, where: str) -> tuple[Turn, ...]:
    """The turns of one record.

    Args:
        record: `{"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...]}` or
            `{"messages": [{"role": "user", "content": str | [{"type": "image"}, {"type": "text", "text": ...}]}]}`.
        where: shard and key, for messages.

    Returns:
        Turns in which every image mark has become a `None` part; at least one turn is the assistant's.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be a JSON object, not {_kind(record)}", where=where)
    forms = [name for name in ("conversations", "messages") if record.get(name) is not None]
    if len(forms) != 1:
        what = "both `conversations` and `messages`" if forms else "neither `conversations` nor `messages`"
        raise DataError(f"the record has {what}", where=where, remedy="give exactly one of them")
    (form,) = forms
    raw = record[form]
    if not isinstance(raw, list) or not raw:
        raise DataError(f"`{form}` must be a list of turns that is not empty", where=f"{where}, field {form}")
    parse = _llava_turn if form == "conversations" else _message_turn
    turns = tuple(parse(turn, f"{where}, field {form}[{i}]") for i, turn in enumerate(raw))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(
            "no turn is the assistant's, so there is nothing to learn", where=f"{where}, field {form}",
            remedy="drop the record, or add an answer (from: gpt)",
        )  # fmt: skip
    return turns


def count_marks(turns: tuple[Turn, ...]) -> int:
    """Number of image marks in all turns."""
    return sum(part is None for turn in turns for part in turn.parts)


def check_marks(turns: tuple[Turn, ...], images: int, *, where: str) -> None:
    """Raises `DataError` unless there are as many image marks as images."""
    marks = count_marks(turns)
    if marks != images:
        raise DataError(
            f"{marks} image mark{'s' * (marks != 1)} in the conversation, but {images} image{'s' * (images != 1)}",
            where=where,
            remedy=f"write {MARK} once for each image, where the image belongs",
        )


def split_marks(text: str) -> tuple[str | None, ...]:
    """Text and `None` for each mark, in order; of each mark's newlines one is dropped, the following one first."""
    pieces = text.split(MARK)
    for i in range(1, len(pieces)):
        if pieces[i].startswith("\n"):
            pieces[i] = pieces[i][1:]
        elif pieces[i - 1].endswith("\n"):
            pieces[i - 1] = pieces[i - 1][:-1]
    parts: list[str | None] = []
    for i, piece in enumerate(pieces):
        if i:
            parts.append(None)
        if piece:
            parts.append(piece)
    return tuple(parts)


def _llava_turn(turn: Any, where: str) -> Turn:
    _require_object(turn, where)
    role = LLAVA_ROLES.get(turn["from"]) if isinstance(turn.get("from"), str) else None
    if role is None:
        raise DataError(f"`from` must be one of {', '.join(LLAVA_ROLES)}", where=where)
    if not isinstance(turn.get("value"), str):
        raise DataError("`value` must be a string", where=where)
    return _turn(role, split_marks(turn["value"]), where)


def _message_turn(turn: Any, where: str) -> Turn:
    _require_object(turn, where)
    if turn.get("role") not in MESSAGE_ROLES:
        raise DataError(f"`role` must be one of {', '.join(MESSAGE_ROLES)}", where=where)
    content = turn.get("content")
    if isinstance(content, str):
        return _turn(turn["role"], split_marks(content), where)
    if not isinstance(content, list):
        raise DataError("`content` must be a string or a list", where=where)
    parts = tuple(_message_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    return _turn(turn["role"], parts, where)


def _message_part(part: Any, where: str) -> str | None:
    _require_object(part, where)
    if part.get("type") == "image":
        return None  # the image itself is the shard's next one; an url or path given here is not followed
    if part.get("type") != "text":
        raise DataError("`type` must be image or text", where=where)
    text = part.get("text")
    if not isinstance(text, str) or not text:
        raise DataError("`text` must be a string that is not empty", where=where)
    if MARK in text:
        raise DataError(f"the text holds an {MARK} mark", where=where, remedy='write {"type": "image"} instead')
    return text


def _turn(role: str, parts: tuple[str | None, ...], where: str) -> Turn:
    if not parts:
        raise DataError("the turn is empty", where=where)
    return Turn(role, parts)


def _require_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"must be a JSON object, not {_kind(value)}", where=where)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)
