"""`cdist export`: a trained student in the form other tools load."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="A student's directory, as `cdist train` leaves it (OUT/sft).",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The directory to make.")
@click.option("--push-to-hub", metavar="REPO", help="Upload the result to this repository of the Hugging Face hub.")
@click.option("--json", "as_json", is_flag=True, help="Report as one JSON object.")
def command(model: Path, out: Path, push_to_hub: str | None, as_json: bool) -> None:
    """Export a student so that transformers and what builds on it load it without cdist.

    The student adapter is folded into the teacher's projector and LoRA is merged. Where the family's own class has
    room for the shapes the result is a plain model; else its directory brings a small modelling file and is loaded
    with trust_remote_code=True. The exported model's logits are held against the student's, on an image and on text,
    before the directory appears.
    """
    from compodistill.tools.export.run import export, push

    done = export(model, out)
    address = push(out, push_to_hub) if push_to_hub else None
    if as_json:
        click.echo(json.dumps({**asdict(done), "path": str(done.path), "repository": address}))
        return
    form = "its modelling file, load with trust_remote_code=True" if done.own_code else "plain transformers"
    click.echo(
        f"{out}: {done.architecture}, {form}; logits differ by at most {done.verified.image:.1e} on an image, "
        f"{done.verified.text:.1e} on text"
    )
    if address:
        click.echo(f"uploaded to {address}")
