"""Writes docs/cli.md from the commands' own help: `python docs/make_cli.py` (a test says when it is stale)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from compodistill.tools.cli import cli

TARGET = Path(__file__).with_name("cli.md")
WIDTH = 100
HEAD = """\
# The command line

Written from the commands' own `--help` by `docs/make_cli.py`; edit the help texts, not this file.

Exit codes: 0 done, 2 the user's mistake (a wrong path, option, recipe key), 3 damaged data or a damaged store,
1 our own fault, 130 interrupted. Errors are one message on stderr with what is wrong, where, and the remedy.
Quotes around globs and brace ranges are accepted (`'DIR/*.tar'`, `'DIR/{000..099}.tar'`).
"""


def render() -> str:
    """The whole page."""
    return HEAD + "".join(_section(context) for context in contexts(cli, "cdist"))


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """The command and all below it, each with a context that knows its full name."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH,
        **({"help_option_names": ["-h", "--help"]} if parent is None else {}),
    )  # fmt: skip
    yield context
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from contexts(found, child, context)


def _section(context: click.Context) -> str:
    level = "#" * (2 + context.command_path.count(" "))
    text = "\n".join(line.rstrip() for line in context.get_help().splitlines())
    return f"\n{level} {context.command_path}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(render())
