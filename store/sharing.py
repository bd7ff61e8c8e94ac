"""Copies, unions and comparisons of stores: what `cdist store` does, as functions.

A copy is verified by its manifest: nothing is believed that was not read back with the size and sha256 the manifest
(or a fragment's zarr.json, which the manifest vouches for) names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from compodistill.errors import MismatchError, StoreError, UsageError
from compodistill.store.compare import same_content
from compodistill.store.fragment import path_of
from compodistill.store.reader import Store, open_store
from compodistill.store.spec import differences
from compodistill.store.storage import Reading, Storage, writable_storage
from compodistill.store.writer import StoreWriter, create_store

BLOCK = 2**24
Progress = Callable[[str, int], None]  # path and bytes of each object that is done

# what a difference in a field means for a student; the fingerprint's fields are those precompute writes
MEANING = {
    "weights": "another teacher: its signals teach something else",
    "config": "another teacher architecture or configuration",
    "processor": "images or text reach the model differently: positions may not fit",
    "chat_template": "conversations are rendered differently: tokens and positions do not fit",
    "capture": "other layers, rows or numbers of logits were kept",
    "dtype": "the same signals to rounding noise only",
    "device": "the same signals to rounding noise only",
    "batch_size": "the same signals to rounding noise only",
    "padding": "the same signals to rounding noise only",
    "max_length": "other samples were refused as too long",
    "groups": "the attention is grouped for a student of another depth",
    "per_layer": "one is grouped for one depth of student, the other serves any",
    "rows": "other queries' attention was kept: losses that need the missing rows cannot run",
    "top_k": "more or fewer logits a token: the tail a student sees is another",
    "draws": "one holds the most likely tokens, the other draws: they need different losses",
    "codec": "the same signals, stored more or less exactly",
    "vocab_size": "another vocabulary: ids mean other tokens",
}


@dataclass(frozen=True)
class Difference:
    """One field in which two stores differ, and what that means for a student."""

    field: str
    a: object
    b: object
    meaning: str


def diff(a: Store, b: Store) -> tuple[list[Difference], list[str]]:
    """Fields in which two stores' specs differ, and a line for each shard that is in one only or differs."""
    fields = [
        Difference(name, x, y, MEANING.get(name.removeprefix("fingerprint."), ""))
        for name, x, y in differences(a.info.spec, b.info.spec)
    ]
    ours, theirs = ({digest: name for digest, name, _ in s.fragments} for s in (a, b))
    shards = [f"{ours[d]} is in the first only" for d in ours.keys() - theirs.keys()]
    shards += [f"{theirs[d]} is in the second only" for d in theirs.keys() - ours.keys()]
    for digest in ours.keys() & theirs.keys():
        x, y = a.fragment(digest), b.fragment(digest)
        if not fields and x.metadata_sha256 != y.metadata_sha256:
            try:
                same_content(x, y)
            except StoreError as e:
                shards.append(f"{ours[digest]}: {e.what}")
    return fields, sorted(shards)


def verify(store: Store, *, quick: bool = False, on_object: Progress = lambda path, size: None) -> list[str]:
    """Read a store and list what is wrong with it, one line an object; empty if all is well.

    Args:
        quick: metadata and sample tables only, and the presence and size of every other object.
    """
    wrong = []
    try:
        if any(path.startswith("teacher/") for path in store.files):
            store.teacher_dir()
    except StoreError as e:
        wrong.append(f"{e.what}: {e.where}")
    for digest, name, _ in store.fragments:
        try:
            fragment = store.fragment(digest)
        except StoreError as e:
            wrong.append(f"{name}: {e.what}: {e.where}")
            continue
        for path, (size, sha256) in fragment.objects.items():
            full = f"{fragment.path}/{path}"
            try:
                if quick:
                    found = store.storage.open(full)
                    if found.size != size:
                        raise StoreError(f"has {found.size} bytes, {size} expected", where=store.storage.where(full))
                    found.close()
                else:
                    _checked(store.storage, full, size, sha256)
            except StoreError as e:
                wrong.append(f"{name}: {e.what}: {e.where}")
            on_object(full, size)
    return wrong


def copy(source: Store, url: str, *, only: Iterable[str] = (), on_object: Progress = lambda path, size: None) -> int:
    """Copy a sealed store; what is there already and whole is not copied again, so a broken copy is resumed.

    Args:
        only: names of shards (patterns with * and ?); the copy's manifest lists these alone.

    Returns:
        Number of fragments of the copy.

    Raises:
        UsageError: the source is not sealed, or no shard has such a name.
        MismatchError, StoreError: the target holds something else, or an object did not arrive whole.
    """
    if not source.info.sealed:
        raise UsageError("only a sealed store can be copied", where=source.storage.url, remedy="seal it first")
    patterns = list(only)
    chosen = [d for d, name, _ in source.fragments if not patterns or any(fnmatchcase(name, p) for p in patterns)]
    if not chosen:
        raise UsageError("no shard of the store has such a name", where=", ".join(patterns))
    create_store(url, source.info.spec)
    target = writable_storage(url)
    for path, (size, sha256) in source.files.items():
        if path.startswith("teacher/") or path == "teacher.json":
            _copy_object(source.storage, target, path, size, sha256)
            on_object(path, size)
    for digest in chosen:
        fragment = source.fragment(digest)
        root = f"{path_of(digest)}/zarr.json"
        if not target.exists(root):
            with target.building(digest) as directory:
                for path, (size, sha256) in fragment.objects.items():
                    _write(directory / path, _checked(source.storage, f"{fragment.path}/{path}", size, sha256))
                    on_object(f"{fragment.path}/{path}", size)
                vouched = fragment.metadata_size, fragment.metadata_sha256
                _write(directory / "zarr.json", _checked(source.storage, root, *vouched))
                target.publish(directory, fragment.path)
        if target.read(root, 2**26) != source.storage.read(root, 2**26):
            raise StoreError("the target holds another result for this shard", where=target.where(root))
    StoreWriter(target, source.info.spec).seal(chosen)
    return len(chosen)


def merge(sources: Iterable[Store], url: str, on_object: Progress = lambda path, size: None) -> int:
    """Join the fragments of several stores of one spec and fingerprint into one store.

    Raises:
        MismatchError: two specs differ; names each field.
        StoreError: two stores have different results for one shard.
    """
    sources = list(sources)
    for other in sources[1:]:
        fields, _ = diff(sources[0], other)
        if fields:
            said = "; ".join(f"{d.field}: {d.a} and {d.b} ({d.meaning})" for d in fields)
            where = f"{sources[0].storage.url} and {other.storage.url}"
            raise MismatchError(f"these stores do not belong together: {said}", where=where)
    for source in sources:
        copy(source, url, on_object=on_object)
    return open_store(url).info.n_fragments


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _copy_object(source: Reading, target: Storage, path: str, size: int, sha256: str) -> None:
    if target.exists(path):
        _checked(target, path, size, sha256)
        return
    target.create(path, _checked(source, path, size, sha256))
    _checked(target, path, size, sha256)


def _checked(storage: Reading, path: str, size: int, sha256: str) -> bytes:
    """An object's content.

    Raises:
        StoreError: it is missing, or has another size or sha256.
    """
    file = storage.open(path)
    try:
        if file.size != size:
            raise StoreError(f"the object has {file.size} bytes, {size} expected", where=storage.where(path))
        parts, at = [], 0
        while at < size and (block := file.read(at, min(BLOCK, size - at))):
            parts.append(block)
            at += len(block)
    finally:
        file.close()
    data = b"".join(parts)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreError("the object has another content than was written (sha256)", where=storage.where(path))
    return data
