"""`cdist store`: look at stores, check, compare, join, copy and describe them. URLs: paths, s3://, gs://, az://, ..."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compodistill.tools.console import human_bytes, print_json, print_table

partial = click.option("--allow-partial", is_flag=True, help="Accept a store that is unsealed or lacks fragments.")
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def command() -> None:
    """Look at, verify, compare, join, copy and describe stores.

    STORE is a path or URL: s3://, gs://, az:// are read and written; https:// and hf:// are read.
    """


@command.command()
@click.argument("store")
@partial
@as_json_option
def info(store: str, allow_partial: bool, as_json: bool) -> None:
    """Show what STORE holds: teacher, fingerprint, counts, bytes, fidelity."""
    from compodistill.store.reader import open_store

    facts = _facts(open_store(store, allow_partial=allow_partial))
    if as_json:
        print_json(facts)
        return
    fingerprint = facts.pop("fingerprint")
    rows = [[name.replace("_", " "), _shown(name, value)] for name, value in facts.items()]
    print_table(rows + [[f"fingerprint {name}", digest[:16]] for name, digest in fingerprint.items()])


@command.command()
@click.argument("store")
@click.option("--quick", is_flag=True, help="Metadata and sample tables; of other objects presence and size only.")
@partial
@as_json_option
@click.pass_context
def verify(ctx: click.Context, store: str, quick: bool, allow_partial: bool, as_json: bool) -> None:
    """Read every object of STORE and compare it with the manifest. Exit code 3 if one differs."""
    from compodistill.store import sharing
    from compodistill.store.reader import open_store

    opened = open_store(store, allow_partial=allow_partial)
    with _meter("verifying", opened.info.n_bytes) as advance:
        wrong = sharing.verify(opened, quick=quick, on_object=advance)
    if as_json:
        print_json({"store": store, "quick": quick, "bytes": opened.info.n_bytes, "damaged": wrong})
    else:
        for line in wrong:
            click.echo(f"damaged: {line}", err=True)
        read = "present" if quick else "whole"
        click.echo(
            f"{len(wrong)} objects are damaged" if wrong else f"all {opened.info.n_fragments} fragments are {read}"
        )
    if wrong:
        ctx.exit(3)


@command.command()
@click.argument("a")
@click.argument("b")
@partial
@as_json_option
def diff(a: str, b: str, allow_partial: bool, as_json: bool) -> None:
    """Say in which fields stores A and B differ, what each difference means for a student, and which shards differ."""
    from compodistill.store import sharing
    from compodistill.store.reader import open_store

    first, second = (open_store(s, allow_partial=allow_partial) for s in (a, b))
    fields, shards = sharing.diff(first, second)
    if as_json:
        print_json({"fields": [asdict(d) for d in fields], "shards": shards})
        return
    if fields:
        rows = [[d.field, str(d.a)[:16], str(d.b)[:16], d.meaning] for d in fields]
        print_table(rows, header=["field", "A", "B", "for a student"])
    for line in shards:
        click.echo(line)
    if not fields and not shards:
        click.echo("the stores hold the same signals of the same shards")


@command.command()
@click.argument("stores", nargs=-1, required=True)
@click.option("--out", required=True, help="The store the others are joined into; made or extended.")
def merge(stores: tuple[str, ...], out: str) -> None:
    """Join the fragments of STORES, which must be of one fingerprint, into one store."""
    from compodistill.store import sharing
    from compodistill.store.reader import open_store

    opened = [open_store(s) for s in stores]
    with _meter("joining", sum(s.info.n_bytes for s in opened)) as advance:
        n = sharing.merge(opened, out, on_object=advance)
    click.echo(f"{out}: {n} fragments, sealed")


@command.command()
@click.argument("store")
@click.argument("target")
@click.option("--only", multiple=True, help="Copy only shards of this name; may be a pattern, may be repeated.")
def push(store: str, target: str, only: tuple[str, ...]) -> None:
    """Copy the local STORE to TARGET: what is missing there, each object verified. A broken copy goes on."""
    _copy(store, target, only)


@command.command()
@click.argument("store")
@click.argument("target")
@click.option("--only", multiple=True, help="Copy only shards of this name; may be a pattern, may be repeated.")
def pull(store: str, target: str, only: tuple[str, ...]) -> None:
    """Copy the remote STORE to the local TARGET: what is missing there, each object verified."""
    _copy(store, target, only)


@command.command()
@click.argument("store")
@click.option("--out", type=click.Path(path_type=Path), help="Where the README is written; stdout if left out.")
@click.option("--data", default="", help="One line on the shards: name, source, licence.")
def card(store: str, out: Path | None, data: str) -> None:
    """Write a README for STORE, ready for a hub."""
    from compodistill.store.card import card as render
    from compodistill.store.reader import open_store

    text = render(open_store(store), data)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text)
        click.echo(f"wrote {out}")


def _copy(store: str, target: str, only: tuple[str, ...]) -> None:
    from compodistill.store import sharing
    from compodistill.store.reader import open_store

    source = open_store(store)
    with _meter("copying", source.info.n_bytes) as advance:
        n = sharing.copy(source, target, only=only, on_object=advance)
    click.echo(f"{target}: {n} fragments, sealed and verified")


class _meter:
    """Progress by bytes, as the callback the store's functions take."""

    def __init__(self, what: str, total: int) -> None:
        from compodistill.tools.progress import progress

        self._progress = progress(what, max(1, total // 1000), "kB")

    def __enter__(self) -> Callable[[str, int], None]:
        meter = self._progress.__enter__()
        return lambda path, size: meter.advance(size // 1000)

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)


def _facts(store: Any) -> dict[str, Any]:
    info, spec = store.info, store.info.spec
    logits = f"{spec.draws} draws" if spec.draws else f"top {spec.top_k}"
    return {
        "teacher": spec.teacher.name,
        "revision": spec.teacher.revision,
        "licence": spec.teacher.licence,
        "sealed": info.sealed,
        "content_sha256": info.content_sha256,
        "samples": info.n_samples,
        "fragments": info.n_fragments,
        "bytes": info.n_bytes,
        "bytes_per_sample": info.n_bytes // max(1, info.n_samples),
        "codec": spec.codec,
        "rows": spec.rows,
        "groups": [list(g) for g in spec.groups],
        "per_layer": spec.per_layer,
        "logits": logits,
        "vocab_size": spec.vocab_size,
        "fidelity": store.fidelity,
        "provenance": info.provenance,
        "fingerprint": spec.fingerprint,
    }


def _shown(name: str, value: Any) -> str:
    if name.startswith("bytes"):
        return human_bytes(value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value) or "not given"
