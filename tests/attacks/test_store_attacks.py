"""Each attack on a store, made by somebody who can write its files and make its checksums fit, and the verdict."""

import base64
import hashlib
import json
import pickle

import memory
import numpy as np
import pytest
import synthetic
import zstandard

from compodistill.errors import CdistError, StoreError
from compodistill.store import create_store, open_store, zarr3
from compodistill.store import manifest as manifests
from compodistill.store.codecs import attention, logits
from compodistill.store.payload import pack

DIGEST = synthetic.sha("a.tar")


@pytest.fixture
def spec():
    return synthetic.spec()


@pytest.fixture
def store(tmp_path, spec):
    writer = create_store(tmp_path / "s", spec)
    with writer.fragment("a.tar", DIGEST) as f:
        for s in synthetic.zoo(spec):
            f.add(s)
    writer.seal([DIGEST])
    return tmp_path / "s"


def forge(store, change=lambda group: None, **objects):
    """Replace objects of the fragment, then make every size and sha256 up to the manifest fit again."""
    root = store / "fragments" / DIGEST
    for path, data in objects.items():
        (root / path).write_bytes(data)
    group = json.loads((root / "zarr.json").read_text())
    for path in objects:
        group["attributes"]["cdist"]["objects"][path] = [len(objects[path]), hashlib.sha256(objects[path]).hexdigest()]
    change(group)
    data = json.dumps(group).encode()
    (root / "zarr.json").write_bytes(data)
    manifest = manifests.load((store / "manifest.jsonl").read_bytes(), "")
    entry = manifest.entries[DIGEST]
    values = {n: getattr(entry, n) for n in manifests.COLUMNS}
    values |= {"metadata_bytes": len(data), "metadata_sha256": hashlib.sha256(data).hexdigest()}
    manifest.entries[DIGEST] = manifests.Entry(**values)
    (store / "manifest.jsonl").write_bytes(manifest.dump())


def read_all(store):
    opened = open_store(store)
    return [opened[key] for key in opened]


def members(group):
    return group["consolidated_metadata"]["metadata"]


class Bomb:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.cdist_was_executed = True",))


def test_a_forged_store_that_lies_about_nothing_is_read(store):
    forge(store)
    assert len(read_all(store)) == 6


def test_pickle_codecs_and_version_2_metadata_never_execute(store):
    import builtins

    root = store / "fragments" / DIGEST
    v2 = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C", "compressor": None}
    v2 |= {"fill_value": None, "filters": [{"id": "pickle"}]}
    (root / "keys" / ".zarray").write_text(json.dumps(v2))
    (root / "keys" / "0").write_bytes(pickle.dumps(Bomb()))
    assert len(read_all(store)) == 6

    def use_pickle(group):
        members(group)["keys"]["codecs"] = [{"name": "numcodecs.pickle"}]
        members(group)["keys"]["fill_value"] = base64.b64encode(pickle.dumps(Bomb())).decode()

    forge(store, use_pickle)
    with pytest.raises(StoreError, match="codecs"):
        read_all(store)
    assert not hasattr(builtins, "cdist_was_executed")


@pytest.mark.parametrize("name", ["blosc", "numcodecs.zlib", "transpose", "https://evil/codec"])
def test_codecs_that_are_not_on_the_list_are_refused(store, name):
    forge(store, lambda g: members(g)["samples"]["codecs"].append({"name": name}))
    with pytest.raises(StoreError, match="codecs"):
        read_all(store)


@pytest.mark.parametrize("declared", ["true size", "small size"])
def test_a_zstd_bomb_is_refused_before_it_is_resident(store, declared):
    n = 2**30
    bomb = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj(size=n)
    data = b"".join(bomb.compress(bytes(2**24)) for _ in range(64)) + bomb.flush()
    if declared == "small size":  # the frame's header says 384 bytes, its blocks hold a gigabyte
        honest = zarr3.compress(bytes(6 * 64), 1)
        start = zstandard.frame_header_size(data)
        data = honest[: zstandard.frame_header_size(honest)] + data[start:]
    forge(store, **{"digests/c/0/0/0": data})
    before = memory.reset_peak()
    with pytest.raises(StoreError):
        read_all(store)
    assert memory.peak_kib() - before < 200_000  # kB


@pytest.mark.parametrize(
    "shape", [[10**9, 2, 32], [-6, 2, 32], [6, 2], [6, 2, 33], ["6", 2, 32], [6.0, 2, 32], [2**62, 2, 32], [0, 2, 32]]
)
def test_shapes_that_lie_are_refused(store, shape):
    forge(store, lambda g: members(g)["digests"].update(shape=shape))
    with pytest.raises(StoreError):
        read_all(store)


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "a/../../b", "logits_../x", "logits_-1", "C:\\x"])
def test_nodes_outside_the_fragment_are_refused(store, name):
    def add(group):
        members(group)[name] = members(group)["keys"]
        for path in (f"{name}/zarr.json", f"{name}/c/0/0"):
            group["attributes"]["cdist"]["objects"][path] = [1, "0" * 64]

    forge(store, add)
    with pytest.raises(StoreError, match="does not know"):
        read_all(store)


@pytest.mark.parametrize("path", ["teacher/../../x", "/etc/passwd", "teacher//x", "teacher/a\\b", "C:/x", ""])
def test_manifest_files_outside_the_store_are_refused(store, path):
    manifest = manifests.load((store / "manifest.jsonl").read_bytes(), "")
    manifest.files[path] = (1, "0" * 64)
    (store / "manifest.jsonl").write_bytes(manifest.dump())
    with pytest.raises(StoreError, match="lists a file it may not"):
        open_store(store)


def test_a_manifest_of_a_gigabyte_is_refused_unread(store):
    with (store / "manifest.jsonl").open("wb") as f:
        f.truncate(2**30)  # sparse: takes no disk
    before = memory.reset_peak()
    with pytest.raises(StoreError, match="at most"):
        open_store(store)
    assert memory.peak_kib() - before < 100_000


@pytest.mark.parametrize("name", ["manifest.jsonl", "zarr.json", "teacher.json"])
def test_json_nested_ten_thousand_deep_is_an_error_not_a_crash(store, name):
    deep = b"[" * 10_000 + b"]" * 10_000
    if name == "manifest.jsonl":
        sums = [hashlib.sha256(x + b"\n").hexdigest() for x in (deep, b"{}")]
        deep = deep + b"\n{}\n" + zarr3.dump({"sha256": sums})
    (store / name).write_bytes(deep)
    with pytest.raises(CdistError):
        open_store(store) if name != "teacher.json" else create_store(store, synthetic.spec()).seal([])


def test_ids_beyond_the_vocabulary_are_refused(spec):
    good = synthetic.zoo(spec)[0].logits
    for codec in ("lossless", "compact"):
        payload = logits.encode(good, codec)
        with pytest.raises(StoreError, match="vocabulary"):
            logits.decode(payload, good.ids.shape, codec, vocab_size=int(good.ids.max()))


def test_nan_and_infinity_are_refused():
    values = np.full((1, 2, 3), np.nan, np.float32)
    with pytest.raises(StoreError, match="NaN"):
        attention.decode(pack([values]), (1, 2, 3), "lossless")
    payload = bytearray(attention.encode(np.full((1, 8, 9), 0.1, np.float32), "compact"))
    at = payload.find(np.float32(np.arange(16)[2] + 0.05).astype("<f4").tobytes())
    payload[at : at + 4] = np.float32(np.inf).tobytes()
    with pytest.raises(StoreError, match="NaN"):
        attention.decode(bytes(payload), (1, 8, 9), "compact")
    row = np.zeros((1, 4), np.float32)
    lossless = pack([np.arange(4, dtype="<i4"), row - np.inf, row[:, 0]])
    with pytest.raises(StoreError, match="NaN"):
        logits.decode(lossless, (1, 4), "lossless", 10)


def test_a_manifest_that_was_touched_is_refused(store):
    path = store / "manifest.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"samples":[6]', b'"samples":[5]'))
    with pytest.raises(StoreError, match="damaged"):
        open_store(store)


@pytest.mark.parametrize("seed", range(30))
def test_payloads_of_noise_are_errors_not_crashes(seed):
    rng = np.random.default_rng(seed)
    exact = synthetic.attention(rng, 2, np.arange(20), np.arange(12))
    payload = bytearray(attention.encode(exact, "compact"))
    for at in rng.integers(0, len(payload), 4):
        payload[at] = rng.integers(256)
    try:
        got = attention.decode(bytes(payload), exact.shape, "compact")
    except StoreError:
        return
    assert got.shape == exact.shape
    assert np.isfinite(got).all()
