"""A fragment's sample table: who is in it, where the tokens stand, and where each payload is.

Small whole-array objects, read at once when a fragment is opened:

    keys     (N, bytes)  uint8   UTF-8, padded with zeros
    digests  (N, 2, 32)  uint8   sha256 of input ids and of labels
    samples  (N, COLUMNS) int64  see COLUMNS
    runs     (R, 2)      int32   positions as (first, length) runs: each sample's supervised, query, visual in a row
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from compodistill.errors import StoreError

SIGNALS = ("logits", "attention")
KINDS = ("supervised", "query", "visual")
COLUMNS = (
    *(f"{kind}_tokens" for kind in KINDS),
    *(f"{kind}_runs" for kind in KINDS),
    "digest_visual_tokens",
    *(f"{signal}_{part}" for signal in SIGNALS for part in ("bucket", "row", "bytes", "check")),
)
COLUMN = {name: i for i, name in enumerate(COLUMNS)}
MAX_KEY = 4096
MAX_TOKENS = 2**24


@dataclass
class Place:
    """Where a payload is: row `row` of the array `SIGNAL_BUCKET`, its first `size` bytes, and its frame's checksum.

    The check (the last four bytes of the zstd frame) ties each frame to the table, and the table to the manifest: a
    shard swapped with another of the same size is found at the first read. A sample without a payload has bucket 0.
    """

    bucket: int
    row: int
    size: int
    check: int


NOWHERE = Place(0, 0, 0, 0)


def to_runs(positions: np.ndarray) -> np.ndarray:
    """(R, 2) int32 (first, length) runs of strictly increasing positions."""
    if len(positions) == 0:
        return np.zeros((0, 2), np.int32)
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    first = positions[np.concatenate([[0], breaks])]
    length = np.diff(np.concatenate([[0], breaks, [len(positions)]]))
    return np.stack([first, length], 1).astype(np.int32)


def from_runs(runs: np.ndarray) -> np.ndarray:
    """Positions (int32) of runs."""
    if len(runs) == 0:
        return np.zeros(0, np.int32)
    ranges = [np.arange(a, a + n, dtype=np.int32) for a, n in runs.tolist()]
    return ranges[0] if len(ranges) == 1 else np.concatenate(ranges)


class TableBuilder:
    """Collects the rows of a fragment's table."""

    def __init__(self) -> None:
        self._keys: dict[str, bytes] = {}
        self._digests: list[bytes] = []
        self._rows: list[list[int]] = []
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._keys)

    def check_key(self, key: str) -> None:
        """Refuse a key that cannot be stored or is there already."""
        encoded = key.encode()
        if not key or "\0" in key or len(encoded) > MAX_KEY:
            raise StoreError(f"a key is 1 to {MAX_KEY} bytes of UTF-8 without NUL", where=f"key {key[:80]!r}")
        if key in self._keys:
            raise StoreError("the key is in the fragment already", where=f"key {key}")

    def add(
        self, key: str, digest: dict[str, str | int], positions: Iterable[np.ndarray], places: Iterable[Place]
    ) -> None:
        positions = list(positions)
        runs = [to_runs(p) for p in positions]
        self._keys[key] = key.encode()
        self._digests.append(bytes.fromhex(str(digest["input_ids"])) + bytes.fromhex(str(digest["labels"])))
        self._rows.append(
            [len(p) for p in positions]
            + [len(r) for r in runs]
            + [int(digest["visual_tokens"])]
            + [n for p in places for n in (p.bucket, p.row, p.size, p.check)]
        )
        self._runs += runs

    def arrays(self) -> dict[str, tuple[np.ndarray, int, tuple[str, ...]]]:
        """name -> (array, fill value no entry has, dimension names)."""
        width = max(len(k) for k in self._keys.values())
        keys = np.frombuffer(b"".join(k.ljust(width, b"\0") for k in self._keys.values()), np.uint8)
        return {
            "keys": (keys.reshape(-1, width), 255, ("sample", "byte")),
            "digests": (
                np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, 2, 32),
                255,
                ("sample", "field", "byte"),
            ),
            "samples": (np.asarray(self._rows, np.int64), -1, ("sample", "column")),
            "runs": (np.concatenate(self._runs), -1, ("run", "first_length")),
        }


class Table:
    """A fragment's table in memory.

    Raises:
        StoreError: the arrays contradict each other.
    """

    def __init__(self, keys: np.ndarray, digests: np.ndarray, samples: np.ndarray, runs: np.ndarray) -> None:
        n = len(samples)
        if samples.shape != (n, len(COLUMNS)) or len(keys) != n or digests.shape != (n, 2, 32):
            raise StoreError("the sample table's arrays have unequal lengths")
        if n == 0 or samples.min() < 0 or samples[:, :7].max() > MAX_TOKENS:
            raise StoreError("the sample table has impossible entries")
        try:
            self.keys = [bytes(row).rstrip(b"\0").decode() for row in keys]
        except UnicodeDecodeError as e:
            raise StoreError("a key is not UTF-8") from e
        self.row = {key: i for i, key in enumerate(self.keys)}
        if len(self.row) != n or "" in self.row:
            raise StoreError("a key appears twice or is empty")
        ends = samples[:, 3:6].ravel().cumsum()
        if len(runs) != ends[-1] or (len(runs) and (runs.min() < 0 or runs.max() > MAX_TOKENS)):
            raise StoreError("the positions do not fit the sample table")
        totals = np.concatenate([[0], runs[:, 1].astype(np.int64).cumsum()])
        counts = np.diff(totals[np.concatenate([[0], ends])]).reshape(n, 3)
        if not np.array_equal(counts, samples[:, :3]):
            raise StoreError("the positions do not fit the sample table")
        self.samples, self._digests, self._runs = samples, digests, runs
        self._ends = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self.keys)

    def digest(self, i: int) -> dict[str, str | int]:
        return {
            "input_ids": self._digests[i, 0].tobytes().hex(),
            "labels": self._digests[i, 1].tobytes().hex(),
            "visual_tokens": int(self.samples[i, COLUMN["digest_visual_tokens"]]),
        }

    def positions(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Supervised (A,), query (Q,) and visual (V,) positions, int32."""
        ends = self._ends[3 * i : 3 * i + 4]
        supervised, query, visual = (from_runs(self._runs[a:b]) for a, b in pairwise(ends))
        return supervised, query, visual

    def shape(self, i: int) -> tuple[int, int, int]:
        """(A, Q, V)."""
        a, q, v = self.samples[i, :3].tolist()
        return a, q, v

    def place(self, i: int, signal: str) -> Place:
        at = COLUMN[f"{signal}_bucket"]
        return Place(*self.samples[i, at : at + 4].tolist())
