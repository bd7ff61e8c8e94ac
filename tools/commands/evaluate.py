"""`cdist evaluate`: how well a model directory answers question files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from compodistill.errors import CdistError, UsageError

if TYPE_CHECKING:
    from compodistill.tools.evaluate import TaskResult


@click.command()
@click.option("--model", required=True, type=click.Path(), help="Directory of an image-text-to-text model.")
@click.option(
    "--task",
    "tasks",
    required=True,
    multiple=True,
    metavar="NAME=PATH",
    help="A JSON file of questions with options; give it again for more tasks.",
)
@click.option(
    "--out", type=click.Path(file_okay=False), help="Write every verdict (JSONL) and a summary per task here."
)
@click.option(
    "--batch-size", default=16, show_default=True, type=click.IntRange(min=1), help="Sequences in a batch."
)
@click.option(
    "--device", default=None, help="Where to run, such as cpu or cuda:0.  [default: a GPU if there is one]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    model: str, tasks: tuple[str, ...], out: str | None, batch_size: int, device: str | None, as_json: bool
) -> None:
    """Evaluate a model by the log-likelihood of each question's options.

    \b
    A task is a JSON list of {"id", "image", "question", "options", "answer", "kind"},
    image paths relative to the parent of the file's folder. The model's prediction
    is the option it finds most likely as the assistant's answer, after its own chat
    template. Accuracy is reported over all questions and for each kind.
    """
    import json

    from compodistill.tools.evaluate import evaluate, load_task

    named = parse_tasks(tasks)
    loaded = [load_task(path, name) for name, path in named.items()]  # before minutes go into a model
    vlm, processor = load_vlm(model, device)
    results = []
    for task in loaded:
        with progress_bar(task.name, len(task), quiet=as_json) as advance:
            results.append(evaluate(vlm, processor, task, batch_size, progress=advance))
    if out is not None:
        for result in results:
            result.write(out)
    if as_json:
        summaries = {r.name: r.summary() for r in results}
        click.echo(json.dumps({"model": str(model), "tasks": summaries}, ensure_ascii=False))
    else:
        show(str(model), results)


def parse_tasks(tasks: tuple[str, ...]) -> dict[str, Path]:
    """`NAME=PATH` options as a dict, refusing what would overwrite another task's files."""
    named: dict[str, Path] = {}
    for text in tasks:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UsageError(
                f'"{text}" is not NAME=PATH',
                where="--task",
                remedy="for instance --task pope=tasks/pope.json",
            )
        if not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise UsageError(
                f'"{name}" cannot name a task', where="--task", remedy="letters, digits, - and _"
            )
        if name in named:
            raise UsageError(
                f'two tasks are named "{name}"', where="--task", remedy="give them different names"
            )
        named[name] = Path(path)
    return named


def load_vlm(model: str, device: str | None = None) -> tuple:
    """(model, processor) of a directory, refusing weights that do not fit its configuration."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = Path(model)
    if not (path / "config.json").is_file():
        raise UsageError(
            "there is no model here (no config.json)",
            where=model,
            remedy="give a Hugging Face model directory",
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = AutoProcessor.from_pretrained(path)
        vlm, info = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", output_loading_info=True)
    except CdistError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = str(error).strip().splitlines()[0][:300]
        raise UsageError(
            f"not a usable image-text-to-text model: {message}",
            where=model,
            remedy="it must load with AutoModelForImageTextToText and AutoProcessor",
        ) from error
    wrong = {
        k: sorted(map(str, info[k]))
        for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(k)
    }
    if wrong:
        listed = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:5])}" for k, v in wrong.items())
        raise UsageError(
            f"the weights do not fit the configuration ({listed})",
            where=model,
            remedy="save model and configuration together with save_pretrained",
        )
    if not hasattr(processor, "tokenizer"):
        raise UsageError(
            "the model's processor has no tokenizer", where=model, remedy="save the whole processor beside it"
        )
    return vlm.to(device).eval(), processor


class progress_bar:
    """A bar on a terminal's stderr; silent elsewhere, so that --json and pipes stay clean."""

    def __init__(self, name: str, total: int, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self):
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def show(model: str, results: list[TaskResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Accuracy of {model}", title_justify="left")
    table.add_column("task")
    table.add_column("kind")
    for heading in ("questions", "accuracy %", "± s.e."):
        table.add_column(heading, justify="right")
    for result in results:
        summary = result.summary()
        rows = {"all": summary, **(summary["kinds"] if len(summary["kinds"]) > 1 else {})}
        for i, (kind, line) in enumerate(rows.items()):
            table.add_row(
                result.name if i == 0 else "",
                kind,
                str(line["n"]),
                f"{100 * line['accuracy']:.1f}",
                f"{100 * line['stderr']:.1f}",
                style="bold" if i == 0 else "",
                end_section=i == len(rows) - 1,
            )
    Console().print(table)
