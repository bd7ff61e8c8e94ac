"""`cdist train`: a student from a store, shards and a small language model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click


@click.command()
@click.option("--store", required=True, help="The sealed store with the teacher's signals.")
@click.option(
    "--shards", required=True, multiple=True, help="The shards the store was made of; globs and ranges may be quoted."
)
@click.option(
    "--student",
    required=True,
    type=click.Path(path_type=Path),
    help="Language model directory; with a config.json only, it starts at random.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the stages' model directories go.")
@click.option("--recipe", default="compodistill", show_default=True, help="A recipe's name or YAML file.")
@click.option(
    "--stage",
    type=click.Choice(["dpt", "dft", "sft", "all"]),
    default="all",
    show_default=True,
    help="Which stage; one after the first goes on from the stage before it in OUT.",
)
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file laid over the recipe.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="One value laid over the recipe.")
@click.option("--allow-partial", is_flag=True, help="Train on the fragments that are there, without a seal.")
@click.option("--resume", is_flag=True, help="Go on where a run was interrupted; finished stages are left alone.")
@click.option(
    "--on-missing",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What to do about samples without signals; those left out are counted and listed.",
)
def command(
    store: str,
    shards: tuple[str, ...],
    student: Path,
    out: Path,
    recipe: str,
    stage: Literal["dpt", "dft", "sft", "all"],
    config: Path | None,
    overrides: tuple[str, ...],
    allow_partial: bool,
    resume: bool,
    on_missing: Literal["error", "skip"],
) -> None:
    """Distil a student; the teacher's checkpoint is not needed, all that is used of it is in the STORE.

    Each stage leaves an ordinary Hugging Face model directory: OUT/dpt, OUT/dft, OUT/sft. Runs on several
    devices under torchrun: torchrun --nproc-per-node 8 $(which cdist) train ...
    """
    from compodistill.shards import expand_shards

    paths = expand_shards(list(shards))

    from compodistill.store.reader import open_store
    from compodistill.tools.training_log import TrainingLog
    from compodistill.train.recipes import load_recipe
    from compodistill.train.run import train

    chosen = load_recipe(recipe, config, list(overrides))
    opened = open_store(store, allow_partial=allow_partial)
    stages = None if stage == "all" else [stage]
    first = os.environ.get("RANK", "0") == "0"
    last = train(
        opened,
        paths,
        student,
        out,
        chosen,
        stages=stages,
        callbacks=[TrainingLog()],
        resume=resume,
        on_missing=on_missing,
        say=lambda line: click.echo(line, err=True) if first else None,
    )
    if first:
        click.echo(f"{last}: {chosen.name}, ready for from_pretrained")
