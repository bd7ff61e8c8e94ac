"""`cdist evaluate` reports what the scorer found and refuses mistakes before it loads anything."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from compodistill.errors import UsageError
from compodistill.tools.commands.evaluate import command, parse_tasks
from compodistill.tools.demo import TEACHER
from compodistill.tools.demo.world import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    write_world(out, 0, 8, seed=77)
    return out


def test_a_table_and_json_give_the_same_accuracies_and_files_are_written(world, tmp_path):
    arguments = ["--model", str(TEACHER), "--task", f"comp={world}/eval/composition.json", "--out", str(tmp_path)]
    table = CliRunner().invoke(command, arguments, catch_exceptions=False)
    printed = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    summary = json.loads(printed.stdout)["tasks"]["comp"]
    assert summary["n"] == 40
    assert f"{100 * summary['accuracy']:.1f}" in table.stdout
    assert "swap_attribute" in table.stdout
    assert len((tmp_path / "comp.jsonl").read_text().splitlines()) == 40


def test_a_wrong_task_is_refused_before_the_model_is_looked_for(world):
    with pytest.raises(UsageError, match="no such question file"):
        CliRunner().invoke(command, ["--model", "nowhere", "--task", "a=none.json"], catch_exceptions=False)


def test_a_model_that_is_not_there_is_the_users_mistake(world):
    arguments = ["--model", "nowhere", "--task", f"a={world}/eval/composition.json"]
    with pytest.raises(UsageError, match="nowhere"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


@pytest.mark.parametrize("tasks", [("path.json",), ("=path",), ("a=",), ("../a=x",), ("a=x", "a=y")])
def test_names_that_cannot_be_files_or_repeat_are_refused(tasks):
    with pytest.raises(UsageError):
        parse_tasks(tasks)


def test_the_command_is_described_without_torch():
    code = (
        "import sys; from compodistill.tools.commands.evaluate import command; "
        "command(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
