"""`cdist precompute`: run the teacher once over the shards and write its signals to a store."""

from __future__ import annotations

from pathlib import Path

import click

from compodistill.store.spec import Codec, Rows


@click.command()
@click.option(
    "--shards", required=True, multiple=True, help="WebDataset shards; globs and {000..099} ranges may be quoted."
)
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="Model directory of the teacher.")
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
@click.option("--max-length", type=click.IntRange(2), help="Refuse samples with more tokens.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The teacher's numeric type.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
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
) -> None:
    """Run the teacher once over SHARDS and write its signals to a sealed store.

    Running the same command again goes on where it stopped: finished shards are recognised by their content.
    """
    from compodistill.shards import expand_shards, index_shard
    from compodistill.tools.progress import progress

    if per_layer and student_layers is not None:
        raise click.UsageError("--per-layer and --student-layers exclude each other")
    paths = expand_shards(list(shards))
    counts = {path: len(index_shard(path).entries) for path in paths}

    from compodistill.precompute.run import PassOptions, precompute
    from compodistill.store.reader import open_store

    options = PassOptions(
        student_layers, attention_rows, top_k, codec, batch_size, max_length, dtype=dtype, device=device
    )
    with progress("precompute", sum(counts.values()), "samples") as meter:
        precompute(
            paths,
            teacher,
            store,
            options,
            on_sample=lambda shard, tokens: meter.advance(1, tokens, shard.name),
            on_finished=lambda shard: meter.advance(counts[shard], note=f"{shard.name} was finished"),
        )
    info = open_store(store).info
    size = info.n_bytes / info.n_samples
    click.echo(f"{store}: sealed, {info.n_samples} samples in {len(paths)} fragments, {size:,.0f} bytes a sample")
