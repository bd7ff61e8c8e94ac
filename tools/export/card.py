"""The model card of an exported student: what it is, how it was made, how it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LOG_FILE = "training_log.json"  # what a training stage leaves beside its model


@dataclass(frozen=True)
class Verified:
    """Largest absolute differences of the exported model's logits from the student's."""

    image: float
    text: float


def model_card(student: Path, name: str, config: dict[str, Any], verified: Verified, own_code: bool) -> str:
    """The README.md, with what the training stage recorded where it did."""
    log = _log(student)
    recipe, teacher = log.get("recipe") or {}, log.get("teacher") or {}
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["distillation", "compodistill"],
    }
    if teacher.get("licence"):
        header["license"] = teacher["licence"]
    text = config["text_config"]
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=True)}---\n",
        f"# {name}\n",
        f"A vision-language model (`{config['architectures'][0]}`) distilled with cdist. Its language model is a "
        f"{text['model_type']} of {text['num_hidden_layers']} layers and width {text['hidden_size']}; its vision "
        "encoder is the teacher's.\n",
    ]
    if teacher:
        revision = f", revision {teacher['revision']}" if teacher.get("revision") else ""
        lines.append(
            f"Teacher: {teacher['name']} ({teacher.get('model_type', '')}, {teacher.get('layers', '?')} layers"
            f"{revision}).\n"
        )
    lines += _training(recipe, log.get("stage"))
    trust = ", trust_remote_code=True" if own_code else ""
    lines.append(
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        f'pipe = pipeline("image-text-to-text", model="PATH_OR_REPOSITORY"{trust})\n'
        'messages = [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, '
        '{"type": "text", "text": "What is this?"}]}]\n'
        'print(pipe(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])\n```\n'
    )
    if own_code:
        lines.append(
            "The projector's hidden layer has the teacher's width, which transformers' own class ties to the language "
            "model's. `modeling_cdist.py` in this directory changes that and nothing else.\n"
        )
    lines.append(
        f"Checked at export against the trained student: logits differ by at most {verified.image:.1e} on an image "
        f"and {verified.text:.1e} on text.\n"
    )
    return "\n".join(lines)


def _log(student: Path) -> dict[str, Any]:
    try:
        return json.loads((student / LOG_FILE).read_text())
    except (OSError, ValueError):  # a student from elsewhere, or one saved by hand
        return {}


def _training(recipe: dict[str, Any], last: str | None) -> list[str]:
    if not recipe:
        return []
    rows = [
        f"| {name} | {', '.join(s['train'])} | {_losses(s['losses'])} | {s['learning_rate']:g} | {s['batch_size']} |"
        for name, s in recipe["stages"].items()
    ]
    lora = recipe.get("lora")
    return [
        f"## Training\n\nRecipe `{recipe['name']}`, seed {recipe['seed']}, adapter `{recipe['adapter']}`"
        + (f", LoRA of rank {lora['rank']} (merged)" if lora else "")
        + (f"; this is the model after stage `{last}`." if last else ".")
        + "\n\n| stage | trained | losses | learning rate | batch |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    ]


def _losses(losses: dict[str, float]) -> str:
    return " + ".join(f"{weight:g} {name}" for name, weight in losses.items() if weight > 0)
