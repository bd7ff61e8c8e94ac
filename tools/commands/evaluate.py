"""`cdist evaluate`: how well a model directory answers question files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compodistill.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compodistill.tools.evaluate.results import TaskResult


@click.command()
@click.option(
    "--model", required=True, type=click.Path(path_type=Path), help="Directory of an image-text-to-text model."
)
@click.option(
    "--task",
    "tasks",
    required=True,
    multiple=True,
    metavar="NAME=PATH",
    help="A JSON file of questions with options; give it again for more tasks.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write every verdict (JSONL) and a summary per task here.",
)
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1), help="Sequences in a batch.")
@click.option("--device", default=None, help="Where to run, such as cpu or cuda:0.  [default: a GPU if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    model: Path, tasks: tuple[str, ...], out: Path | None, batch_size: int, device: str | None, as_json: bool
) -> None:
    """Evaluate a model by the log-likelihood of each question's options.

    \b
    A task is a JSON list of {"id", "image", "question", "options", "answer", "kind"},
    image paths relative to the parent of the file's folder. The model's prediction
    is the option it finds most likely as the assistant's answer, after its own chat
    template. Accuracy is reported over all questions and for each kind.
    """
    from compodistill.tools.console import print_json
    from compodistill.tools.evaluate.tasks import load_task
    from compodistill.tools.progress import progress

    loaded = [load_task(path, name) for name, path in parse_tasks(tasks).items()]  # before a model is loaded

    from compodistill.tools.evaluate.scoring import evaluate

    vlm, processor = load_vlm(model, device)
    results = []
    for task in loaded:
        with progress(f"evaluate {task.name}", len(task), "questions") as meter:
            results.append(evaluate(vlm, processor, task, batch_size, advance=meter.advance))
    if out is not None:
        for result in results:
            result.write(out)
    if as_json:
        print_json({"model": str(model), "tasks": {r.name: r.summary() for r in results}})
    else:
        show(model, results)


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
            raise UsageError(f'"{name}" cannot name a task', where="--task", remedy="letters, digits, - and _")
        if name in named:
            raise UsageError(f'two tasks are named "{name}"', where="--task", remedy="give them different names")
        named[name] = Path(path)
    return named


def load_vlm(path: Path, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """(model, processor) of a directory, in the dtype it was saved in.

    Raises:
        UsageError: it is not an image-text-to-text model, or its weights do not fit its configuration.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    import compodistill.train.student  # noqa: F401  registers the students' class with transformers
    from compodistill.models import load_config, load_processor, refuse_incomplete

    load_config(path)
    processor = load_processor(path)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype="auto", output_loading_info=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"it cannot be loaded as an image-text-to-text model: {str(error)[:500]}",
            where=str(path),
            remedy="give a directory that AutoModelForImageTextToText.from_pretrained loads",
        ) from error
    refuse_incomplete(info, path)
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # no such device: torch asserts where it was built without
        raise UsageError(f"the model cannot go to {device}: {str(error)[:200]}", where="--device") from error
    return model, processor


def show(model: Path, results: list[TaskResult]) -> None:
    """A table on stdout: each task, then its kinds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Accuracy of {model}", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("kind", overflow="fold")
    for heading in ("questions", "accuracy %", "± s.e."):
        table.add_column(heading, justify="right")
    for result in results:
        summary = result.summary()
        rows = {"all": summary, **(summary["kinds"] if len(summary["kinds"]) > 1 else {})}
        for i, (kind, line) in enumerate(rows.items()):
            table.add_row(
                result.name if i == 0 else "",
                kind,
                f"{line['n']:,}",
                f"{100 * line['accuracy']:.1f}",
                f"{100 * line['stderr']:.1f}",
                style="bold" if i == 0 else "",
                end_section=i == len(rows) - 1,
            )
    Console(highlight=False, markup=False).print(table)
