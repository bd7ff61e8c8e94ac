"""Checkpoints a killed run goes on from: complete or not there, small, and nothing in them is unpickled freely.

A checkpoint holds the trainable weights and buffers (`trained.safetensors`; the frozen rest follows from store and
language model), the log's unfinished line (`unlogged.json`), and transformers' own `optimizer.pt`, `scheduler.pt`,
`rng_state*.pth` and `trainer_state.json`. The .pt and .pth files are read by `torch.load(weights_only=True)`, which
builds tensors and plain containers and calls nothing a file names.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from compodistill.errors import MismatchError, StoreError

WEIGHTS = "trained.safetensors"
UNLOGGED = "unlogged.json"
STATE = "trainer_state.json"


def last_checkpoint(work: Path) -> Path | None:
    """The checkpoint of the latest step in a stage's working directory; None where there is none."""
    found = [p for p in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The number of optimizer steps a checkpoint stands for."""
    return int(checkpoint.name.rpartition("-")[2])


class CheckpointedTrainer(Trainer):
    """Saves checkpoints under another name, then renames them; keeps the last one.

    Terms of the log line in the making are in `_terms`: lists of values by name, a value each micro batch.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._saving = False
        self._terms: dict[str, list[float | torch.Tensor]] = defaultdict(list)

    def _take_terms(self) -> dict[str, list[float]]:
        return {name: [float(v) for v in values] for name, values in self._terms.items()}

    def _means(self) -> dict[str, float]:
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        work = super()._get_output_dir(trial)
        return str(Path(work) / ".saving") if self._saving else work

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            return  # the stage's result is about to be written
        self._means()  # raises where a loss is no number: such weights must not replace good ones
        work, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        before = [p for p in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name != name]
        if self.args.should_save:
            shutil.rmtree(work / ".saving", ignore_errors=True)
        _barrier()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        terms = self._all_terms()
        _barrier()
        if self.args.should_save:
            (work / ".saving" / name / UNLOGGED).write_text(json.dumps(terms))
            shutil.rmtree(work / name, ignore_errors=True)
            (work / ".saving" / name).rename(work / name)
            for old in before:
                shutil.rmtree(old, ignore_errors=True)
        _barrier()

    def _all_terms(self) -> list[dict[str, list[float]]]:
        terms = self._take_terms()
        if not distributed.is_initialized():
            return [terms]
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, terms)
        return everyone

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save or output_dir is None:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            tensors = trained(self.model)
        else:
            tensors = {name: state_dict[name] for name in trained(self.model) if name in state_dict}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        with _reading(path):
            stored = load_file(path)
            unlogged = json.loads(path.with_name(UNLOGGED).read_text())
        ours = trained(model or self.model)
        if wrong := sorted(set(ours) ^ set(stored)) or [n for n in ours if ours[n].shape != stored[n].shape]:
            raise MismatchError(
                f"the checkpoint was made for another student: {', '.join(wrong[:3])}",
                where=str(path),
                remedy="resume with the recipe, store and language model the run was begun with",
            )
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(stored[name])
        # divided anew: sums over ranks are what counts
        rank, ranks = self.args.process_index, self.args.world_size
        self._terms = defaultdict(list)
        for terms in unlogged[rank::ranks]:
            for name, values in terms.items():
                self._terms[name] += values
        for name in ("steps", "steps with attention"):  # every rank counts the same steps
            self._terms[name] = list(unlogged[0].get(name, []))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(Path(checkpoint or "") / "optimizer.pt, scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(Path(checkpoint or "") / "rng_state"):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Whatever a damaged or hostile file does to its reader is one error that names the checkpoint."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as e:
        raise StoreError(
            f"the checkpoint cannot be read: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}",
            where=str(checkpoint),
            remedy="remove it to train the stage from its beginning",
        ) from e


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters that learn (tied ones once) and persistent buffers, by name."""
    persistent = model.state_dict(keep_vars=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {**parameters, **{n: b for n, b in model.named_buffers() if n in persistent}}


def _barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()
