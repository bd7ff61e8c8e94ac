"""The manifest: what a sealed store consists of. Readers trust nothing it does not vouch for.

`manifest.jsonl` has three lines of JSON: the content (format, spec, teacher files, one column entry a fragment), the
provenance (who sealed it, when, with what), and the sha256 of the two lines. The first line's sha256 names the
store: equal content has an equal name, whoever wrote it. The manifest vouches for each fragment's zarr.json, which
lists size and sha256 of all the fragment's objects.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compodistill.errors import StoreError
from compodistill.store.fragment import DIGEST
from compodistill.store.spec import FORMAT, FORMAT_VERSION, StoreSpec
from compodistill.store.zarr3 import dump

if TYPE_CHECKING:
    from compodistill.store.fragment_reader import Fragment

NAME = "manifest.jsonl"
MAX_BYTES = 2**28  # about a million fragments
COLUMNS = ("shard_sha256", "shard_name", "samples", "bytes", "metadata_bytes", "metadata_sha256")


@dataclass(frozen=True, slots=True)
class Entry:
    """One fragment: its shard, counts, and size and sha256 of its zarr.json."""

    shard_sha256: str
    shard_name: str
    samples: int
    bytes: int
    metadata_bytes: int
    metadata_sha256: str


@dataclass
class Manifest:
    """A manifest in memory.

    Attributes:
        files: path -> (size, sha256) of objects outside fragments: root metadata and teacher files.
        entries: shard digest -> its fragment, ordered by (shard name, digest).
    """

    spec: StoreSpec
    files: dict[str, tuple[int, str]]
    entries: dict[str, Entry]
    provenance: dict[str, Any] = field(default_factory=dict)
    content_sha256: str = ""

    def dump(self) -> bytes:
        entries = sorted(self.entries.values(), key=lambda e: (e.shard_name, e.shard_sha256))
        content = dump(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "spec": self.spec.model_dump(mode="json"),
                "files": {path: list(vouched) for path, vouched in sorted(self.files.items())},
                "fragments": {c: [getattr(e, c) for e in entries] for c in COLUMNS},
            }
        )
        provenance = dump(self.provenance)
        self.content_sha256 = hashlib.sha256(content).hexdigest()
        return content + provenance + dump({"sha256": [self.content_sha256, hashlib.sha256(provenance).hexdigest()]})


def load(data: bytes, where: str) -> Manifest:
    """Parse and check a manifest.

    Raises:
        StoreError: it is damaged, of a later format, or contradicts itself.
    """

    def refuse(what: str) -> StoreError:
        return StoreError(f"the manifest {what}", where=where, remedy="fetch the store again, or seal it anew")

    try:
        content, provenance, sums = data.split(b"\n")[:3]
        found = [hashlib.sha256(line + b"\n").hexdigest() for line in (content, provenance)]
        if data != content + b"\n" + provenance + b"\n" + dump({"sha256": found}):
            raise refuse("is damaged (sha256)")
        del sums
        parsed = json.loads(content)
        if parsed["format"] != FORMAT:
            raise refuse(f"has format {parsed['format']!r}, not {FORMAT}")
        if parsed["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"the store has format version {parsed['format_version']}, this cdist reads {FORMAT_VERSION}",
                where=where,
                remedy="use a newer cdist",
            )
        columns = [parsed["fragments"][c] for c in COLUMNS]
        entries = {row[0]: Entry(*row) for row in zip(*columns, strict=True)}
        if len(entries) != len(columns[0]):
            raise refuse("lists a shard twice")
        for shard, name, *counts, sha in zip(*columns, strict=True):
            if not (DIGEST.fullmatch(shard) and DIGEST.fullmatch(sha) and isinstance(name, str)):
                raise refuse("has a fragment whose digest is no sha256")
            if not all(type(n) is int and 0 < n < 2**63 for n in counts):
                raise refuse("has a fragment with impossible counts")
        files = {path: (int(size), str(sha)) for path, (size, sha) in parsed["files"].items()}
        for path, (size, sha) in files.items():
            if size < 0 or not DIGEST.fullmatch(sha) or not safe(path):
                raise refuse(f"lists a file it may not: {path!r}")
        spec = StoreSpec.model_validate(parsed["spec"])
        return Manifest(spec, files, entries, json.loads(provenance), found[0])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as e:
        raise refuse(f"is not one ({type(e).__name__})") from e


def safe(path: str) -> bool:
    """A relative path that stays below the root, on any system."""
    parts = path.split("/")
    return (
        bool(path)
        and len(path) < 1024
        and not any(part in ("", ".", "..") or "\\" in part or ":" in part or "\0" in part for part in parts)
    )


def entry_of(fragment: Fragment, spec: StoreSpec) -> Entry:
    """The manifest's entry of a fragment, once it is known to be of this spec."""
    ours = spec.model_dump(mode="json")
    for name, value in fragment.spec.items():
        if ours.get(name) != value:
            raise StoreError(f"the fragment has {name} {value}, the store {ours.get(name)}", where=fragment.path)
    fragment.close()
    return Entry(
        fragment.shard_digest,
        fragment.shard_name,
        len(fragment.table),
        fragment.nbytes,
        fragment.metadata_size,
        fragment.metadata_sha256,
    )
