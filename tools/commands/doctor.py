"""`cdist doctor`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from compodistill.errors import UsageError
from compodistill.tools.console import print_json, print_table


@click.command()
@click.option(
    "--store", help="Folder for the write test, for instance where stores shall lie; default: the temporary folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.pass_context
def command(ctx: click.Context, store: str | None, as_json: bool) -> None:
    """Show versions, devices, attention kernels with log-sum-exp, and what a write test finds.

    Ends with exit code 2 if something that cdist needs is missing.
    """
    from compodistill.tools.doctor.report import doctor_report, problems

    if store and "://" in store:
        raise UsageError("the write test covers local folders only", where=f"--store {store}")
    report = doctor_report(Path(store or tempfile.gettempdir()))
    found = problems(report)
    if as_json:
        print_json({**report, "problems": found})
    else:
        _show(report)
        click.echo("\n".join(f"problem: {line}" for line in found) or "nothing is missing")
    ctx.exit(2 if found else 0)


def _show(report: dict[str, Any]) -> None:
    packages = {**report["packages"], **{f"{n} (optional)": v for n, v in report["optional_packages"].items()}}
    versions = {"cdist": report["cdist"], "python": report["python"], "platform": report["platform"], **packages}
    devices = {name.replace("_", " "): ", ".join(v) or "none" if isinstance(v, list) else v
               for name, v in report["devices"].items()}  # fmt: skip
    _pairs("versions", {name: version or "not installed" for name, version in versions.items()})
    _pairs("devices", devices)
    _pairs("attention kernels with log-sum-exp", report["attention_kernels"])
    _pairs("write test", report["folder"])


def _pairs(title: str, values: dict[str, Any]) -> None:
    print_table([[name, str(value)] for name, value in values.items()], title=title)
