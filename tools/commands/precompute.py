"""`cdist precompute`: run the teacher once over the shards and write its signals to a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compodistill.store.spec import Codec, Rows

FILE = click.Path(path_type=Path)


@click.command()
@click.option(
    "--shards", required=True, multiple=True, help="WebDataset shards; globs and {000..099} ranges may be quoted."
)
@click.option("--teacher", required=True, type=FILE, help="Model directory of the teacher.")
@click.option("--store", required=True, help="Where the store is written.")
@click.option(
    "--student-layers",
    type=click.IntRange(1),
    help="Group the attention for a student of this many decoder layers (small).",
)
@click.option("--per-layer", is_flag=True, help="Keep every understanding layer, for students of any depth (default).")
@click.option(
    "--attention-rows",
    type=click.Choice(["all", "visual", "text", "answer"]),
    default="all",
    show_default=True,
    help="Which queries' attention is kept.",
)
@click.option(
    "--top-k", type=click.IntRange(1), default=64, show_default=True, help="Logits kept for each supervised token."
)
@click.option(
    "--codec",
    type=click.Choice(["lossless", "fine", "compact"]),
    default="compact",
    show_default=True,
    help="How exactly the signals are stored.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Samples a forward pass on a GPU; on the CPU it is one.",
)
@click.option("--max-length", type=click.IntRange(2), help="Samples with more tokens cannot be used (see --on-error).")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The teacher's numeric type.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Worker processes on this machine. Default: one a GPU with --device cuda, else this process alone.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="CPU threads of each worker's forward pass; part of the fingerprint, as it changes last bits. "
    "Use more cores by more --workers.",
)
@click.option("--scheduler", default="", help="A running Dask scheduler, tcp://HOST:PORT or tls://HOST:PORT.")
@click.option("--tls-ca", default="", help="PEM file: certificate authority of a tls:// scheduler.")
@click.option("--tls-cert", default="", help="PEM file: this client's certificate.")
@click.option("--tls-key", default="", help="PEM file: its key.")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="A sample that cannot be used ends the pass, or is left out and listed in the store.",
)
@click.option("--dry-run", is_flag=True, help="Print what it would take in time and bytes; writes nothing.")
@click.option(
    "--estimate-from",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Samples --dry-run runs the teacher on; 0 only counts.",
)
@click.option("--log-json", type=FILE, help="Append progress and each shard's receipt to this file, one JSON a line.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def command(
    shards: tuple[str, ...],
    teacher: Path,
    store: str,
    student_layers: int | None,
    per_layer: bool,
    attention_rows: Rows,
    top_k: int,
    codec: Codec,
    batch_size: int,
    max_length: int | None,
    dtype: str,
    device: str,
    workers: int | None,
    threads: int,
    scheduler: str,
    tls_ca: str,
    tls_cert: str,
    tls_key: str,
    on_error: Any,
    dry_run: bool,
    estimate_from: int,
    log_json: Path | None,
    as_json: bool,
) -> None:
    """Run the teacher once over SHARDS and write its signals to a sealed store.

    Running the same command again goes on where it stopped: finished shards are recognised by their content. More
    shards extend a store.
    """
    from compodistill.errors import UsageError
    from compodistill.shards import expand_shards

    if per_layer and student_layers is not None:
        raise click.UsageError("--per-layer and --student-layers exclude each other")
    if scheduler and workers is not None:
        raise click.UsageError("--scheduler and --workers exclude each other: the scheduler has its own workers")
    paths = expand_shards(list(shards))
    if not teacher.is_dir() and not scheduler:
        raise UsageError(f"no model directory at {teacher}", remedy="give the path of a Hugging Face model directory")

    from compodistill.precompute.options import ClusterOptions, PassOptions
    from compodistill.tools import passes

    options = PassOptions(
        *(student_layers, attention_rows, top_k, codec, batch_size, max_length),
        dtype=dtype,
        device=device,
        threads=threads,
        on_error=on_error,
    )
    if workers is None:
        workers = 0 if device == "cuda" and not dry_run and not scheduler else 1
    cluster = ClusterOptions(workers, scheduler, tls_ca, tls_cert, tls_key)
    if dry_run:
        passes.estimate(paths, teacher, store, options, workers, estimate_from, as_json)
    else:
        passes.run(paths, teacher, store, options, cluster, log_json, as_json)
