import json
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from compodistill.store import create_store
from compodistill.store import manifest as manifests

MEASURE = """
import json, sys, time
sys.path.insert(0, sys.argv[3])
from memory import peak_kib
import compodistill.store.reader as reader
before = peak_kib()
start = time.process_time()
store = reader.open_store(sys.argv[1], allow_partial=sys.argv[2] == "partial")
seconds = time.process_time() - start
after = peak_kib()
print(json.dumps([len(store._manifest.entries), seconds, (after - before) / 1024]))
"""


@pytest.mark.slow
def test_a_store_of_100_000_fragments_opens_in_2_seconds_and_200_megabytes(tmp_path):
    n = 100_000
    spec = synthetic.spec()
    create_store(tmp_path / "s", spec).seal([])
    path = tmp_path / "s" / "manifest.jsonl"
    manifest = manifests.load(path.read_bytes(), "")
    for i in range(n):
        digest = synthetic.sha(str(i))
        name = f"train-{i:06d}.tar"
        manifest.entries[digest] = manifests.Entry(digest, name, 1000, 10**9 + i, 5000 + i % 100, digest)
        (tmp_path / "s" / "fragments" / digest).mkdir()
    path.write_bytes(manifest.dump())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "s"), "sealed", str(Path(__file__).parents[1])]
    found, seconds, mebibytes = json.loads(subprocess.check_output(command))
    assert found == n
    assert seconds < 2
    assert 1 < mebibytes < 200  # less than one would mean that nothing was measured
