"""Reading a store: samples by key, decoded or as they are stored."""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compodistill.errors import StoreError
from compodistill.store import manifest as manifests
from compodistill.store.cache import DEFAULT_LIMIT, CachedStorage
from compodistill.store.decode import EncodedSample, decode_sample
from compodistill.store.fragment import DIGEST, GROUPS, path_of
from compodistill.store.fragment_reader import Fragment
from compodistill.store.layout import read_files, read_spec
from compodistill.store.manifest import Entry, Manifest, entry_of
from compodistill.store.signals import SampleSignals
from compodistill.store.spec import StoreSpec
from compodistill.store.storage import LocalStorage, Reading, readable_storage

__all__ = ["EncodedSample", "Store", "StoreInfo", "open_store"]

OPEN_FRAGMENTS = 64


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds.

    Attributes:
        n_samples, n_fragments, n_bytes: of the fragments it vouches for (bytes without teacher files).
        sealed: whether a manifest vouches for the content.
        content_sha256: names the content; equal stores have equal names, whoever wrote them. Empty if not sealed.
        provenance: who sealed it, when, with what.
    """

    spec: StoreSpec
    n_samples: int
    n_fragments: int
    n_bytes: int
    sealed: bool
    content_sha256: str
    provenance: dict[str, Any]


def open_store(
    url: str | Path,
    *,
    allow_partial: bool = False,
    cache_dir: str | Path | None = None,
    cache_bytes: int = DEFAULT_LIMIT,
) -> Store:
    """Open a store for reading.

    Args:
        url: a local path, s3://, gs://, az://, https:// or hf://.
        cache_dir, cache_bytes: where, and up to which size, parts of a remote store are kept.
        allow_partial: read an unsealed store, or a sealed one of which fragments are missing.

    Raises:
        UsageError: there is no store here.
        StoreError: the store is not sealed, incomplete or damaged.
    """
    storage = readable_storage(url)
    if cache_dir is not None and not isinstance(storage, LocalStorage):
        storage = CachedStorage(storage, cache_dir, cache_bytes)
    spec = read_spec(storage)
    if storage.exists(manifests.NAME):
        where = storage.where(manifests.NAME)
        manifest = manifests.load(storage.read(manifests.NAME, manifests.MAX_BYTES), where)
        _check_root(storage, manifest)
        there = storage.names(GROUPS)  # None: the server cannot list, so what is missing is found when it is read
        listed = set(manifest.entries if there is None else there)
        missing = [e for d, e in manifest.entries.items() if d not in listed]
        if missing and not allow_partial:
            raise StoreError(
                f"{len(missing)} of {len(manifest.entries)} fragments are missing",
                where=", ".join(f"{GROUPS}/{e.shard_sha256} (shard {e.shard_name})" for e in missing[:3]),
                remedy="fetch the store again, or allow a partial store (--allow-partial)",
            )
        for entry in missing:
            del manifest.entries[entry.shard_sha256]
        return Store(storage, manifest, sealed=True)
    if not allow_partial:
        raise StoreError(
            "the store is not sealed: it has no manifest",
            where=storage.url,
            remedy="let precompute finish, or allow a partial store (--allow-partial)",
        )
    entries: dict[str, Entry] = {}
    for digest in storage.names(GROUPS) or []:
        # without its zarr.json a fragment is not published: an upload that was broken, or is going on
        if DIGEST.fullmatch(digest) and storage.exists(f"{path_of(digest)}/zarr.json"):
            entries[digest] = entry_of(Fragment(storage, digest), spec)
    return Store(storage, Manifest(spec, read_files(storage), entries), sealed=False)


def _check_root(storage: Reading, manifest: Manifest) -> None:
    for path, (size, sha256) in manifest.files.items():
        if not path.startswith("teacher/"):
            data = storage.read(path, size)
            if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
                raise StoreError("an object is not what the manifest vouches for", where=storage.where(path))


class Store:
    """An open store, read-only. Can be sent to other processes: it opens its files anew there."""

    def __init__(self, storage: Reading, manifest: Manifest, *, sealed: bool) -> None:
        self._storage, self._manifest, self._sealed = storage, manifest, sealed
        entries = sorted(manifest.entries.values(), key=lambda e: (e.shard_name, e.shard_sha256))
        self._entries = {e.shard_sha256: e for e in entries}
        self._open: OrderedDict[str, Fragment] = OrderedDict()
        self._owner: dict[str, list[str]] | None = None
        self._teacher: tempfile.TemporaryDirectory[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_owner": None, "_teacher": None}

    @property
    def info(self) -> StoreInfo:
        entries = self._entries.values()
        return StoreInfo(
            self._manifest.spec,
            len(self),
            len(entries),
            sum(e.bytes for e in entries),
            self._sealed,
            self._manifest.content_sha256 if self._sealed else "",
            self._manifest.provenance,
        )

    @property
    def storage(self) -> Reading:
        """Where its objects are."""
        return self._storage

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """path -> (size, sha256) of the objects outside fragments that it vouches for."""
        return dict(self._manifest.files)

    @property
    def fidelity(self) -> dict[str, float]:
        """How close what is stored is to what the teacher said, over all fragments: means, weighted by samples."""
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for digest, _, n in self.fragments:
            for name, value in self.fragment(digest).fidelity.items():
                if name != "samples_compared":
                    sums[name] = sums.get(name, 0.0) + n * float(value)
                    weights[name] = weights.get(name, 0) + n
        return {name: total / weights[name] for name, total in sorted(sums.items())}

    @property
    def fragments(self) -> list[tuple[str, str, int]]:
        """(shard digest, shard name, number of samples), ordered by (name, digest)."""
        return [(e.shard_sha256, e.shard_name, e.samples) for e in self._entries.values()]

    def __len__(self) -> int:
        """Number of samples."""
        return sum(e.samples for e in self._entries.values())

    def __iter__(self) -> Iterator[str]:
        """Keys, fragment by fragment, in the order of the shards."""
        for digest in self._entries:
            yield from self.fragment(digest).table.keys

    def keys(self, shard_digest: str) -> list[str]:
        """Keys of one fragment, in the order of its shard."""
        return list(self.fragment(shard_digest).table.keys)

    def __getitem__(self, key: str) -> SampleSignals:
        """Decoded signals of the sample with this key.

        Raises:
            KeyError: no fragment has it.
            StoreError: several fragments have it (use `get`), or the store is damaged.
        """
        owners = self._owners().get(key, [])
        if not owners:
            raise KeyError(key)
        if len(owners) > 1:
            names = ", ".join(self._entries[d].shard_name for d in owners[:5])
            raise StoreError(
                f"the key is in {len(owners)} shards", where=f"key {key}: {names}", remedy="name the shard, too"
            )
        return self.get(owners[0], key)

    def get(self, shard_digest: str, key: str) -> SampleSignals:
        """Decoded signals of a sample of one shard."""
        return decode_sample(self.encoded(shard_digest, key), self._manifest.spec)

    def encoded(self, shard_digest: str, key: str) -> EncodedSample:
        """The signals of a sample as they are stored, for the loader's workers."""
        fragment = self.fragment(shard_digest)
        i = fragment.table.row.get(key)
        if i is None:
            raise StoreError("the fragment has no such key", where=f"shard {fragment.shard_name}, key {key}")
        spec = self._manifest.spec
        return EncodedSample(
            key,
            f"{self._storage.where(fragment.path)}, key {key}",
            fragment.table.digest(i),
            *fragment.table.positions(i),
            spec.codec,
            len(spec.groups),
            spec.top_k,
            spec.draws,
            spec.vocab_size,
            np.frombuffer(fragment.payload(i, "logits"), np.uint8),
            np.frombuffer(fragment.payload(i, "attention"), np.uint8),
        )

    def fragment(self, shard_digest: str) -> Fragment:
        """An open fragment; the last `OPEN_FRAGMENTS` stay open."""
        fragment = self._open.get(shard_digest)
        if fragment is not None:
            self._open.move_to_end(shard_digest)
            return fragment
        entry = self._entries.get(shard_digest)
        if entry is None:
            raise StoreError("the store has no signals for this shard", where=f"shard digest {shard_digest}")
        fragment = Fragment(self._storage, shard_digest, (entry.metadata_bytes, entry.metadata_sha256))
        if len(fragment.table) != entry.samples:
            raise StoreError("the manifest counts other samples than the fragment has", where=fragment.path)
        self._open[shard_digest] = fragment
        if len(self._open) > OPEN_FRAGMENTS:
            self._open.popitem(last=False)[1].close()
        return fragment

    def teacher_dir(self) -> Path:
        """The directory of the teacher's files, each read and checked.

        Raises:
            StoreError: there are none, or one is not what the manifest vouches for.
        """
        files = {p: v for p, v in self._manifest.files.items() if p.startswith("teacher/")}
        if not files:
            raise StoreError("the store has no teacher files", where=self._storage.url)
        root = self._storage.root if isinstance(self._storage, LocalStorage) else self._fetched(files)
        for path, (size, sha256) in files.items():
            target = root / path
            try:
                with target.open("rb") as f:
                    found = target.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()
            except FileNotFoundError as e:
                raise StoreError("a teacher file is missing", where=str(target)) from e
            if found != (size, sha256):
                raise StoreError("a teacher file is not what the manifest vouches for", where=str(target))
        return root / "teacher"

    def _fetched(self, files: dict[str, tuple[int, str]]) -> Path:
        """A temporary directory with the teacher's files of a remote store; it lasts as long as the store is open."""
        if self._teacher is None:
            self._teacher = tempfile.TemporaryDirectory(prefix="cdist-teacher-")
            for path, (size, _) in files.items():
                target = Path(self._teacher.name) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self._storage.read(path, size))
        return Path(self._teacher.name)

    def _owners(self) -> dict[str, list[str]]:
        if self._owner is None:
            self._owner = {}
            for digest in self._entries:
                for key in self.fragment(digest).table.keys:
                    self._owner.setdefault(key, []).append(digest)
        return self._owner
