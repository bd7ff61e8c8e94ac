from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from shard_files import good_members, picture, record, write_tar

from compodistill.shards import index_shard, iter_shard, shard_digest
from compodistill.tools.cli import cli


def cdist(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "red.png").write_bytes(picture("red"))
    (tmp_path / "images" / "sub" / "blue.jpg").write_bytes(picture("blue", format="JPEG"))
    write(
        tmp_path,
        [record(1, id="a", image="red.png"), record(2, id=7, image=["red.png", "sub/blue.jpg"]), record(0, id="t")],
    )
    return tmp_path


def write(folder: Path, records: Any) -> Path:
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def build(world: Path, *options: object, out: str = "shards") -> Result:
    return cdist("shards", "build", world / "train.json", "--images", world / "images", "--out", world / out, *options)


def test_built_shards_hold_the_records_in_order_and_the_image_files_byte_for_byte(world: Path) -> None:
    result = build(world)
    assert result.exit_code == 0, result.output
    (shard,) = (world / "shards").glob("*.tar")
    assert [(s.key, len(s.images)) for s in iter_shard(shard)] == [("a", 1), ("7", 2), ("t", 0)]
    first, second = index_shard(shard)["7"].images
    data = shard.read_bytes()
    assert data[first.offset :][: first.size] == (world / "images/red.png").read_bytes()
    assert data[second.offset :][: second.size] == (world / "images/sub/blue.jpg").read_bytes()


def test_equal_input_gives_equal_bytes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(world, out="one")
    os.utime(world / "images" / "red.png", (1, 1))
    monkeypatch.setenv("USER", "somebody")
    build(world, out="two")
    assert shard_digest(world / "one/shard-000000.tar") == shard_digest(world / "two/shard-000000.tar")


def test_a_shard_ends_after_n_samples_or_before_it_passes_the_bytes(world: Path) -> None:
    write(world, [record(1, id=i, image="red.png") for i in range(7)])
    assert json.loads(build(world, "--samples-per-shard", 3, "--json").stdout)["shards"] == 3
    assert [len(index_shard(p)) for p in sorted((world / "shards").iterdir())] == [3, 3, 1]
    build(world, "--max-bytes", 400, "--prefix", "p", out="small")
    sizes = [
        sum(m.size for e in index_shard(p).entries for m in (e.record, *e.images)) for p in (world / "small").iterdir()
    ]
    assert len(sizes) > 2
    assert max(sizes) <= 400
    build(world, "--max-bytes", 1, out="tiny")
    assert len(list((world / "tiny").iterdir())) == 7  # no sample is split, none is lost


def test_a_mislabelled_image_gets_the_suffix_of_its_content(world: Path) -> None:
    (world / "images" / "red.png").write_bytes(picture(format="WEBP"))
    build(world)
    assert index_shard(world / "shards/shard-000000.tar")["a"].images[0].name == "a.webp"


MISTAKES: dict[str, tuple[Any, int, str]] = {
    "missing image": ([record(1, id="a", image="nope.png")], 3, "nope.png"),
    "image outside": ([record(1, id="a", image="../train.json")], 3, "outside"),
    "absolute image": ([record(1, id="a", image="/etc/passwd")], 3, "outside"),
    "no image file": ([record(1, id="a", image="text.png")], 3, "text.png"),
    "duplicate id": ([record(0, id="a"), record(0, id="a")], 3, "twice"),
    "ids that collide": ([record(0, id="a.b"), record(0, id="a/b")], 3, "become one key"),
    "no id": ([record(0)], 3, "id"),
    "long id": ([record(0, id="x" * 99)], 3, "longer"),
    "marks": ([record(2, id="a", image="red.png")], 3, "2 image marks"),
    "no conversation": ([{"id": "a"}], 3, "conversations"),
    "empty list": ([], 2, "empty"),
    "no list": ({"a": 1}, 3, "list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_leaves_nothing_behind(world: Path, mistake: str) -> None:
    records, code, says = MISTAKES[mistake]
    (world / "images" / "text.png").write_text("no picture")
    write(world, records)
    before = sorted(world.iterdir())
    result = build(world)
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(world.iterdir()) == before


def test_an_undecodable_image_late_in_the_list_leaves_nothing_behind(world: Path) -> None:
    (world / "images" / "cut.png").write_bytes(noise()[:-200])
    write(world, [*(record(1, id=i, image="red.png") for i in range(5)), record(1, id="cut", image="cut.png")])
    before = sorted(world.iterdir())
    result = build(world, "--samples-per-shard", 2)
    assert result.exit_code == 3
    assert "cut.png" in result.stderr
    assert sorted(world.iterdir()) == before


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("missing", ["source", "images"])
def test_missing_paths_are_the_users_mistake(world: Path, missing: str) -> None:
    (world / "train.json").unlink() if missing == "source" else (world / "images").rename(world / "moved")
    assert build(world).exit_code == 2


def test_an_existing_result_is_not_overwritten(world: Path) -> None:
    build(world)
    digest = shard_digest(world / "shards/shard-000000.tar")
    write(world, [record(0, id="other")])
    assert build(world).exit_code == 2
    assert shard_digest(world / "shards/shard-000000.tar") == digest


def test_check_counts_what_is_there(world: Path) -> None:
    build(world, "--samples-per-shard", 1)
    result = cdist("shards", "check", f"{world}/shards/shard-{{000000..000002}}.tar", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert (facts["shards"], facts["samples"], facts["images"], facts["text_only"]) == (3, 3, 3, 1)
    assert facts["bytes"] == sum(path.stat().st_size for path in (world / "shards").iterdir())
    assert cdist("shards", "check", f"{world}/shards/*.tar").exit_code == 0


def test_check_ends_at_the_first_fault_with_its_shard_and_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", good_members(2))
    bad = write_tar(tmp_path / "b.tar", [("k9.json", record()), ("k9.png", b"no")])
    result = cdist("shards", "check", f"{tmp_path}/*.tar")
    assert result.exit_code == 3
    assert f"shard {bad}, key k9" in result.stderr


def test_check_all_lists_every_fault(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k1.json", record()), ("k1.png", b"no"), ("k2.json", b"{"), ("k3.json", record(0))])
    (tmp_path / "b.tar").write_bytes(b"")
    result = cdist("shards", "check", f"{tmp_path}/*.tar", "--all", "--json")
    assert result.exit_code == 3
    facts = json.loads(result.stdout)
    assert len(facts["faults"]) == 3
    assert facts["samples"] == 1


def test_check_of_nothing_is_exit_code_2(tmp_path: Path) -> None:
    assert cdist("shards", "check", f"{tmp_path}/*.tar").exit_code == 2
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    assert cdist("shards", "check", tmp_path / "empty.tar").exit_code == 2
