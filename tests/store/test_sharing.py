import json

import pytest
import synthetic
from click.testing import CliRunner

from compodistill.errors import MismatchError, StoreError, UsageError
from compodistill.store import create_store, open_store, sharing
from compodistill.store.card import card
from compodistill.tools.cli import cli

SHARDS = ("a.tar", "b.tar", "c.tar")


def write(path, shards=SHARDS, **changes):
    spec = synthetic.spec(**changes)
    writer = create_store(path, spec)
    for name in shards:
        with writer.fragment(name, synthetic.sha(name)) as f:
            for s in synthetic.zoo(spec, SHARDS.index(name), name):
                f.add(s)
    writer.seal([synthetic.sha(n) for n in shards])
    return path


def run(*arguments):
    return CliRunner().invoke(cli, ["store", *map(str, arguments)])


def content(path):
    return open_store(path).info.content_sha256


def test_a_copy_is_the_same_store_and_copies_only_what_is_missing(tmp_path):
    source = write(tmp_path / "s")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    writer = create_store(source, synthetic.spec())
    writer.add_teacher_files(tmp_path / "teacher")
    writer.seal([])
    done = []
    assert sharing.copy(open_store(source), tmp_path / "t", on_object=lambda path, size: done.append(path)) == 3
    assert content(tmp_path / "t") == content(source)
    assert sharing.verify(open_store(tmp_path / "t")) == []
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "t" / "fragments").rglob("*") if p.is_file()}
    sharing.copy(open_store(source), tmp_path / "t")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "t" / "fragments").rglob("*") if p.is_file()}


def test_a_broken_copy_is_gone_on_with(tmp_path):
    source = write(tmp_path / "s")

    def stop(path, size):
        if path.endswith("samples/c/0/0"):
            raise ConnectionError

    with pytest.raises(ConnectionError):
        sharing.copy(open_store(source), tmp_path / "t", on_object=stop)
    with pytest.raises(StoreError, match="not sealed"):
        open_store(tmp_path / "t")
    assert len(open_store(tmp_path / "t", allow_partial=True)) == 0
    sharing.copy(open_store(source), tmp_path / "t")
    assert content(tmp_path / "t") == content(source)


def test_a_copy_of_chosen_shards_holds_these_alone(tmp_path):
    source = write(tmp_path / "s")
    sharing.copy(open_store(source), tmp_path / "t", only=["[ab].tar"])
    assert [name for _, name, _ in open_store(tmp_path / "t").fragments] == ["a.tar", "b.tar"]
    with pytest.raises(UsageError, match="no shard"):
        sharing.copy(open_store(source), tmp_path / "u", only=["z*"])


def test_a_damaged_source_is_not_copied_and_a_damaged_target_is_found(tmp_path):
    source = write(tmp_path / "s")
    victim = next((tmp_path / "s").glob("fragments/*/attention_*/c/0/0"))
    data = bytearray(victim.read_bytes())
    data[9] ^= 4
    victim.write_bytes(data)
    with pytest.raises(StoreError, match="another content"):
        sharing.copy(open_store(source), tmp_path / "t")
    (line,) = sharing.verify(open_store(source))
    assert "attention_" in line
    assert sharing.verify(open_store(source), quick=True) == []
    victim.write_bytes(data[:-1])
    (line,) = sharing.verify(open_store(source), quick=True)
    assert "bytes" in line


def test_parts_merge_into_the_whole_and_strangers_are_refused_with_the_fields_named(tmp_path):
    whole = write(tmp_path / "whole")
    parts = [write(tmp_path / n, [n + ".tar"]) for n in "abc"]
    assert sharing.merge(map(open_store, parts), tmp_path / "merged") == 3
    assert content(tmp_path / "merged") == content(whole)
    other = write(tmp_path / "other", ["a.tar"], fingerprint=synthetic.FINGERPRINT | {"weights": "x" * 64})
    with pytest.raises(MismatchError, match=r"fingerprint.weights.*another teacher"):
        sharing.merge(map(open_store, [whole, other]), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_diff_says_what_a_difference_means_for_a_student(tmp_path):
    a = write(tmp_path / "a", ["a.tar"])
    b = write(tmp_path / "b", ["a.tar", "b.tar"], top_k=4, rows="text")
    found = json.loads(run("diff", a, b, "--json").stdout)
    assert {d["field"] for d in found["fields"]} == {"top_k", "rows"}
    assert all(d["meaning"] for d in found["fields"])
    assert found["shards"] == ["b.tar is in the second only"]
    assert "same signals" in run("diff", a, a).stdout


def test_every_field_a_spec_can_differ_in_has_a_meaning():
    fields = {name for name in synthetic.spec().identity() if not name.startswith("fingerprint.")}
    assert fields <= set(sharing.MEANING)


def test_info_verify_and_card_tell_the_store(tmp_path):
    path = write(tmp_path / "s", codec="compact")
    facts = json.loads(run("info", path, "--json").stdout)
    assert facts["samples"] == 18
    assert facts["fidelity"]["attention_cosine_mean"] > 0.998
    assert "fidelity" in run("info", path).stdout
    assert "all 3 fragments are whole" in run("verify", path).stdout
    text = card(open_store(path), "shards of my own")
    for said in ("tiny", "shards of my own", "18 in 3 fragments", facts["content_sha256"], "0.99"):
        assert said in text
    victim = next(path.glob("fragments/*/logits_*/c/0/0"))
    victim.unlink()
    result = run("verify", path)
    assert result.exit_code == 3
    assert "missing" in result.stderr
    assert run("info", tmp_path / "nowhere").exit_code == 2


def test_push_pull_and_merge_are_commands(tmp_path):
    path = write(tmp_path / "s")
    assert run("push", path, tmp_path / "t").exit_code == 0
    assert run("pull", tmp_path / "t", tmp_path / "u", "--only", "a.tar").exit_code == 0
    assert run("merge", tmp_path / "u", tmp_path / "t", "--out", tmp_path / "m").exit_code == 0
    assert content(tmp_path / "m") == content(path)
