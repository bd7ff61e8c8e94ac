"""The arrows between the rooms hold, and the check that says so can fail."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compodistill

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
ROOMS = ("store", "precompute", "train", "tools")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The package as it is installed, wherever its folders stand now."""
    root = tmp_path / "compodistill"
    for name, target in [("compodistill", root)] + [(f"compodistill.{room}", root / room) for room in ROOMS]:
        (folder,) = importlib.import_module(name).__path__
        for path in Path(folder).rglob("*.py"):
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return root


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", code, str(PYPROJECT)],
        cwd=tree.parent,
        env={**os.environ, "PYTHONPATH": str(tree.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_rooms_import_each_other_in_one_direction_only(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("train/join.py", "import compodistill.precompute.run"),
        ("train/brand_new.py", "def f():\n    from compodistill.precompute import run"),
        ("precompute/brand_new.py", "import compodistill.train"),
        ("store/brand_new.py", "from compodistill import train"),
        ("store/brand_new.py", "import compodistill.tools.cli"),
        ("brand_new.py", "import compodistill.store"),
        ("shards.py", "from compodistill.tools import progress"),
    ],
)
def test_an_import_against_the_arrows_is_found(tree: Path, module: str, line: str) -> None:
    with (tree / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout


def test_the_package_is_one_and_knows_its_version() -> None:
    from importlib.metadata import version

    assert version("compodistill") == compodistill.__version__


def test_torch_is_not_imported_with_the_package() -> None:
    code = "import sys, compodistill, compodistill.errors, compodistill.samples; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
