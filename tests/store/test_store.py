import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import synthetic
import zarr

from compodistill.errors import MismatchError, StoreError, UsageError
from compodistill.store import create_store, open_store
from compodistill.store.compare import same_content
from compodistill.store.decode import decode_attention, decode_logits


def write(path, spec, shards, seal=True):
    writer = create_store(path, spec)
    for name, samples in shards.items():
        with writer.fragment(name, synthetic.sha(name)) as f:
            for s in samples:
                f.add(s)
    if seal:
        writer.seal([synthetic.sha(n) for n in shards])
    return writer


def tree(root):
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name != "manifest.jsonl"
    }


@pytest.fixture
def spec():
    return synthetic.spec()


def test_lossless_gives_back_every_bit_of_every_kind_of_sample(tmp_path, spec):
    samples = synthetic.zoo(spec)
    write(tmp_path / "s", spec, {"a.tar": samples})
    store = open_store(tmp_path / "s")
    assert len(store) == len(samples)
    assert list(store) == [s.key for s in samples]
    assert store.fragments == [(synthetic.sha("a.tar"), "a.tar", len(samples))]
    for s in samples:
        synthetic.assert_equal(store[s.key], s)
        assert store[s.key].groups == [(3, 5), (4, 6)]


@pytest.mark.parametrize(
    ("codec", "mean", "least", "kl"), [("compact", 0.9985, 0.996, 2e-5), ("fine", 0.9995, 0.999, 1e-6)]
)
def test_lossy_codecs_keep_cosine_and_kl(tmp_path, codec, mean, least, kl):
    spec = synthetic.spec(codec=codec)
    samples = synthetic.zoo(spec)
    write(tmp_path / "s", spec, {"a.tar": samples})
    store = open_store(tmp_path / "s")
    from compodistill.store.fidelity import kl_to_stored, row_cosines

    cosine = np.concatenate([row_cosines(s.attention, store[s.key].attention) for s in samples if s.attention.size])
    assert cosine.mean() >= mean
    assert np.quantile(cosine, 0.01) >= least
    divergence = np.concatenate([kl_to_stored(s.logits, store[s.key].logits) for s in samples])
    assert divergence.mean() <= kl
    for s in samples:
        got = store[s.key]
        np.testing.assert_array_equal(got.logits.lse, s.logits.lse)
        assert (got.attention[s.attention == 0] == 0).all()
        assert (np.diff(got.logits.logprobs, axis=1) <= 0).all()
        tied = np.diff(got.logits.logprobs, axis=1) == 0
        assert (np.diff(got.logits.ids, axis=1)[tied] > 0).all()
        mass = np.exp(s.logits.logprobs.astype(np.float64)).sum(1)
        np.testing.assert_allclose(np.exp(got.logits.logprobs.astype(np.float64)).sum(1), mass, atol=2e-6)


@pytest.mark.parametrize("codec", ["lossless", "fine", "compact"])
def test_torch_and_numpy_decode_the_same(tmp_path, codec):
    spec = synthetic.spec(codec=codec)
    write(tmp_path / "s", spec, {"a.tar": synthetic.zoo(spec)})
    store = open_store(tmp_path / "s")
    for key in store:
        encoded = pickle.loads(pickle.dumps(store.encoded(synthetic.sha("a.tar"), key)))
        tensor = decode_attention(encoded, "cpu")
        assert tensor.shape == store[key].attention.shape
        np.testing.assert_array_equal(tensor.numpy(), store[key].attention)
        np.testing.assert_array_equal(decode_logits(encoded).logprobs, store[key].logits.logprobs)


def test_bytes_do_not_depend_on_who_writes_or_in_which_order(tmp_path, spec):
    shards = {n: synthetic.zoo(spec, i, n) for i, n in enumerate(["a.tar", "b.tar"])}
    write(tmp_path / "one", spec, shards)
    write(tmp_path / "two", spec, dict(reversed(shards.items())))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    names = {open_store(tmp_path / n).info.content_sha256 for n in ("one", "two")}
    assert len(names) == 1


def test_writing_a_shard_again_is_harmless_and_a_different_result_is_an_error(tmp_path, spec):
    samples = synthetic.zoo(spec)
    write(tmp_path / "s", spec, {"a.tar": samples})
    before = tree(tmp_path / "s")
    write(tmp_path / "s", spec, {"a.tar": samples})
    assert tree(tmp_path / "s") == before
    samples[2].attention[0, 0, 0] += 1e-6
    with pytest.raises(StoreError, match=r"differ: the attention of key s-two-images"):
        write(tmp_path / "s", spec, {"a.tar": samples})
    assert tree(tmp_path / "s") == before


def test_equal_content_in_other_frames_is_recognised(tmp_path, spec, monkeypatch):
    from compodistill.store import fragment_writer

    samples = synthetic.zoo(spec)
    write(tmp_path / "s", spec, {"a.tar": samples})
    monkeypatch.setitem(fragment_writer.LEVEL, "lossless", 19)  # as another version of zstd would
    write(tmp_path / "t", spec, {"a.tar": samples})
    assert tree(tmp_path / "s") != tree(tmp_path / "t")
    digest = synthetic.sha("a.tar")
    same_content(open_store(tmp_path / "s").fragment(digest), open_store(tmp_path / "t").fragment(digest))
    write(tmp_path / "s", spec, {"a.tar": samples})


def test_a_block_that_raises_publishes_nothing(tmp_path, spec):
    writer = create_store(tmp_path / "s", spec)

    def samples():
        yield synthetic.zoo(spec)[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "s", spec, {"a.tar": samples()})
    assert not writer.finished(synthetic.sha("a.tar"))
    assert sorted(tree(tmp_path / "s")) == ["fragments/zarr.json", "zarr.json"]


def test_another_spec_is_refused_and_each_differing_field_named(tmp_path, spec):
    create_store(tmp_path / "s", spec)
    other = synthetic.spec(top_k=4, fingerprint=synthetic.FINGERPRINT | {"weights": "x" * 64})
    with pytest.raises(MismatchError) as e:
        create_store(tmp_path / "s", other)
    assert "top_k is 8 in the store, 4 here" in str(e.value)
    assert "fingerprint.weights" in str(e.value)
    assert "config" not in str(e.value)
    create_store(tmp_path / "s", synthetic.spec(versions={"torch": "9"}))  # provenance does not count


def test_unsealed_is_refused_unless_partial_is_allowed_and_can_be_extended_after_sealing(tmp_path, spec):
    shards = {n: synthetic.zoo(spec, i, n) for i, n in enumerate(["a.tar", "b.tar"])}
    writer = write(tmp_path / "s", spec, {"a.tar": shards["a.tar"]}, seal=False)
    with pytest.raises(StoreError, match="not sealed"):
        open_store(tmp_path / "s")
    partial = open_store(tmp_path / "s", allow_partial=True)
    assert not partial.info.sealed
    assert partial.info.n_samples == 6
    with pytest.raises(StoreError, match="1 fragments are missing"):
        writer.seal([synthetic.sha(n) for n in shards])
    writer.seal([synthetic.sha("a.tar")])
    write(tmp_path / "s", spec, {"b.tar": shards["b.tar"]})
    assert len(open_store(tmp_path / "s")) == 12


def test_a_key_of_two_shards_is_ambiguous_and_readable_by_shard(tmp_path, spec):
    write(tmp_path / "s", spec, {"a.tar": synthetic.zoo(spec, 0), "b.tar": synthetic.zoo(spec, 1)})
    store = open_store(tmp_path / "s")
    with pytest.raises(StoreError, match="2 shards"):
        store["s-long"]
    synthetic.assert_equal(store.get(synthetic.sha("b.tar"), "s-long"), synthetic.zoo(spec, 1)[4])
    with pytest.raises(KeyError):
        store["nobody"]


def test_teacher_files_come_back_checked(tmp_path, spec):
    source = tmp_path / "teacher"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "sub" / "weights.safetensors").write_bytes(os.urandom(1000))
    writer = create_store(tmp_path / "s", spec)
    writer.add_teacher_files(source)
    writer.add_teacher_files(source)
    write(tmp_path / "s", spec, {"a.tar": synthetic.zoo(spec)})
    found = open_store(tmp_path / "s").teacher_dir()
    assert (found / "sub" / "weights.safetensors").read_bytes() == (source / "sub" / "weights.safetensors").read_bytes()
    (source / "config.json").write_text("[]")
    with pytest.raises(MismatchError, match="another teacher file"):
        writer.add_teacher_files(source)
    (found / "config.json").write_text("[]")
    with pytest.raises(StoreError, match="not what the manifest vouches for"):
        open_store(tmp_path / "s").teacher_dir()


@pytest.mark.parametrize("codec", ["lossless", "compact"])
def test_zarr_reads_the_same_bytes_by_its_own_means(tmp_path, codec):
    spec = synthetic.spec(codec=codec)
    write(tmp_path / "s", spec, {"a.tar": synthetic.zoo(spec)})
    fragment = open_store(tmp_path / "s").fragment(synthetic.sha("a.tar"))
    group = zarr.open_group(tmp_path / "s" / fragment.path, mode="r", zarr_format=3)
    assert group.metadata.consolidated_metadata is not None
    for i, key in enumerate(fragment.table.keys):
        assert bytes(group["keys"][i]).rstrip(b"\0").decode() == key
        for signal in ("logits", "attention"):
            place = fragment.table.place(i, signal)
            if place.bucket:
                row = group[f"{signal}_{place.bucket}"][place.row]
                assert row[: place.size].tobytes() == fragment.payload(i, signal)
                assert not row[place.size :].any()
    np.testing.assert_array_equal(group["samples"][:], fragment.table.samples)


def test_an_open_store_can_be_sent_to_other_processes(tmp_path, spec):
    write(tmp_path / "s", spec, {"a.tar": synthetic.zoo(spec)})
    store = open_store(tmp_path / "s")
    first = store["s-long"]
    synthetic.assert_equal(pickle.loads(pickle.dumps(store))["s-long"], first)


def test_importing_the_store_imports_neither_torch_nor_zarr():
    code = "import sys, compodistill.store; print([m for m in ('torch', 'zarr') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.attention.__setitem__((0, 0, 0), np.nan), "attention must lie in 0..1"),
        (lambda s: s.logits.ids.__setitem__((0, 0), 1000), "outside the vocabulary"),
        (lambda s: s.logits.logprobs.__setitem__((0, 0), np.inf), "NaN or infinity"),
        (lambda s: s.logits.logprobs.__setitem__((0, 7), 0), "descending"),
        (lambda s: setattr(s, "supervised_positions", s.supervised_positions[::-1].copy()), "strictly increasing"),
        (lambda s: setattr(s, "attention", s.attention[:, :-1]), "must be float32"),
        (lambda s: s.digest.pop("labels"), "digest"),
        (lambda s: setattr(s, "key", ""), "key"),
    ],
)
def test_signals_that_are_not_what_the_spec_promises_are_refused(tmp_path, spec, change, says):
    writer = create_store(tmp_path / "s", spec)
    bad = synthetic.zoo(spec)[0]
    change(bad)
    with pytest.raises(StoreError, match=says), writer.fragment("a.tar", synthetic.sha("a.tar")) as f:
        f.add(bad)
    assert not writer.finished(synthetic.sha("a.tar"))


def test_a_place_that_is_no_store_is_left_alone(tmp_path, spec):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match="not empty"):
        create_store(tmp_path, spec)
    assert os.listdir(tmp_path) == ["letters.txt"]
    with pytest.raises(UsageError, match="no store here"):
        open_store(tmp_path)
