"""The stages of a recipe, one after the other: store + shards + language model -> student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from compodistill.errors import UsageError
from compodistill.models import load_model, load_processor, pad_token_id
from compodistill.store.reader import Store
from compodistill.train.join import Collator, JoinedDataset
from compodistill.train.recipes import STAGES, Recipe, StageName
from compodistill.train.step import match
from compodistill.train.student import Student, freeze_all_but
from compodistill.train.trainer import DistilTrainer

LOG_FILE = "training_log.json"


def train(
    store: Store,
    shards: Sequence[Path],
    llm: Path,
    out: Path,
    recipe: Recipe,
    *,
    stages: Sequence[StageName] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run stages of a recipe; each leaves an ordinary model directory in `out/STAGE`.

    Args:
        llm: the student's language model directory.
        stages: which ones, in the paper's order; all of the recipe's where None. A stage goes on from the one before
            it in the recipe, found in `out`.

    Returns:
        The directory of the last stage.

    Raises:
        UsageError: a stage the recipe does not have, an earlier stage's result missing, or a result already there.
        MismatchError: store, shards and student do not belong together.
    """
    planned = [s for s in STAGES if s in recipe.stages]
    wanted = list(stages) if stages is not None else planned
    if unknown := [s for s in wanted if s not in planned]:
        raise UsageError(
            f"recipe {recipe.name} has no stage {unknown[0]!r}", remedy=f"its stages: {', '.join(planned)}"
        )
    for stage in wanted:
        if (out / stage).exists():
            raise UsageError(
                f"{out / stage} exists already",
                remedy="choose another --out, or remove it to train the stage again",
            )
    set_seed(recipe.seed)
    before = planned[: planned.index(wanted[0])]
    if before:
        if not (out / before[-1] / "config.json").is_file():
            raise UsageError(f"stage {wanted[0]} goes on from {before[-1]}, which is not in {out}")
        loaded = load_model(out / before[-1])
        student, processor = loaded.model, loaded.processor
    else:
        student = Student.from_store(store, llm, adapter=recipe.adapter, seed=recipe.seed)
        processor = load_processor(store.teacher_dir())
    dataset = JoinedDataset(store, shards, processor, student.config.image_token_id, recipe.max_length)
    for stage in wanted:
        _train_stage(student, processor, dataset, store, out, recipe, stage, callbacks)
    return out / wanted[-1]


def _train_stage(
    student: PreTrainedModel,
    processor: Any,
    dataset: JoinedDataset,
    store: Store,
    out: Path,
    recipe: Recipe,
    name: StageName,
    callbacks: Sequence[TrainerCallback],
) -> None:
    stage = recipe.stages[name]
    matching = match(len(student.get_decoder().layers), store.info.spec.groups, store.info.spec.per_layer)
    freeze_all_but(student, list(stage.train))
    out.mkdir(parents=True, exist_ok=True)
    work = out / f".{name}.partial"
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    try:
        arguments = TrainingArguments(
            output_dir=str(work),
            run_name=f"{recipe.name} {name}",
            num_train_epochs=stage.epochs,
            max_steps=stage.max_steps,
            per_device_train_batch_size=stage.batch_size,
            gradient_accumulation_steps=stage.accumulate,
            learning_rate=stage.learning_rate,
            warmup_steps=stage.warmup_ratio,
            lr_scheduler_type=stage.scheduler,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            seed=recipe.seed,
            bf16=recipe.bf16,
            logging_steps=recipe.log_every,
            save_strategy="no",
            report_to=recipe.report_to or "none",
            dataloader_num_workers=recipe.workers,
            dataloader_multiprocessing_context="spawn" if recipe.workers else None,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = DistilTrainer(
            model=student,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(pad_token_id(processor), recipe.signals(name)),
            stage=stage,
            matching=matching,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        student.save_pretrained(work)
        processor.save_pretrained(work)
        history = [h for h in trainer.state.log_history if "loss" in h]
        summary = {"recipe": recipe.model_dump(), "stage": name, "history": history}
        (work / LOG_FILE).write_text(json.dumps(summary, indent=1))
        work.rename(out / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
