"""The README a stage leaves beside its model: where it comes from, in words and in numbers."""

from __future__ import annotations

from typing import Any

import yaml

from compodistill.store.reader import StoreInfo
from compodistill.train.recipes import Recipe, StageName


def model_card(info: StoreInfo, recipe: Recipe, stage: StageName, run: dict[str, Any], last: dict[str, float]) -> str:
    """Markdown with a hub's front matter.

    Args:
        run: the run's identity, see `run_identity`.
        last: the last line of the log.
    """
    spec, teacher = info.spec, info.spec.teacher
    front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["cdist", "distillation"]}
    if teacher.licence:
        front["license"] = teacher.licence
    settings = yaml.safe_dump({"stages": {stage: recipe.stages[stage].model_dump()}, "seed": recipe.seed})
    rows = [
        ("recipe", f"{recipe.name}, stage {stage}, adapter {recipe.adapter}"),
        ("teacher", " ".join(filter(None, [teacher.name, teacher.revision]))),
        ("store", f"content sha256 `{info.content_sha256 or 'not sealed'}`, {info.n_samples} samples"),
        *((f"fingerprint: {name}", f"`{value}`") for name, value in spec.fingerprint.items()),
        ("trained on", f"{run['samples']} samples, {run['missing']} left out for want of signals"),
        ("signals", f"attention rows {spec.rows}, codec {spec.codec}, top-k {spec.top_k}"),
        *((f"last logged {name}", f"{value:.6g}") for name, value in last.items() if isinstance(value, float)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"---\n{yaml.safe_dump(front)}---\n\n# {recipe.name}, {stage}\n\nA student distilled by cdist from the stored "
        f"signals of its teacher.\n\n| | |\n|---|---|\n{table}\n\n```yaml\n{settings}```\n"
    )
