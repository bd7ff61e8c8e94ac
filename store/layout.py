"""The few objects at a store's root, besides the manifest."""

from __future__ import annotations

import json

from pydantic import ValidationError

from compodistill.errors import StoreError, UsageError
from compodistill.store.fragment import DIGEST
from compodistill.store.manifest import safe
from compodistill.store.spec import FORMAT, FORMAT_VERSION, StoreSpec
from compodistill.store.storage import Reading

MAX_BYTES = 2**26


def read_spec(storage: Reading) -> StoreSpec:
    """The spec in the root group's metadata.

    Raises:
        UsageError: there is no store here.
        StoreError: its metadata are damaged, or of a later format.
    """
    where = storage.where("zarr.json")
    if not storage.exists("zarr.json"):
        raise UsageError("there is no store here", where=storage.url, remedy="check the path or URL")
    try:
        attributes = json.loads(storage.read("zarr.json", MAX_BYTES))["attributes"]["cdist"]
        if attributes["format"] != FORMAT or attributes["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"the store has format {attributes['format']} {attributes['format_version']}, "
                f"this cdist reads {FORMAT} {FORMAT_VERSION}",
                where=where,
                remedy="use a newer cdist",
            )
        return StoreSpec.model_validate(attributes["spec"])
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as e:
        raise StoreError(f"the store's metadata are damaged ({type(e).__name__})", where=where) from e


def read_files(storage: Reading) -> dict[str, tuple[int, str]]:
    """path -> (size, sha256) of the teacher's files, as their writer listed them; empty if there are none."""
    if not storage.exists("teacher.json"):
        return {}
    where = storage.where("teacher.json")
    try:
        listed = json.loads(storage.read("teacher.json", MAX_BYTES))
        files = {path: (int(size), str(sha)) for path, (size, sha) in listed.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise StoreError("the list of the teacher's files is damaged", where=where) from e
    if not all(safe(p) and p.startswith("teacher/") and DIGEST.fullmatch(sha) for p, (_, sha) in files.items()):
        raise StoreError("the list of the teacher's files names files it may not", where=where)
    return files
