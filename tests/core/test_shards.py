from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from random import Random

import pytest
import webdataset
from PIL import Image
from shard_files import ANSWER, good_members, picture, record, write_tar

from compodistill.errors import CdistError, DataError, UsageError
from compodistill.samples import Turn
from compodistill.shards import expand_shards, index_shard, iter_shard, read_sample, shard_digest


def test_a_sample_carries_its_turns_with_marks_in_place_and_its_images(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a/b.json", record()), ("a/b.png", picture("blue", (5, 3)))])
    (sample,) = iter_shard(shard)
    assert sample.key == "a/b"
    assert sample.turns == (Turn("user", (None, "What is this?")), Turn("assistant", ("a square",)))
    assert [image.size for image in sample.images] == [(5, 3)]
    assert sample.images[0].getpixel((0, 0)) == (0, 0, 255)
    assert str(shard) in sample.where


def test_text_only_and_two_images_and_a_mark_in_the_second_turn(tmp_path: Path) -> None:
    late = {
        "conversations": [
            {"from": "human", "value": "Hello"},
            ANSWER,
            {"from": "human", "value": "And\n<image>"},
            ANSWER,
        ]
    }
    shard = write_tar(
        tmp_path / "s.tar",
        [("t.json", record(0)), ("two.1.jpg", picture("green", format="JPEG")), ("two.0.webp", picture(format="WEBP")),
         ("two.json", record(2)), ("late.json", late), ("late.JPEG", picture(format="JPEG"))],
    )  # fmt: skip
    text, two, last = iter_shard(shard)
    assert text.images == ()
    assert [image.getpixel((0, 0))[0] > 200 for image in two.images] == [
        True,
        False,
    ]  # 0 is red, though it stands second
    assert last.turns[2] == Turn("user", ("And", None))


def test_more_than_ten_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    images = [(f"k.{i}.png", picture(size=(i + 1, 1))) for i in sorted(range(12), key=str)]
    (sample,) = iter_shard(write_tar(tmp_path / "s.tar", [*images, ("k.json", record(12))]))
    assert [image.width for image in sample.images] == list(range(1, 13))


def test_random_access_equals_the_stream(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [*good_members(4), ("t.json", record(0))])
    index = index_shard(shard)
    streamed = list(iter_shard(shard))
    assert index.keys == [sample.key for sample in streamed] == ["k0", "k1", "k2", "k3", "t"]
    for sample in reversed(streamed):
        again = read_sample(index.path, index[sample.key])
        assert (again.key, again.turns, again.shard) == (sample.key, sample.turns, sample.shard)
        assert [i.tobytes() for i in again.images] == [i.tobytes() for i in sample.images]


def test_the_index_decodes_no_image(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("k.json", record()), ("k.png", b"not an image")])
    entry = index_shard(shard)["k"]
    raw = shard.read_bytes()
    assert raw[entry.images[0].offset :][: entry.images[0].size] == b"not an image"


def test_webdataset_reads_the_same_keys_and_bytes(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", good_members(3))
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == index_shard(shard).keys


def test_orientation_is_applied_and_pixels_are_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    grey = io.BytesIO()
    Image.new("L", (4, 4), 77).save(grey, "PNG")
    deep = io.BytesIO()
    Image.new("I;16", (4, 4), 0x4D00).save(deep, "PNG")
    shard = write_tar(
        tmp_path / "s.tar",
        [("a.json", record()), ("a.jpg", picture(size=(8, 6), format="JPEG", exif=exif)),
         ("b.json", record(2)), ("b.0.png", grey.getvalue()), ("b.1.png", deep.getvalue())],
    )  # fmt: skip
    turned, grey_sample = iter_shard(shard)
    assert turned.images[0].size == (6, 8)
    assert [i.getpixel((1, 1)) for i in grey_sample.images] == [(77, 77, 77)] * 2  # 16 bits are not clipped to white


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "s.tar", [("a.json", record()), ("a.jpg", picture(format="JPEG", exif=b"Exif\0\0garbage"))]
    )
    (sample,) = iter_shard(shard)
    assert sample.images[0].size == (8, 6)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_at_any_block_is_an_error_that_names_the_last_key(tmp_path: Path, format: int) -> None:
    whole = write_tar(tmp_path / "whole.tar", good_members(3), format=format).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    cut = tmp_path / "cut.tar"
    for length in range(0, end + 1024, 512):
        cut.write_bytes(whole[:length])
        for read in (lambda: list(iter_shard(cut)), lambda: index_shard(cut)):
            with pytest.raises(CdistError) as caught:
                read()
            assert str(cut) in str(caught.value)
        if length >= end:
            assert "k2" in str(caught.value)
    cut.write_bytes(whole[: end + 1024])
    assert len(list(iter_shard(cut))) == 3  # what lies behind the two end blocks is padding


def test_a_tar_cut_anywhere_inside_a_block_is_an_error(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", good_members(1)).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in range(1, len(whole.rstrip(b"\0")), 97):
        cut.write_bytes(whole[:length])
        with pytest.raises(CdistError):
            list(iter_shard(cut))


def test_tars_joined_by_cat_are_refused_not_half_read(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "one.tar", good_members(1)).read_bytes()
    both = tmp_path / "both.tar"
    both.write_bytes(one + one)
    with pytest.raises(DataError, match="behind the end"):
        list(iter_shard(both))


def test_a_damaged_header_in_the_middle_does_not_end_the_shard_silently(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", good_members(3))
    data = bytearray(shard.read_bytes())
    data[data.index(b"k1.json")] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(DataError, match="k0"):
        list(iter_shard(shard))


def test_a_compressed_tar_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in good_members(30):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with pytest.raises(DataError, match="not a plain tar"):
        list(iter_shard(path))


@pytest.mark.parametrize("name", ["/etc/k.json", "../k.json", "a/../../k.json", "a\\..\\k.json"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="outside"):
        list(iter_shard(write_tar(tmp_path / "s.tar", [(name, record(0))])))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("k.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="a link, a device"):
        list(iter_shard(path))


def test_a_header_that_asks_for_gigabytes_is_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 4 * 2**30
    path.write_bytes(info.tobuf() + bytes(4096))
    with pytest.raises(DataError, match="extended header"):
        list(iter_shard(path))


def test_a_chain_of_extended_headers_is_an_error_not_a_crash(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 11
    block = info.tobuf() + b"11 a=bcdef\n".ljust(512, b"\0")
    path = tmp_path / "s.tar"
    path.write_bytes(block * 5000 + bytes(1024))
    with pytest.raises(DataError):
        list(iter_shard(path))


def test_plain_tar_of_a_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "k.json").write_text(json.dumps(record()))
    (folder / "k.png").write_bytes(picture())
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(folder, arcname=".")
    assert index_shard(tmp_path / "s.tar").keys == ["k"]


FAULTS = {
    "duplicate key": ([("bad.json", record(0)), ("x.json", record(0)), ("bad.json", record(0))], "twice"),
    "undecodable image": ([("bad.json", record()), ("bad.png", b"\x89PNG\r\n\x1a\nrubbish")], "image"),
    "truncated image": (
        [("bad.json", record()), ("bad.jpg", picture(size=(600, 600), format="JPEG")[:2000])],
        "decoded",
    ),
    "foreign image format": ([("bad.json", record()), ("bad.png", picture(format="GIF"))], "JPEG, PNG or WebP"),
    "foreign member": ([("bad.json", record(0)), ("bad.pyd", b"cos\nsystem\n(S'id'\ntR.")], "bad.pyd"),
    "no record": ([("bad.png", picture())], "no JSON"),
    "json no json": ([("bad.json", b"{")], "JSON"),
    "json deep": ([("bad.json", b"[" * 200_000)], "JSON"),
    "json not text": ([("bad.json", b'"\xff\xfe')], "JSON"),
    "json large": ([("bad.json", b" " * (9 * 2**20))], "bytes"),
    "no conversation": ([("bad.json", {"caption": "x"})], "conversations"),
    "empty conversation": ([("bad.json", {"conversations": []})], "conversations"),
    "no answer": ([("bad.json", {"conversations": [{"from": "human", "value": "x"}]})], "assistant"),
    "unknown role": ([("bad.json", {"conversations": [{"from": "judge", "value": "x"}, ANSWER]})], "from"),
    "empty turn": ([("bad.json", {"conversations": [{"from": "human", "value": ""}, ANSWER]})], "empty"),
    "value no string": ([("bad.json", {"conversations": [{"from": "human", "value": 3}, ANSWER]})], "value"),
    "more marks than images": ([("bad.json", record(2)), ("bad.png", picture())], "2 image marks"),
    "more images than marks": ([("bad.json", record(0)), ("bad.png", picture())], "0 image marks"),
    "gap in the numbers": ([("bad.json", record(2)), ("bad.0.png", picture()), ("bad.2.png", picture())], "numbered"),
    "two images in one place": ([("bad.json", record()), ("bad.png", picture()), ("bad.jpg", picture())], "two images"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_shard_and_key_and_can_be_skipped(tmp_path: Path, fault: str) -> None:
    members, says = FAULTS[fault]
    shard = write_tar(tmp_path / "s.tar", [("good.json", record(0)), *members, ("last.json", record(0))])
    with pytest.raises(DataError, match=says) as caught:
        list(iter_shard(shard))
    assert f"shard {shard}, key bad" in caught.value.where
    faults: list[DataError] = []
    kept = [sample.key for sample in iter_shard(shard, on_error=faults.append)]
    assert kept[0] == "good"
    assert kept[-1] == "last"
    assert len(faults) == 1


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")  # 50 kB, 1.2 GB as RGB
    shard = write_tar(tmp_path / "s.tar", [("bad.json", record()), ("bad.png", bomb.getvalue())])
    with pytest.raises(DataError, match="pixels"):
        list(iter_shard(shard))


def test_on_error_hears_of_a_truncated_tar_and_the_stream_ends(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", good_members(3))
    shard.write_bytes(shard.read_bytes()[: 512 * 6])
    faults: list[DataError] = []
    assert [sample.key for sample in iter_shard(shard, on_error=faults.append)] == ["k0"]
    assert "truncated" in str(faults[0])


def test_an_empty_shard_is_the_users_mistake(tmp_path: Path) -> None:
    for data in (b"", bytes(1024), bytes(10240)):
        (tmp_path / "s.tar").write_bytes(data)
        with pytest.raises(UsageError, match="empty"):
            index_shard(tmp_path / "s.tar")


def test_messages_in_hugging_face_form(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "Look:"}, {"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content},
                {"role": "assistant", "content": "A square."}]  # fmt: skip
    shard = write_tar(tmp_path / "s.tar", [("k.json", {"messages": messages}), ("k.png", picture())])
    (sample,) = iter_shard(shard)
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]
    assert sample.turns[1].parts == ("Look:", None, "what?")


def test_one_newline_next_to_a_mark_is_dropped(tmp_path: Path) -> None:
    from compodistill.records import split_marks

    assert split_marks("<image>\nWhat?") == (None, "What?")
    assert split_marks("What?\n<image>") == ("What?", None)
    assert split_marks("A\n<image>\nB") == ("A\n", None, "B")
    assert split_marks("<image>\n\nB") == (None, "\nB")
    assert split_marks("<image><image>\nB") == (None, None, "B")
    assert split_marks("plain") == ("plain",)


def test_the_digest_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", good_members(1))
    assert shard_digest(shard) == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_patterns_expand_globs_and_braces_in_order(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"s-{i:03d}.tar").touch()
    names = [path.name for path in expand_shards(f"{tmp_path}/s-{{000..002}}.tar")]
    assert names == ["s-000.tar", "s-001.tar", "s-002.tar"]
    assert len(expand_shards([f"{tmp_path}/*.tar", tmp_path / "s-000.tar"])) == 12  # each file once
    assert [p.name for p in expand_shards(f"{tmp_path}/s-{{00[5-6],011}}.tar")] == [
        "s-005.tar",
        "s-006.tar",
        "s-011.tar",
    ]


@pytest.mark.parametrize(
    "pattern",
    ["no/such.tar", "no/*.tar", "{000..003}.tar", "pipe:cat x.tar", "s3://b/x.tar", "a{b.tar", "{0..9999999}.tar", "."],
)
def test_a_pattern_that_names_no_shard_is_the_users_mistake(pattern: str) -> None:
    with pytest.raises(UsageError):
        expand_shards(pattern)


def test_a_file_whose_name_holds_braces_is_found(tmp_path: Path) -> None:
    (tmp_path / "a{1}[2].tar").touch()
    assert len(expand_shards(tmp_path / "a{1}[2].tar")) == 1


def test_damage_of_any_kind_ends_in_our_own_error_and_never_in_fewer_samples(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", good_members(3), format=tarfile.PAX_FORMAT).read_bytes()
    used = len(whole.rstrip(b"\0")) + 1024
    random = Random(0)
    damaged = tmp_path / "damaged.tar"
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(random.choice([1, 1, 4, 40])):
            data[random.randrange(used)] = random.randrange(256)
        damaged.write_bytes(data)
        try:
            samples = list(iter_shard(damaged))
        except CdistError:
            continue
        assert len(samples) == 3
