"""Every object of a small store damaged in every way: each is detected and named, and nothing is ever filled in."""

import shutil
from itertools import pairwise

import pytest
import synthetic

from compodistill.errors import StoreError, UsageError
from compodistill.store import create_store, open_store, sharing

SHARDS = ("a.tar", "b.tar")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "s"
    spec = synthetic.spec()
    teacher = tmp_path_factory.mktemp("teacher")
    (teacher / "config.json").write_text('{"a": 1}')
    (teacher / "other.json").write_text('{"b": 2}')
    writer = create_store(root, spec)
    writer.add_teacher_files(teacher)
    for i, name in enumerate(SHARDS):
        with writer.fragment(name, synthetic.sha(name)) as f:
            for s in synthetic.zoo(spec, i, name)[:3]:
                f.add(s)
    writer.seal([synthetic.sha(n) for n in SHARDS])
    return root


def use(root):
    """Everything a user would read; what is returned must be exact."""
    store = open_store(root)
    exact = {s.key: s for i, name in enumerate(SHARDS) for s in synthetic.zoo(synthetic.spec(), i, name)[:3]}
    for key in store:
        synthetic.assert_equal(store[key], exact[key])
    store.teacher_dir()
    wrong = sharing.verify(store)
    if wrong:
        raise StoreError(wrong[0])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def extend(path):
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE = {
    "flip a bit": flip,
    "truncate": truncate,
    "extend": extend,
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_object_is_detected_and_named(whole, tmp_path, how):
    use(whole)
    for original in sorted(p for p in whole.rglob("*") if p.is_file()):
        path = original.relative_to(whole)
        root = tmp_path / "s"
        shutil.copytree(whole, root)
        DAMAGE[how](root / path)
        with pytest.raises((StoreError, UsageError)) as e:
            use(root)
        # without its root metadata or manifest it looks like a place that never was a store: then that place is named
        named = path.as_posix() in str(e.value)
        assert named or (how == "delete" and len(path.parts) == 1), f"{path}: {e.value}"
        shutil.rmtree(root)


def test_any_two_objects_swapped_are_detected(whole, tmp_path):
    objects = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    swaps = list(pairwise(objects))
    first, second = (f"fragments/{synthetic.sha(n)}/" for n in SHARDS)
    for a in objects:  # the same object of the other fragment
        twin = a.as_posix().replace(first, second)
        if twin != a.as_posix() and (whole / twin).exists():
            swaps.append((a, objects[objects.index(type(a)(twin))]))
    checked = 0
    for a, b in swaps:
        contents = (whole / a).read_bytes(), (whole / b).read_bytes()
        if contents[0] == contents[1]:
            continue
        root = tmp_path / "s"
        shutil.copytree(whole, root)
        (root / a).write_bytes(contents[1])
        (root / b).write_bytes(contents[0])
        with pytest.raises((StoreError, UsageError)):
            use(root)
        shutil.rmtree(root)
        checked += 1
    assert checked > 20


def test_whole_fragments_swapped_are_detected(whole, tmp_path):
    root = tmp_path / "s"
    shutil.copytree(whole, root)
    a, b = (root / "fragments" / synthetic.sha(n) for n in SHARDS)
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    with pytest.raises(StoreError, match="vouches"):
        use(root)
