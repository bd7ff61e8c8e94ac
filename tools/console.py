"""What commands print on stdout: tables, sizes, JSON. (Progress is in tools/progress.py, on stderr.)"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON object on stdout and nothing else there."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[Any]], *, title: str = "", header: Sequence[str] = ()) -> None:
    """A table on stdout; numbers are set to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_header=bool(header))
    for i in range(len(rows[0]) if rows else len(header)):
        numeric = all(isinstance(row[i], (int, float)) for row in rows)
        table.add_column(header[i] if header else "", justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, (int, float)) else str(cell) for cell in row))
    Console(highlight=False, markup=False).print(table)


def human_bytes(count: int) -> str:
    """1536 -> '1.5 kB': decimal units, as disks and networks are sold."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError
