"""Wrote tests/store/golden with format version 1: `python tests/store/make_golden.py`, with tests/ on PYTHONPATH.

Not to be run again for this version: the point of a golden store is that later code reads what earlier code wrote.
"""

from pathlib import Path

import numpy as np
import synthetic

from compodistill.store import SampledLogits, create_store, open_store

GOLDEN = Path(__file__).parent / "golden"
FIELDS = ("supervised_positions", "query_positions", "visual_positions", "attention")


def arrays_of(store) -> dict[str, np.ndarray]:
    """Every array of every sample, by `key.field`."""
    found = {}
    for key in store:
        signals = store[key]
        found |= {f"{key}.{f}": getattr(signals, f) for f in FIELDS}
        found |= {f"{key}.logits.{f}": v for f, v in vars(signals.logits).items()}
    return found


def main() -> None:
    for name, changes in {"lossless": {}, "compact": {"codec": "compact"}, "draws": {"draws": 4}}.items():
        spec = synthetic.spec(**changes)
        writer = create_store(GOLDEN / name, spec)
        shards = ("a.tar", "b.tar") if name == "compact" else ("a.tar",)
        for seed, shard in enumerate(shards):
            with writer.fragment(shard, synthetic.sha(shard)) as f:
                for s in synthetic.zoo(spec, seed, shard)[:4]:
                    if spec.draws:
                        n = len(s.supervised_positions)
                        ids = np.tile(np.array([[7, 3, -1]], np.int32), (n, 1))
                        s.logits = SampledLogits(ids, np.tile(np.array([[3, 1, 0]], np.int32), (n, 1)), s.logits.lse)
                    f.add(s)
        if name == "compact":
            teacher = GOLDEN / "teacher"
            teacher.mkdir()
            (teacher / "config.json").write_text('{"model_type": "golden"}')
            writer.add_teacher_files(teacher)
            (teacher / "config.json").unlink()
            teacher.rmdir()
        writer.seal(map(synthetic.sha, shards))
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays_of(open_store(GOLDEN / name)))


if __name__ == "__main__":
    main()
