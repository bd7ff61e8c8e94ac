"""Writing a store: fragments by any number of workers, then the seal."""

from __future__ import annotations

import contextlib
import datetime
import getpass
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from compodistill.errors import MismatchError, StoreError, UsageError
from compodistill.store import manifest as manifests
from compodistill.store import zarr3
from compodistill.store.compare import same_content
from compodistill.store.fragment import DIGEST, GROUPS, path_of
from compodistill.store.fragment_reader import Fragment
from compodistill.store.fragment_writer import FragmentBuilder
from compodistill.store.layout import read_files, read_spec
from compodistill.store.manifest import Entry, Manifest, entry_of
from compodistill.store.spec import FORMAT, FORMAT_VERSION, StoreSpec, require_same, versions
from compodistill.store.storage import LocalStorage, Storage, writable_storage

__all__ = ["StoreWriter", "create_store"]


def create_store(url: str | Path, spec: StoreSpec, *, concurrent: bool = False) -> StoreWriter:
    """Open a store for writing; made if it does not exist, extended or resumed if it does.

    Args:
        url: a local path, s3://, gs:// or az://.
        concurrent: others write to it at the same time; needs a place where create-if-absent holds.

    Raises:
        MismatchError: the store exists and is of another spec; names each field that differs.
        UsageError: the place holds something that is not a store.
    """
    storage = writable_storage(url)
    if concurrent and not storage.probe():
        raise UsageError(
            "this object storage ignores conditional writes, so several writers could overwrite one another",
            where=storage.url,
            remedy="write with one worker, or to a local disk and push the store when it is sealed",
        )
    attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, "spec": spec.model_dump(mode="json")}
    if not storage.exists("zarr.json"):
        # asked again: another writer may have made the store in between, which is then what the place holds
        if not storage.is_empty() and not storage.exists("zarr.json"):
            raise UsageError(
                "the store's place is not empty and not a store", where=storage.url, remedy="name another place"
            )
        storage.create("zarr.json", zarr3.dump(zarr3.group_metadata({"cdist": attributes})))
    require_same(spec, read_spec(storage), storage.url)
    storage.create(f"{GROUPS}/zarr.json", zarr3.dump(zarr3.group_metadata({})))
    return StoreWriter(storage, spec)


class FragmentWriter:
    """Takes the samples of one shard, in the shard's order, and the keys of those left out.

    Attributes:
        n_bytes: of the fragment, once it is published.
    """

    def __init__(self, builder: FragmentBuilder) -> None:
        self._builder = builder
        self.add = builder.add
        self.skip = builder.skip
        self.n_bytes = 0


class StoreWriter:
    """A store open for writing. Many processes may write to one store, one fragment each at a time."""

    def __init__(self, storage: Storage, spec: StoreSpec) -> None:
        self._storage, self.spec = storage, spec

    def finished(self, shard_digest: str) -> bool:
        """Whether the fragment of a shard is published."""
        return self._storage.exists(f"{path_of(shard_digest)}/zarr.json")

    @contextlib.contextmanager
    def fragment(self, shard_name: str, shard_digest: str) -> Iterator[FragmentWriter]:
        """Write the fragment of a shard; published whole when the block ends, not at all if it raises.

        Writing a shard again is harmless if the result is the same.

        Raises:
            StoreError: the fragment exists with other content, or cannot be read back.
        """
        if not DIGEST.fullmatch(shard_digest):
            raise UsageError("a shard's digest is a sha256 in hexadecimal", where=shard_digest)
        # a path would tell where this machine keeps its shards, and make equal shards differ
        shard_name = shard_name.replace("\\", "/").rstrip("/").rpartition("/")[2]
        with self._storage.building(shard_digest) as directory:
            builder = FragmentBuilder(directory, self.spec, shard_name, shard_digest)
            try:
                writer = FragmentWriter(builder)
                yield writer
                builder.finish()
            finally:
                builder.abandon()
            built = Fragment(LocalStorage(directory), shard_digest, path=".")
            built.verify()
            writer.n_bytes = built.nbytes
            if not self._storage.publish(directory, path_of(shard_digest)):
                published = Fragment(self._storage, shard_digest)
                if published.metadata_sha256 != built.metadata_sha256:
                    same_content(published, built)
            built.close()

    def add_teacher_files(self, directory: str | Path) -> None:
        """Copy the teacher's files a student needs (configuration, processor, weights) into the store.

        Raises:
            MismatchError: the store has a file of that name with other content.
        """
        files = dict(read_files(self._storage))
        for source in sorted(p for p in Path(directory).rglob("*") if p.is_file() and not p.is_symlink()):
            path = f"teacher/{source.relative_to(directory).as_posix()}"
            data = source.read_bytes()
            vouched = len(data), hashlib.sha256(data).hexdigest()
            if not self._storage.create(path, data):
                there = self._storage.read(path, max(len(data), 1))
                if there != data:
                    raise MismatchError(
                        "the store has another teacher file of this name",
                        where=self._storage.where(path),
                        remedy="use the teacher this store was made with",
                    )
            files[path] = vouched
        self._storage.replace("teacher.json", zarr3.dump({p: list(v) for p, v in sorted(files.items())}))

    def clean(self) -> None:
        """Remove what killed writers left half-written; what living ones are at stays."""
        self._storage.clean()

    def seal(self, shard_digests: Iterable[str]) -> None:
        """Write the manifest over these fragments and those already in it.

        Raises:
            StoreError: a fragment is missing, or is not of this store's spec.
        """
        storage = self._storage
        wanted = dict.fromkeys(shard_digests)
        missing = [d for d in wanted if not self.finished(d)]
        if missing:
            raise StoreError(
                f"{len(missing)} fragments are missing, so the store cannot be sealed",
                where=", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
                remedy="run precompute again: it does what is missing",
            )
        entries: dict[str, Entry] = {}
        if storage.exists(manifests.NAME):
            where = storage.where(manifests.NAME)
            entries = manifests.load(storage.read(manifests.NAME, manifests.MAX_BYTES), where).entries
        for digest in wanted:
            if digest not in entries:
                entries[digest] = entry_of(Fragment(storage, digest), self.spec)
        files = dict(read_files(storage))
        for path in ("zarr.json", f"{GROUPS}/zarr.json", *(["teacher.json"] if files else [])):
            data = storage.read(path, 2**26)
            files[path] = len(data), hashlib.sha256(data).hexdigest()
        manifest = Manifest(read_spec(storage), files, entries, _provenance())
        storage.replace(manifests.NAME, manifest.dump())
        storage.clean()


def _provenance() -> dict[str, object]:
    try:
        who = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        who = ""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"sealed": now, "by": who, "versions": versions()}
