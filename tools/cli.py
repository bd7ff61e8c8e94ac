"""The command `cdist`: a table of commands, each imported only when it is called.

`cdist --help` reads the table and nothing else, so it neither imports torch nor waits for it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from compodistill import __version__
from compodistill.errors import CdistError

# Our own progress and messages are what a user reads; transformers' bars for each loaded file are noise between them.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# name -> (module below compodistill.tools.commands whose `command` it is, line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "Show versions, devices, attention kernels and a write test."),
    "demo": ("demo", "The whole story on a bundled tiny world, with a report."),
    "shards": ("shards", "Build and check input shards."),
    "precompute": ("precompute", "Run the teacher once over shards and write its signals to a store."),
    "store": ("store", "Look at, verify, compare, join, copy and describe stores."),
    "train": ("train", "Distil a student from a store, shards and a small language model."),
    "evaluate": ("evaluate", "Score a model on files of questions."),
    "export": ("export", "Write a student in the form other tools load."),
}


class LazyGroup(click.Group):
    """A click group that knows its commands' names and help lines without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"compodistill.tools.commands.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CdistError as error:
            show_error(error)
            ctx.exit(error.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # `cdist ... | head` is no fault; click ends quietly
            raise
        except Exception as error:
            show_fault(error)
            ctx.exit(1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cdist")
def cli() -> None:
    """Distil a vision-language teacher into a small student without the teacher in memory.

    Start with `cdist demo`; COMMAND --help explains each command.
    """


def show_error(error: CdistError) -> None:
    """One readable message on stderr: styled on a terminal, plain elsewhere."""
    if not sys.stderr.isatty():
        click.echo(f"error: {error}", err=True)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), (error.what, "bold"))
    for name, value in (("where", error.where), ("remedy", error.remedy)):
        if value:
            text.append(f"\n  {name}: ", "dim").append(value)
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def show_fault(error: Exception) -> None:
    """An exception nobody foresaw: the traceback for us, and one line that does not blame the user."""
    click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    click.echo(
        f"error: unexpected {type(error).__name__}: {error}\n"
        "  this is a fault in cdist, not yours: please report it with the lines above and `cdist doctor --json`",
        err=True,
    )


def main() -> NoReturn:
    """Entry point of the console script."""
    cli(prog_name="cdist")
    raise AssertionError("click exits by itself")


if __name__ == "__main__":
    main()
