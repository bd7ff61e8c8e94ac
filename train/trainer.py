"""transformers' Trainer with the distillation step in it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import distributed, nn
from torch.utils.data import DataLoader

from compodistill.errors import CdistError
from compodistill.train.checkpoints import CheckpointedTrainer
from compodistill.train.join import BatchReader, to_targets
from compodistill.train.order import WINDOW, MicroBatches
from compodistill.train.recipes import Stage
from compodistill.train.step import Matching, step_losses


class NonFiniteLossError(CdistError):
    """A loss term is NaN or infinite."""


class DistilTrainer(CheckpointedTrainer):
    """Trains one stage; logs every loss term beside the total.

    Every loss is a mean over the whole batch of an optimizer step: over all its supervised tokens, or all its samples
    with visual tokens, whatever the number of ranks and pieces it is computed in.

    Args:
        stage: the recipe's stage.
        matching: student layers and their targets.
        reader: the samples.
        shuffle_window: see `epoch_order`.
    """

    loss_is_scaled_for_ga = True  # the Trainer does not divide by the number of pieces once more

    def __init__(
        self, *, stage: Stage, matching: Matching, reader: BatchReader, shuffle_window: int = WINDOW, **kwargs: Any
    ) -> None:
        super().__init__(train_dataset=reader, data_collator=_as_it_is, **kwargs)
        self._stage, self._matching, self._window = stage, matching, shuffle_window
        self.model_accepts_loss_kwargs = True
        self._until_backward = ExitStack()
        self._waited, self._since = 0.0, time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        """The loader of this rank's micro batches; accelerate, which would divide them once more, is not asked."""
        args = self.args
        reader: BatchReader = self.train_dataset
        batches = MicroBatches(
            reader.dataset.sizes,
            seed=args.seed,
            batch_size=self._stage.batch_size,
            accumulate=self._stage.accumulate,
            rank=args.process_index,
            ranks=args.world_size,
            window=self._window,
            epoch=lambda: self.state.global_step // batches.steps,
        )
        workers = args.dataloader_num_workers
        return DataLoader(
            reader,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,  # store readers do not survive a fork
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: iterating must not touch the state dropout draws from
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The pieces of this rank for one step, each with the counts of the whole batch."""
        began = time.perf_counter()
        pieces = [piece for _, piece in zip(range(num_batches), epoch_iterator, strict=False)]
        self._waited += time.perf_counter() - began
        errors = [p for p in pieces if isinstance(p, CdistError)]
        counts = torch.zeros(3, dtype=torch.int64)
        for piece in pieces:
            if not isinstance(piece, CdistError):
                counts += torch.tensor([len(piece["labels_A"]), sum(len(v) > 0 for v in piece.get("columns", [])), 0])
        counts[2] = len(errors)
        n_positions, n_samples, n_errors = self._sum(counts.double()).long().tolist()
        if n_errors:
            raise gather_object(errors)[0]  # the same one on all ranks
        counted = [{**piece, "counts": (n_positions, n_samples)} for piece in pieces]
        self._add("steps", 1.0)
        self._add("steps with attention", float(n_samples > 0))
        return counted, torch.tensor(n_positions, device=device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward; the attention tap stays open until both are done."""
        with self._until_backward:
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The piece's part of the loss, times the number of ranks: gradients are averaged over them."""
        student = self.accelerator.unwrap_model(model)
        n_positions, n_samples = inputs["counts"]
        terms = step_losses(
            model,
            student,
            inputs["inputs"],
            to_targets(inputs, student.device),
            self._stage,
            self._matching,
            n_positions=n_positions,
            n_samples=n_samples,
            until_backward=self._until_backward,
        )
        for name, term in terms.items():
            self._add(name, term.detach())
        return terms["total"] * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means since the last line over steps and ranks; `loss` is their weighted sum."""
        if "loss" in logs:
            means = self._means()
            self._terms = defaultdict(list)
            elapsed = time.perf_counter() - self._since
            means["data_wait_fraction"] = self._waited / max(elapsed, 1e-9)
            self._waited, self._since = 0.0, time.perf_counter()
            logs = {**logs, "loss": means.pop("total"), **means}
        super().log(logs, start_time)

    def _add(self, name: str, value: float | torch.Tensor) -> None:
        self._terms[name].append(value)

    def _means(self) -> dict[str, float]:
        """Mean of every term over the steps since the last log line.

        Raises:
            NonFiniteLossError: one of them is not a number.
        """
        names = ["steps", "steps with attention", "total", *_weighted(self._stage)]
        lists = self._take_terms()
        sums = self._sum(torch.tensor([math.fsum(lists.get(name, [])) for name in names], dtype=torch.float64))
        found = dict(zip(names, sums.tolist(), strict=True))
        steps, with_attention = (found.pop(n) / self.args.world_size for n in ("steps", "steps with attention"))
        if not with_attention:
            found.pop("attention", None)
        means = {n: total / (with_attention if n == "attention" else max(steps, 1)) for n, total in found.items()}
        if bad := [name for name, value in means.items() if not math.isfinite(value)]:
            raise NonFiniteLossError(
                f"the loss is not finite: {', '.join(f'{n} = {means[n]}' for n in bad)}",
                where=f"step {self.state.global_step}",
                remedy="lower learning_rate or the weight of that loss; bf16 needs a smaller rate than float32",
            )
        if "attention" in means:
            means["attention_similarity"] = 1 - means["attention"]
        return means

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, on the CPU."""
        if not distributed.is_initialized():
            return values
        return self.accelerator.reduce(values.to(self.args.device), "sum").cpu()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate assumes one flat batch of ids


def _weighted(stage: Stage) -> list[str]:
    return [name for name, weight in stage.losses.model_dump().items() if isinstance(weight, float) and weight > 0]


def _as_it_is(batch: Any) -> Any:
    return batch
