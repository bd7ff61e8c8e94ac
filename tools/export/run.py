"""From a student's directory to one that other tools load: fold, write, verify, publish."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

import compodistill.train.student  # noqa: F401  registers our students with transformers
from compodistill.errors import UsageError
from compodistill.models import load_config, load_model, pad_token_id
from compodistill.samples import Sample, Turn
from compodistill.tokens import collate, tokenize
from compodistill.tools.export.card import LOG_FILE, Verified, model_card
from compodistill.tools.export.fold import fold
from compodistill.tools.export.write import MODELLING, difference, load_exported, write
from compodistill.train.student_classes import FAMILIES, STUDENTS


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        architecture: the class in config.json.
        own_code: whether the directory has its modelling file and needs trust_remote_code.
        verified: the differences measured.
    """

    path: Path
    architecture: str
    own_code: bool
    verified: Verified


def export(student_dir: Path, out: Path) -> Exported:
    """Export a student; `out` appears whole and verified, or not at all.

    Raises:
        UsageError: no model of ours, or `out` is there already.
        CdistError: the exported model does not compute what the student computes.
    """
    if out.exists():
        raise UsageError(f"{out} exists already", remedy="choose another --out, or remove it")
    config = load_config(student_dir)
    if config.model_type not in STUDENTS and config.model_type not in FAMILIES:
        raise UsageError(
            f"{student_dir} is no student of ours: its model type is {config.model_type!r}",
            remedy=f"types that can be exported: {', '.join([*STUDENTS, *FAMILIES])}",
        )
    loaded = load_model(student_dir, dtype=_dtype(config.dtype))
    student, processor = loaded.model, loaded.processor
    image, text = probes(processor, student)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
    try:
        write(fold(student), partial)
        processor.save_pretrained(partial)
        exported = load_exported(partial, student.dtype)
        verified = Verified(difference(student, exported, image), difference(student, exported, text))
        written = json.loads((partial / "config.json").read_text())
        own_code = (partial / f"{MODELLING}.py").is_file()
        card = model_card(student_dir, out.name, written, verified, own_code)
        (partial / "README.md").write_text(card)
        if (student_dir / LOG_FILE).is_file():
            shutil.copyfile(student_dir / LOG_FILE, partial / LOG_FILE)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, written["architectures"][0], own_code, verified)


def probes(processor: Any, student: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs with an image and without, made by the model's own processor."""
    picture = Image.radial_gradient("L").convert("RGB")  # 256 x 256 and nowhere constant
    answer = Turn("assistant", ("A dark centre that brightens outwards.",))
    asked = Sample("image", (Turn("user", (None, "What is in the picture?")), answer), (picture,))
    said = Sample("text", (Turn("user", ("Say something about the weather.",)), answer), ())
    image, text = (
        collate([tokenize(processor, s, student.config.image_token_id)], pad_token_id(processor)) for s in (asked, said)
    )
    image["pixel_values"] = image["pixel_values"].to(student.dtype)
    return image, text


def push(directory: Path, repository: str) -> str:
    """Upload an exported directory to the Hugging Face hub; returns its address.

    Raises:
        UsageError: not logged in, no such name, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        address = api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=repository, commit_message="Export of a cdist student")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as e:
        raise UsageError(
            f"the hub does not take {repository}: {e}",
            remedy=f"log in with `hf auth login`, then upload it with `hf upload {repository} {directory}`",
        ) from e
    return str(address)


def _dtype(name: Any) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    return getattr(torch, name) if name else torch.float32
