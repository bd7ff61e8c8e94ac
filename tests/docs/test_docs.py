"""What the documents say about commands, options, targets and files is true."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

import compodistill
from compodistill.tools.cli import cli

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
SHELL = {"sh", "bash", "console", "shell"}


@pytest.fixture(scope="module")
def make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", REPOSITORY / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str, languages: set[str]) -> Iterator[str]:
    for language, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def shell_lines(text: str) -> Iterator[list[str]]:
    """Words of each shell line, continuations joined; and of each inline `cdist ...` or `make ...`."""
    for body in blocks(text, SHELL):
        for line in body.replace("\\\n", " ").splitlines():
            yield shlex.split(line.strip().removeprefix("$ "), comments=True)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for inline in re.findall(r"`((?:cdist|make) [^`\n]+)`", prose):
        yield shlex.split(inline)


def mistakes(words: list[str]) -> Iterator[str]:
    """What a `cdist` line names that the command line does not have."""
    command: click.Command = cli
    options: set[str] = set()
    rest = words[1:]
    with click.Context(cli, help_option_names=["-h", "--help"]) as context:
        while isinstance(command, click.Group) and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
            found = command.get_command(context, rest[0])
            if found is None:
                yield f"no command {rest[0]}"
                return
            command, rest = found, rest[1:]
        for parameter in command.get_params(context):
            options.update(parameter.opts + parameter.secondary_opts)
    for word in rest:
        flag = word.strip("[]").split("=")[0]
        if flag.startswith("-") and flag not in options:
            yield f"no option {flag}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_command_and_option_a_document_names_exists(document: Path) -> None:
    wrong = [
        f"{shlex.join(words)}: {mistake}"
        for words in shell_lines(document.read_text())
        if words[:1] == ["cdist"]
        for mistake in mistakes(words)
    ]
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_make_target_a_document_names_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        word
        for words in shell_lines(document.read_text())
        if words[:1] == ["make"]
        for word in words[1:]
        if "=" not in word
    }
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"(?:\]\(|src=\"|href=\")([^)\"#\s]+)", prose)
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_python_in_documents_parses_and_names_what_the_package_has(document: Path) -> None:
    for body in blocks(document.read_text(), {"python"}):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cd":
                assert hasattr(compodistill, node.attr), f"cd.{node.attr}"


def test_the_command_line_page_is_current(make_cli: ModuleType) -> None:
    assert make_cli.TARGET.read_text() == make_cli.render(), "run: python docs/make_cli.py"


def test_every_command_and_every_option_is_explained(make_cli: ModuleType) -> None:
    unexplained = []
    for context in make_cli.contexts(cli, "cdist"):
        if not context.command.help:
            unexplained.append(context.command_path)
        unexplained += [
            f"{context.command_path} {option.opts[0]}"
            for option in context.command.get_params(context)
            if isinstance(option, click.Option) and not option.help
        ]
    assert not unexplained


def test_the_check_of_documents_finds_a_wrong_command_and_a_wrong_option() -> None:
    assert list(mistakes(shlex.split("cdist shards chek x.tar"))) == ["no command chek"]
    assert list(mistakes(shlex.split("cdist shards check --al x.tar"))) == ["no option --al"]
    assert list(mistakes(shlex.split("cdist shards check --all 'x/{0..9}.tar'"))) == []


def test_the_readme_shows_the_way_to_begin() -> None:
    named = {tuple(words[:2]) for words in shell_lines((REPOSITORY / "README.md").read_text())}
    assert {("make", "demo"), ("cdist", "precompute"), ("cdist", "train"), ("cdist", "evaluate")} <= named
