"""Writers killed by SIGKILL at named points: what remains is whole or absent, and the next run leaves no litter."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from compodistill.store import create_store, open_store

SHARDS = ("a.tar", "b.tar")
WRITER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import synthetic
from compodistill.store import create_store, fragment_writer, storage, writer, zarr3

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_call(n, original):
    calls = []
    def call(*arguments, **named):
        calls.append(1)
        if len(calls) == n:
            die()
        return original(*arguments, **named)
    return call

point = {point!r}
if point == "between samples":
    fragment_writer.FragmentBuilder.add = die_at_call(8, fragment_writer.FragmentBuilder.add)
elif point == "before the table":
    fragment_writer.TableBuilder.arrays = die_at_call(2, fragment_writer.TableBuilder.arrays)
elif point == "before publishing":
    storage.LocalStorage.publish = die_at_call(2, storage.LocalStorage.publish)
elif point == "between rename and fsync":
    rename = os.rename
    def rename_and_die(*a):
        rename(*a)
        if "fragments" in str(a[1]) and {second!r} in str(a[1]):
            die()
    os.rename = rename_and_die
elif point == "before the seal":
    writer.StoreWriter.seal = die
elif point == "while sealing":
    replace = os.replace
    os.replace = lambda *a: die() if str(a[1]).endswith("manifest.jsonl") else replace(*a)
spec = synthetic.spec()
w = create_store({root!r}, spec)
for i, name in enumerate({shards!r}):
    if not w.finished(synthetic.sha(name)):
        with w.fragment(name, synthetic.sha(name)) as f:
            for s in synthetic.zoo(spec, i, name):
                f.add(s)
w.seal([synthetic.sha(n) for n in {shards!r}])
"""
POINTS = (
    "between samples",
    "before the table",
    "before publishing",
    "between rename and fsync",
    "before the seal",
    "while sealing",
)


def run(root: Path, point: str) -> int:
    code = WRITER.format(
        tests=str(Path(__file__).parents[1]), root=str(root), point=point, shards=SHARDS, second=synthetic.sha("b.tar")
    )
    return subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode


def tree(root: Path) -> dict[str, bytes]:
    files = (p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): p.read_bytes() for p in files if p.name != "manifest.jsonl"}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_writer_leaves_whole_fragments_and_the_next_run_the_bytes_of_one_never_killed(tmp_path, point):
    spec = synthetic.spec()
    assert run(tmp_path / "calm", "") == 0
    assert run(tmp_path / "s", point) == -signal.SIGKILL
    partial = open_store(tmp_path / "s", allow_partial=True)
    exact = {s.key: s for i, name in enumerate(SHARDS) for s in synthetic.zoo(spec, i, name)}
    for key in partial:
        synthetic.assert_equal(partial[key], exact[key])
    assert len(partial) >= 6  # the first fragment was published before each of the points
    assert run(tmp_path / "s", "") == 0
    create_store(tmp_path / "s", spec).seal([])
    found = {path: data for path, data in tree(tmp_path / "s").items() if not Path(path).name.startswith(".manifest")}
    assert found == tree(tmp_path / "calm")
    assert open_store(tmp_path / "s").info.content_sha256 == open_store(tmp_path / "calm").info.content_sha256
