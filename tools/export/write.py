"""The exported directory: plain where a plain class has the shapes, else with its small modelling file."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from string import Template

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from compodistill.errors import CdistError
from compodistill.models import PROJECTORS, refuse_incomplete
from compodistill.tools.export.fold import Folded, custom_type
from compodistill.train.student_classes import family_of

MODELLING = "modeling_cdist"


def write(folded: Folded, out: Path) -> None:
    """Save the folded model into a directory."""
    model = folded.model
    if folded.middle is None:
        model.save_pretrained(out)
        return
    # under a model type of its own the directory is read without the renamings old checkpoints of the family need
    model.save_pretrained(out, save_original_format=False)
    family, model_type = family_of(model.config), custom_type(model.config.model_type)
    assert family.first is not None
    template = Template((files("compodistill.tools.export") / f"{MODELLING}.template").read_text())
    code = template.substitute(
        base=family.base,
        model_type=model_type,
        middle=folded.middle,
        projector=PROJECTORS[model.config.model_type],
        first=family.first,
        last=family.last,
    )
    (out / f"{MODELLING}.py").write_text(code)
    name = f"{family.base}WideProjector"
    config = json.loads((out / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "projector_width": folded.middle,
        "architectures": [f"{name}ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{MODELLING}.{name}Config",
            "AutoModelForImageTextToText": f"{MODELLING}.{name}ForConditionalGeneration",
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_exported(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load what `write` wrote, as other tools would; the only code it runs is the modelling file written there."""
    own_code = (directory / f"{MODELLING}.py").is_file()
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype, output_loading_info=True, trust_remote_code=own_code, local_files_only=True
    )
    refuse_incomplete(info, directory)
    return model.eval()


@torch.no_grad()
def difference(student: PreTrainedModel, exported: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of their logits at unpadded positions.

    Raises:
        CdistError: the models do not compute the same.
    """
    ours, theirs = (m(**inputs, use_cache=False).logits.float() for m in (student, exported))
    kept = inputs["attention_mask"].bool()
    off, largest = float((ours - theirs)[kept].abs().max()), float(ours[kept].abs().max())
    tolerance = (1e-4 if student.dtype == torch.float32 else 3e-2) * max(1.0, largest)
    if not off <= tolerance:
        raise CdistError(
            f"the exported model's logits differ from the student's by {off:.3g} (largest logit {largest:.3g}, "
            f"allowed {tolerance:.3g}): nothing was exported",
            remedy="this is a fault in cdist: please report it with the student's config.json",
        )
    return off
