"""What makes a run this run: resuming with anything else is refused by name and both values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compodistill.errors import MismatchError, UsageError
from compodistill.store.reader import Store
from compodistill.train.recipes import Recipe, StageName
from compodistill.train.survey import Survey, shared

# how a run is computed and watched, not what it computes
_HOW = {"name", "stages", "workers", "log_every", "save_every", "activation_checkpointing", "report_to"}


def run_identity(store: Store, found: Survey, llm: Path, recipe: Recipe, stage: StageName) -> dict[str, Any]:
    """Flat: names of settings and data, with values or digests that must be equal for a run to go on."""
    settings = recipe.model_dump(exclude=_HOW)
    settings |= {f"stages.{stage}.{k}": v for k, v in recipe.stages[stage].model_dump().items() if k != "accumulate"}
    digests = [[s.digest, *s.missing] for s in found.shards]
    return {
        "store": store.info.content_sha256,
        "shards": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        "samples": found.samples,
        "missing": len(found.missing),
        "student": shared(_directory_digest, [llm])[0],
        **settings,
    }


def check_identity(was: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise MismatchError where two runs differ, naming the field and both values."""
    now = json.loads(json.dumps(now))
    if different := [name for name in now if was.get(name) != now[name]]:
        name = different[0]
        others = f" (and {', '.join(different[1:])})" if len(different) > 1 else ""
        raise MismatchError(
            f"this is not the run that was begun: {name} was {was.get(name)!r} and is {now[name]!r}{others}",
            where=str(where),
            remedy="resume with what the run was begun with, or choose another --out",
        )


def _directory_digest(path: Path) -> str:
    """sha256 over config.json and weights of a model directory."""
    if not path.is_dir():
        raise UsageError(f"no model directory at {path}", remedy="give the path of a Hugging Face model directory")
    digest = hashlib.sha256()
    for file in sorted([*path.glob("config.json"), *path.glob("*.safetensors")]):
        with file.open("rb") as f:
            digest.update(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
