"""`cdist shards build` and `cdist shards check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compodistill.errors import UsageError
from compodistill.shards import expand_shards
from compodistill.tools.console import human_bytes, print_json, print_table


@click.group()
def command() -> None:
    """Build and check input shards (WebDataset tars of images and conversations)."""


@command.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--images", type=click.Path(path_type=Path), help="Folder that the records' image paths start from.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the shards to; new or empty."
)
@click.option(
    "--samples-per-shard",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Start a new shard after N samples.",
)
@click.option(
    "--max-bytes", type=click.IntRange(1), help="Start a new shard before its content passes this many bytes."
)
@click.option("--prefix", default="shard", show_default=True, help="Shards are called PREFIX-000000.tar, ...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def build(
    source: Path,
    images: Path | None,
    out: Path,
    samples_per_shard: int,
    max_bytes: int | None,
    prefix: str,
    as_json: bool,
) -> None:
    """Turn SOURCE, a LLaVA-style JSON list, and a folder of images into shards.

    Each record is {"id", "image", "conversations"}; `image` is a path, a list of paths, or absent. Equal input gives
    equal bytes on every machine. A fault leaves nothing behind.
    """
    from compodistill.tools.progress import progress
    from compodistill.tools.shards.build import build_shards
    from compodistill.tools.shards.source import read_llava, safe_key

    if safe_key(prefix) != prefix or not prefix:
        raise UsageError("a prefix has letters, digits, `_` and `-` only", where=f"--prefix {prefix}")
    records = read_llava(source, images)
    with progress("writing", len(records), "samples") as meter:
        report = build_shards(
            records, out, samples_per_shard=samples_per_shard, max_bytes=max_bytes, prefix=prefix, advance=meter.advance
        )
    facts = {"out": str(out), "shards": len(report.shards), "samples": report.samples, "images": report.images,
             "text_only": report.text_only, "bytes": report.bytes}  # fmt: skip
    _show(facts, as_json)


@command.command()
@click.argument("patterns", nargs=-1, required=True, metavar="SHARDS...")
@click.option("--all", "find_all", is_flag=True, help="List all faults instead of ending at the first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def check(ctx: click.Context, patterns: tuple[str, ...], find_all: bool, as_json: bool) -> None:
    """Read every sample and every image of SHARDS: paths, quoted globs ('DIR/*.tar'), braces ('DIR/{000..099}.tar').

    Ends with exit code 3 and the shard and key of the first fault.
    """
    from compodistill.tools.progress import progress
    from compodistill.tools.shards.check import check_shards

    paths = expand_shards(patterns)
    with progress("checking", len(paths), "shards") as meter:
        report = check_shards(paths, find_all=find_all, advance=meter.advance)
    if report.faults and not find_all and not as_json:
        raise report.faults[0]
    facts = {"shards": report.shards, "samples": report.samples, "images": report.images, "text_only": report.text_only,
             "bytes": report.bytes, "keys_in_several_shards": report.keys_in_several_shards}  # fmt: skip
    if as_json:
        faults = [{"what": e.what, "where": e.where, "remedy": e.remedy} for e in report.faults]
        print_json({**facts, "faults": faults})
    else:
        _show(facts, as_json=False)
        for error in report.faults:
            click.echo(f"fault: {error}", err=True)
    if report.faults:
        click.echo(f"{len(report.faults)} fault{'s' * (len(report.faults) > 1)}", err=True)
        ctx.exit(report.faults[0].exit_code if len(report.faults) == 1 else 3)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    shown = {name: value for name, value in facts.items() if name != "keys_in_several_shards" or value}
    print_table([[name.replace("_", " "), human_bytes(v) if name == "bytes" else f"{v:,}" if isinstance(v, int) else v]
                 for name, v in shown.items()])  # fmt: skip
