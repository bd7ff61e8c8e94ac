"""What a store promises about its content: the settings and the fingerprint shared by all its fragments."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compodistill.errors import MismatchError

FORMAT = "cdist-store"
FORMAT_VERSION = 1

Codec = Literal["lossless", "fine", "compact"]
Rows = Literal["all", "visual", "text", "answer"]


class TeacherInfo(BaseModel):
    """Who the teacher is, for people: nothing here decides whether two stores fit (the fingerprint does)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model_type: str = ""
    layers: int = 0
    revision: str = ""
    licence: str = ""


class StoreSpec(BaseModel):
    """The settings of a store.

    Attributes:
        rows: which queries' attention is kept; `pooled` is one row a group, see `compodistill.store.pooled`.
        groups: (first, last) teacher layer of each attention group, both included.
        per_layer: one group per understanding layer, for students of any depth.
        top_k: logits kept per supervised token.
        draws: 0, or so many ids drawn from the teacher's distribution are kept in place of the top_k most likely.
        codec: how signals are coded, see docs/format.md.
        vocab_size: every id is below it.
        fingerprint: named digests of all that determines the signals.
        teacher, versions: provenance, left out of comparisons.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: Rows | Literal["pooled"] = "all"
    groups: list[tuple[int, int]]
    per_layer: bool = False
    top_k: int = Field(64, ge=1, le=65_536)
    draws: int = Field(default=0, ge=0, le=65_536)
    codec: Codec = "compact"
    vocab_size: int = Field(ge=1, le=2**31 - 1)
    fingerprint: dict[str, str]
    teacher: TeacherInfo
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _ordered_groups(self) -> StoreSpec:
        if not self.groups or len(self.groups) > 1024 or any(not 0 <= a <= b for a, b in self.groups):
            raise ValueError("groups must be 1 to 1024 pairs (first, last) of layers with 0 <= first <= last")
        if self.top_k > self.vocab_size:
            raise ValueError("top_k is larger than the vocabulary")
        return self

    def identity(self) -> dict[str, object]:
        """What two stores must share for their fragments to be interchangeable, by field name."""
        fields = self.model_dump(mode="json", exclude={"teacher", "versions", "fingerprint"})
        return fields | {f"fingerprint.{name}": digest for name, digest in sorted(self.fingerprint.items())}


def differences(ours: StoreSpec, theirs: StoreSpec) -> list[tuple[str, object, object]]:
    """(field, ours, theirs) for every field in which two specs differ; fields of one side only show None."""
    a, b = ours.identity(), theirs.identity()
    return [(name, a.get(name), b.get(name)) for name in sorted(a | b) if a.get(name) != b.get(name)]


def require_same(ours: StoreSpec, theirs: StoreSpec, where: str) -> None:
    """Refuse to mix two specs, naming each field that differs.

    Raises:
        MismatchError: at least one field differs.
    """
    differ = differences(ours, theirs)
    if differ:
        raise MismatchError(
            "the store holds signals of another kind: "
            + "; ".join(f"{name} is {_short(b)} in the store, {_short(a)} here" for name, a, b in differ),
            where=where,
            remedy="write to another store, or use the teacher and settings this one was made with",
        )


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def versions() -> dict[str, str]:
    """Versions of what takes part in making signals, for the record."""
    found = {"python": platform.python_version()}
    for package in ("compodistill", "torch", "transformers", "numpy", "zstandard"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # imported from a source tree
            continue
    return found
