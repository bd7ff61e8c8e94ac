import json
import subprocess
import sys

import pytest
import synthetic
import torch
from torch.utils.data import DataLoader, Dataset

from compodistill.store import create_store, open_store

DIGEST = synthetic.sha("a.tar")
# each library in a process of its own: they hang or abort where a process that used them is forked
READ = {
    "zarr-python": """
import zarr
group = zarr.open_group(root, mode="r", zarr_format=3)
read = lambda name: group[name][:]
""",
    "zarrs": """
import zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
group = zarr.open_group(root, mode="r", zarr_format=3)
read = lambda name: group[name][:]
""",
    "tensorstore": """
import tensorstore
def read(name):
    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}"}}
    return tensorstore.open(where, read=True).result().read().result()
""",
}
HASH = """
import hashlib, json, numpy as np
print(json.dumps({n: hashlib.sha256(np.ascontiguousarray(read(n)).tobytes()).hexdigest() for n in names}))
"""
MODULE = {"zarr-python": "zarr", "zarrs": "zarrs", "tensorstore": "tensorstore"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    spec = synthetic.spec(codec="compact")
    writer = create_store(path, spec)
    with writer.fragment("a.tar", DIGEST) as f:
        for s in synthetic.zoo(spec):
            f.add(s)
    writer.seal([DIGEST])
    return path


@pytest.mark.parametrize("library", READ)
def test_every_zarr_v3_library_reads_the_arrays_we_read(root, library):
    pytest.importorskip(MODULE[library])
    fragment = open_store(root).fragment(DIGEST)
    group = root / fragment.path
    names = sorted(p.name for p in group.iterdir() if p.is_dir())
    code = f"root = {str(group)!r}\nnames = {names!r}\n" + READ[library] + HASH
    theirs = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    import hashlib

    import numpy as np

    ours = {"samples": fragment.table.samples}
    for name in names:
        signal, _, bucket = name.partition("_")
        if bucket:
            rows = {}
            for i in range(len(fragment.table)):
                place = fragment.table.place(i, signal)
                if place.bucket == int(bucket):
                    rows[place.row] = np.frombuffer(bytes(fragment.payload(i, signal)).ljust(place.bucket, b"\0"), "u1")
            ours[name] = np.stack([rows[i] for i in range(len(rows))])
    assert len(ours) > 3
    for name, array in ours.items():
        assert theirs[name] == hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(), name


class Signals(Dataset):
    def __init__(self, store):
        self.store, self.keys = store, list(store)

    def __len__(self):
        return 4 * len(self.keys)

    def __getitem__(self, i):
        return self.store.encoded(DIGEST, self.keys[i % len(self.keys)])


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_loader_workers_read_what_the_main_process_reads(root, method):
    from compodistill.store.decode import decode_attention

    store = open_store(root)
    exact = {key: store[key].attention for key in store}  # the store is in use before the workers start
    loader = DataLoader(
        Signals(store), batch_size=3, num_workers=2, collate_fn=list, multiprocessing_context=method, shuffle=True
    )
    seen = 0
    for batch in loader:
        for encoded in batch:
            assert torch.equal(decode_attention(encoded), torch.from_numpy(exact[encoded.key]))
            seen += 1
    assert seen == 24
