"""The stages of a recipe, one after the other: store + shards + language model -> student.

    OUT/dpt, OUT/dft, OUT/sft      finished stages, ordinary model directories; each appears by one rename
    OUT/.STAGE.partial             a stage in the making: its checkpoints, and what the run was begun with

Under torchrun every rank runs all of this; what touches files is rank 0's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from compodistill.errors import UsageError
from compodistill.models import load_model, load_processor, pad_token_id
from compodistill.store.reader import Store
from compodistill.train.card import model_card
from compodistill.train.checkpoints import checkpoint_step, last_checkpoint
from compodistill.train.identity import check_identity, run_identity
from compodistill.train.join import BatchReader, Collator, JoinedDataset
from compodistill.train.lora import merge_lora
from compodistill.train.order import MicroBatches
from compodistill.train.recipes import STAGES, Recipe, StageName
from compodistill.train.step import match
from compodistill.train.student import Student, freeze_all_but
from compodistill.train.survey import OnMissing, Remembered, Survey, survey
from compodistill.train.trainer import DistilTrainer

LOG_FILE = "training_log.json"
RUN_FILE = "run.json"
SHARDS_FILE = "shards.json"
MISSING_FILE = "missing_keys.txt"


def train(
    store: Store,
    shards: Sequence[Path],
    llm: Path,
    out: Path,
    recipe: Recipe,
    *,
    stages: Sequence[StageName] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    on_missing: OnMissing = "error",
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run stages of a recipe; each leaves an ordinary model directory in `out/STAGE`.

    Args:
        llm: the student's language model directory.
        stages: which ones, in the paper's order; all of the recipe's where None. A stage goes on from the one before
            it in the recipe, found in `out`.
        resume: leave finished stages alone and go on from an unfinished one's last checkpoint, at the exact sample.
        on_missing: what to do about samples the store has no signals for.
        say: called with what the user should know at once, a line each.

    Returns:
        The directory of the last stage.

    Raises:
        UsageError: a stage the recipe does not have, an earlier stage's result missing, or a result already there.
        MismatchError: store, shards and student do not belong together, or to the run that is resumed.
    """
    planned = [s for s in STAGES if s in recipe.stages]
    wanted = list(stages) if stages is not None else planned
    if unknown := [s for s in wanted if s not in planned]:
        raise UsageError(
            f"recipe {recipe.name} has no stage {unknown[0]!r}", remedy=f"its stages: {', '.join(planned)}"
        )
    _refuse_sharding()
    if not resume:
        _refuse_leftovers(out, wanted)
    trackers = _trackers(recipe)
    finished = [s for s in wanted if (out / s).exists()]
    left = wanted[len(finished) :]
    before = planned[: planned.index(left[0])] if left else []
    if before and not (out / before[-1] / "config.json").is_file():
        raise UsageError(f"stage {left[0]} goes on from {before[-1]}, which is not in {out}")
    ranks = PartialState(cpu=not torch.accelerator.is_available())
    for name in left:  # the batches of every stage can be cut up, before any is trained
        stage = recipe.stages[name]
        MicroBatches([], seed=0, batch_size=stage.batch_size, accumulate=stage.accumulate, ranks=ranks.num_processes)
    remembered = Remembered(_work(out, left[0]) / SHARDS_FILE if left else None)
    found = survey(store, shards, on_missing=on_missing, remembered=remembered)
    if found.missing:
        keys = ", ".join(f"{path.name}: {key}" for path, key in found.missing[:10])
        more = f" and {len(found.missing) - 10} more, see {MISSING_FILE}" if len(found.missing) > 10 else ""
        say(f"{len(found.missing)} samples without signals are left out ({found.samples} remain): {keys}{more}")
    for name in finished:
        was = json.loads((out / name / LOG_FILE).read_text())
        check_identity(was.get("run", {}), run_identity(store, found, llm, recipe, name), out / name)
        if ranks.is_main_process:
            shutil.rmtree(_work(out, name), ignore_errors=True)
        say(f"stage {name} is finished: {out / name}")
    if not left:
        return out / wanted[-1]
    if before:
        loaded = load_model(out / before[-1])
        student, processor = loaded.model, loaded.processor
    else:
        student = Student.from_store(store, llm, adapter=recipe.adapter, seed=recipe.seed)
        processor = load_processor(store.teacher_dir())
    dataset = JoinedDataset(store, found, processor, student.config.image_token_id, recipe.max_length)
    for name in left:
        run = _Run(store, found, recipe, name, out, run_identity(store, found, llm, recipe, name), ranks, trackers)
        if checkpoint := last_checkpoint(run.work):
            say(f"stage {name} goes on after step {checkpoint_step(checkpoint)}")
        _train_stage(run, student, processor, dataset, callbacks)
    return out / wanted[-1]


@dataclass(frozen=True)
class _Run:
    """One stage of one run, and which rank this is."""

    store: Store
    found: Survey
    recipe: Recipe
    name: StageName
    out: Path
    identity: dict[str, Any]
    ranks: PartialState
    trackers: list[str]

    @property
    def work(self) -> Path:
        return _work(self.out, self.name)


def _work(out: Path, stage: StageName) -> Path:
    return out / f".{stage}.partial"


def _refuse_leftovers(out: Path, wanted: Sequence[StageName]) -> None:
    for stage in wanted:
        if (out / stage).exists():
            raise UsageError(
                f"{out / stage} exists already",
                remedy="go on with the stages after it (--resume), choose another --out, or remove it",
            )
        if checkpoint := last_checkpoint(_work(out, stage)):
            raise UsageError(
                f"stage {stage} was interrupted after step {checkpoint_step(checkpoint)}",
                where=str(checkpoint),
                remedy="--resume goes on from there; to begin anew, choose another --out or remove it",
            )


def _refuse_sharding() -> None:
    """Say no to what `accelerate launch` was asked for and the losses cannot do."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise UsageError(
                f"cdist train does not run under {name}: the losses read the LM head's weight outside its forward, "
                "where a sharded model does not hold it",
                where=f"ACCELERATE_USE_{name}",
                remedy="use torchrun (DDP), with activation_checkpointing and accumulate where memory is short",
            )


def _trackers(recipe: Recipe) -> list[str]:
    if recipe.report_to is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    for name in recipe.report_to:
        if not find_spec(name):
            raise UsageError(
                f"{name} is not installed", where="recipe, report_to", remedy=f"pip install {name}, or leave it out"
            )
    return list(recipe.report_to)


def _arguments(run: _Run) -> TrainingArguments:
    recipe, stage = run.recipe, run.recipe.stages[run.name]
    return TrainingArguments(
        output_dir=str(run.work),
        run_name=f"{recipe.name} {run.name}",
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps,
        per_device_train_batch_size=stage.batch_size // (stage.accumulate * run.ranks.num_processes),
        gradient_accumulation_steps=stage.accumulate,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_ratio,
        lr_scheduler_type=stage.scheduler,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # it would hide what we refuse
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 1,
        report_to=run.trackers or "none",
        ddp_find_unused_parameters=False,  # the step gives every trainable parameter a gradient
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def _train_stage(
    run: _Run,
    student: PreTrainedModel,
    processor: Any,
    dataset: JoinedDataset,
    callbacks: Sequence[TrainerCallback],
) -> None:
    recipe, name, spec = run.recipe, run.name, run.store.info.spec
    matching = match(len(student.get_decoder().layers), spec.groups, spec.per_layer)
    freeze_all_but(student, list(recipe.stages[name].train), recipe.lora.model_dump() if recipe.lora else None)
    with _working_directory(run) as checkpoint:
        trainer = DistilTrainer(
            model=student,
            args=_arguments(run),
            reader=BatchReader(dataset, Collator(pad_token_id(processor), recipe.signals(name))),
            stage=recipe.stages[name],
            matching=matching,
            shuffle_window=recipe.shuffle_window,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        with _checkpointed_activations(student, recipe.activation_checkpointing):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)  # its forward is its own again
        merge_lora(student)
        if run.ranks.is_main_process:
            _publish(run, student, processor, trainer.state.log_history)
        run.ranks.wait_for_everyone()


@contextmanager
def _working_directory(run: _Run) -> Iterator[Path | None]:
    """The stage's directory for checkpoints; gives the one to go on from, and leaves nothing that is of no use."""
    work = run.work
    checkpoint = last_checkpoint(work)
    if checkpoint is not None:
        check_identity(json.loads((work / RUN_FILE).read_text()), run.identity, checkpoint)
    run.ranks.wait_for_everyone()  # all have looked
    if run.ranks.is_main_process:
        if checkpoint is None:
            shutil.rmtree(work, ignore_errors=True)  # what a run left that was killed before its first checkpoint
        work.mkdir(parents=True, exist_ok=True)
        (work / RUN_FILE).write_text(json.dumps(run.identity, indent=1))
        Remembered(work / SHARDS_FILE).save(run.found.shards)
    run.ranks.wait_for_everyone()
    try:
        yield checkpoint
    finally:
        if run.ranks.is_main_process and ((run.out / run.name).exists() or last_checkpoint(work) is None):
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _checkpointed_activations(student: PreTrainedModel, on: bool) -> Iterator[None]:
    if on:
        student.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            student.activation_checkpointing_disable()


def _publish(run: _Run, student: PreTrainedModel, processor: Any, log: list[dict[str, Any]]) -> None:
    """Write the stage's model directory under another name, sync it, and rename it."""
    new = run.out / f".{run.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    student.save_pretrained(new)
    processor.save_pretrained(new)
    history = [h for h in log if "loss" in h]
    summary = {"recipe": run.recipe.model_dump(), "stage": run.name, "history": history, "run": run.identity}
    summary["teacher"] = run.store.info.spec.teacher.model_dump()
    (new / LOG_FILE).write_text(json.dumps(summary, indent=1))
    last = history[-1] if history else {}
    (new / "README.md").write_text(model_card(run.store.info, run.recipe, run.name, run.identity, last))
    if run.found.missing:
        lines = [f"{path.name}\t{key}\n" for path, key in run.found.missing]
        (new / MISSING_FILE).write_text("".join(lines))
    if (run.work / "runs").is_dir():  # tensorboard's
        shutil.copytree(run.work / "runs", new / "runs")
    for file in new.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())
    new.rename(run.out / run.name)
