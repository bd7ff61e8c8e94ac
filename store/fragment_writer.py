"""Builds one fragment in a local directory: payloads stream into shards, the table and metadata follow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from compodistill.errors import StoreError
from compodistill.store import zarr3
from compodistill.store.codecs import attention, logits, sampled
from compodistill.store.fidelity import Fidelity
from compodistill.store.fragment import array_name, bucket_of, chunk_path
from compodistill.store.payload import cuts
from compodistill.store.signals import SampledLogits, SampleSignals, check_digest, check_signals
from compodistill.store.spec import FORMAT, FORMAT_VERSION, StoreSpec
from compodistill.store.table import COLUMNS, NOWHERE, Place, TableBuilder

KEPT = ("rows", "groups", "top_k", "draws", "codec", "vocab_size")  # of the spec, in each fragment
LEVEL = {"lossless": 1, "fine": 1, "compact": 1}  # 3 is no smaller on these payloads, 9 by 1% at ten times the time
TABLE_LEVEL = 9


class _HashedFile:
    """A file that knows size and sha256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._sha, self.size = path.open("xb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> tuple[int, str]:
        self._file.close()
        return self.size, self._sha.hexdigest()

    def abandon(self) -> None:
        self._file.close()


class FragmentBuilder:
    """Writes the files of one fragment below `directory`; the same samples give the same bytes."""

    def __init__(self, directory: Path, spec: StoreSpec, shard_name: str, shard_digest: str) -> None:
        self._directory, self._spec = directory, spec
        self._shard_name, self._shard_digest = shard_name, shard_digest
        self._table, self._fidelity = TableBuilder(), Fidelity(spec)
        self._shards: dict[tuple[str, int], tuple[_HashedFile, zarr3.ShardWriter]] = {}
        self._objects: dict[str, list[Any]] = {}
        self._skipped: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._table)

    def add(self, signals: SampleSignals) -> None:
        """Encode a sample and append it.

        Raises:
            StoreError: a key twice, or signals that are not what the spec promises.
        """
        spec = self._spec
        self._table.check_key(signals.key)
        check_digest(signals.digest, signals.key)
        shapes = {"n_groups": len(spec.groups), "top_k": spec.top_k, "draws": spec.draws}
        check_signals(signals, vocab_size=spec.vocab_size, **shapes)
        kept = signals.logits
        coded = sampled.encode(kept) if isinstance(kept, SampledLogits) else logits.encode(kept, spec.codec)
        payloads = [coded]
        payloads.append(attention.encode(signals.attention, spec.codec) if signals.attention.size else b"")
        self._fidelity.add(signals, *payloads)
        positions = [signals.supervised_positions, signals.query_positions, signals.visual_positions]
        places = [self._append(s, p) for s, p in zip(("logits", "attention"), payloads, strict=True)]
        self._table.add(signals.key, signals.digest, positions, places)

    def skip(self, key: str, reason: str) -> None:
        """Note that the shard has a sample without signals. `key` is empty where what is left out has no name."""
        if key:
            self._table.check_key(key)  # no key has signals and is skipped
        self._skipped.append([key, reason])

    def finish(self) -> None:
        """Write what follows the last sample: shard indices, the table, metadata.

        Raises:
            StoreError: no sample was added.
        """
        if len(self._table) == 0:
            raise StoreError("a fragment without samples", where=f"shard {self._shard_name}")
        members = {}
        for (signal, bucket), (file, shard) in sorted(self._shards.items()):
            shard.finish()
            name = array_name(signal, bucket)
            self._objects[chunk_path(name, 2)] = list(file.close())
            members[name] = zarr3.array_metadata(
                (len(shard), bucket), "uint8", 255, ("sample", "byte"), self._level, sharded=True
            )
        for name, (array, fill, dimensions) in self._table.arrays().items():
            members[name] = zarr3.array_metadata(
                array.shape, str(array.dtype), fill, dimensions, TABLE_LEVEL, sharded=False
            )
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            self._write(chunk_path(name, array.ndim), zarr3.compress(little.tobytes(), TABLE_LEVEL))
        for name, metadata in members.items():
            self._write(f"{name}/zarr.json", zarr3.dump(metadata))
        attributes = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "shard_sha256": self._shard_digest,
            "shard_name": self._shard_name,
            "samples": len(self._table),
            "columns": list(COLUMNS),
            "spec": self._spec.model_dump(mode="json", include=set(KEPT)),
            "fidelity": self._fidelity.summary(),
            **({"skipped": self._skipped} if self._skipped else {}),
            "objects": dict(sorted(self._objects.items())),
        }
        self._write("zarr.json", zarr3.dump(zarr3.group_metadata({"cdist": attributes}, members)))

    def abandon(self) -> None:
        for file, _ in self._shards.values():
            file.abandon()

    @property
    def _level(self) -> int:
        return LEVEL[self._spec.codec]

    def _append(self, signal: str, payload: bytes) -> Place:
        if not payload:
            return NOWHERE
        bucket = bucket_of(len(payload))
        _, shard = self._shards.get((signal, bucket)) or self._open(signal, bucket)
        frame = zarr3.compress(payload.ljust(bucket, b"\0"), self._level, cuts(payload))
        shard.append(frame)
        return Place(bucket, len(shard) - 1, len(payload), int.from_bytes(frame[-4:], "little"))

    def _open(self, signal: str, bucket: int) -> tuple[_HashedFile, zarr3.ShardWriter]:
        file = _HashedFile(self._directory / chunk_path(array_name(signal, bucket), 2))
        self._shards[signal, bucket] = file, zarr3.ShardWriter(file)
        return self._shards[signal, bucket]

    def _write(self, path: str, data: bytes) -> None:
        file = _HashedFile(self._directory / path)
        file.write(data)
        self._objects[path] = list(file.close())
