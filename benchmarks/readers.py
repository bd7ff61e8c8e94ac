"""How long reading one sample takes, against the limit and against a tar of safetensors with the same payloads.

The limit is what no reader of these frames can beat: one pread and one zstd decompression of each of a sample's
frames, their places known beforehand. Ours is `store.encoded(shard, key)` on an open store: what the loader's worker
does, sample table, checks and numpy views included. The peer is a tar whose members are zstd-compressed safetensors
of the same payloads, its index in memory. Random and sequential order, all rows and text rows, files in the page
cache, one process and thread; the best of five passes each, taken in turns.

    python benchmarks/readers.py [--json] [--full] [--samples N]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import signals
import zstandard

from compodistill.store import create_store, open_store
from compodistill.store.fragment import array_name, chunk_path
from compodistill.store.table import SIGNALS

DIGEST = "0" * 64
PASSES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--full", action="store_true", help="200 samples")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    n = 200 if options.full else options.samples
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {"samples": n}
    peers: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        for rows in ("all", "text"):
            root = Path(place) / rows
            write(root, rows, n)
            for order in ("random", "sequential"):
                found = measure(root, order)
                name = f"{rows}_rows" if order == "random" else f"{rows}_rows_sequential"
                ratios[f"read_vs_limit_{name}"] = found["ours"] / found["limit"]
                peers.append(found["ours"] / found["safetensors_in_tar"])
                figures |= {f"{who}_us_{name}": 1e6 * seconds for who, seconds in found.items()}
    ratios["read_vs_best_peer"] = max(peers)
    for name, value in (ratios | figures).items():
        print(f"{name:48} {value:12.5g}")
    if options.json:
        machine = {"platform": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
        print(json.dumps({"name": "readers", "ratios": ratios, "figures": figures, "machine": machine}))


def write(root: Path, rows: str, n: int) -> None:
    """A store of generated samples, and beside it the tar of the same payloads."""
    spec = signals.spec_of(8, rows=rows)
    writer = create_store(root / "store", spec)
    with writer.fragment("benchmark", DIGEST) as fragment:
        for sample in signals.generated(n):
            if rows == "text":
                text = ~np.isin(sample.query_positions, sample.visual_positions)
                kept = np.ascontiguousarray(sample.attention[:, text])
                sample = replace(sample, attention=kept, query_positions=sample.query_positions[text])
            fragment.add(sample)
    writer.seal([DIGEST])
    from safetensors.numpy import save

    stored = open_store(root / "store").fragment(DIGEST)
    with tarfile.open(root / "peer.tar", "w") as tar:
        for i, key in enumerate(stored.table.keys):
            arrays = {s: np.frombuffer(stored.payload(i, s), np.uint8) for s in SIGNALS}
            positions = zip(("supervised", "query", "visual"), stored.table.positions(i), strict=True)
            data = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(save(arrays | dict(positions)))
            info = tarfile.TarInfo(f"{key}.safetensors.zst")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def measure(root: Path, order: str) -> dict[str, float]:
    """Seconds a sample of each reader."""
    readers = {"limit": limit(root), "ours": ours(root), "safetensors_in_tar": peer(root)}
    n = len(open_store(root / "store"))
    indices = list(range(n))
    best = dict.fromkeys(readers, float("inf"))
    for i in range(PASSES):
        if order == "random":
            random.Random(i).shuffle(indices)
        for name, read in readers.items():
            start = time.process_time()
            for index in indices:
                read(index)
            best[name] = min(best[name], (time.process_time() - start) / n)
    return best


def limit(root: Path) -> Callable[[int], Sequence[bytes]]:
    fragment = open_store(root / "store").fragment(DIGEST)
    files: dict[str, int] = {}
    places = []
    for i in range(len(fragment.table)):
        frames = []
        for signal in SIGNALS:
            place = fragment.table.place(i, signal)
            name = array_name(signal, place.bucket)
            path = root / "store" / fragment.path / chunk_path(name, 2)
            files.setdefault(name, os.open(path, os.O_RDONLY))
            index = fragment.shard_index(name)
            frames.append((files[name], *index[place.row].tolist(), place.bucket))
        places.append(frames)
    decompress = zstandard.ZstdDecompressor().decompress
    return lambda i: [decompress(os.pread(fd, size, at), max_output_size=n) for fd, at, size, n in places[i]]


def ours(root: Path) -> Callable[[int], object]:
    store = open_store(root / "store")
    keys = store.keys(DIGEST)
    return lambda i: store.encoded(DIGEST, keys[i])


def peer(root: Path) -> Callable[[int], object]:
    from safetensors.numpy import load

    with tarfile.open(root / "peer.tar") as tar:
        places = [(m.offset_data, m.size) for m in tar]
    file = os.open(root / "peer.tar", os.O_RDONLY)
    decompress = zstandard.ZstdDecompressor().decompress

    def read(i: int) -> object:
        at, size = places[i]
        return load(decompress(os.pread(file, size, at)))

    return read


if __name__ == "__main__":
    main()
