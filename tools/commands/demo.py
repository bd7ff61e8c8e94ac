"""`cdist demo`: the whole story on the bundled tiny world."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo-out", show_default=True, help="A new folder.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the world and of the students.")
@click.option("--scenes", type=click.IntRange(16), default=1000, show_default=True, help="Training scenes.")
@click.option("--steps", type=click.IntRange(3), default=None, help="Training steps in all stages together.")
def command(out: Path, seed: int, scenes: int, steps: int | None) -> None:
    """Distil a tiny teacher into three students and compare them: minutes on two cores, no GPU, no download.

    Leaves the world, the shards, the store, the students and report.html in OUT. Every step is an ordinary
    cdist command, printed as you would type it.
    """
    from compodistill.errors import UsageError
    from compodistill.tools.demo.run import Plan, run_demo
    from compodistill.tools.demo.show import print_table, write_report

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # lines appear as they come, piped too
    if out.exists():
        raise UsageError(f"{out} exists already", remedy="remove it, or choose another --out")
    start = time.monotonic()
    plan = Plan(scenes=scenes, seed=seed)
    if steps is not None:
        total = sum(plan.steps.values())
        plan = Plan(scenes=scenes, seed=seed, steps={s: max(1, n * steps // total) for s, n in plan.steps.items()})
    out.mkdir(parents=True)
    result = run_demo(out, plan)
    minutes = (time.monotonic() - start) / 60
    print_table(result, minutes)
    write_report(out / "report.html", out, result, minutes)
    click.echo(f"the same with pictures: {out / 'report.html'}")
