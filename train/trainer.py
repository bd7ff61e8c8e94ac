"""transformers' Trainer with the distillation step in it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from compodistill.errors import CdistError
from compodistill.train.join import to_targets
from compodistill.train.recipes import Stage
from compodistill.train.step import Matching, step_losses


class NonFiniteLossError(CdistError):
    """A loss term is NaN or infinite."""


class DistilTrainer(Trainer):
    """Trains one stage; logs every loss term beside the total.

    Args:
        stage: the recipe's stage.
        matching: student layers and their targets.
    """

    def __init__(self, *, stage: Stage, matching: Matching, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._stage, self._matching = stage, matching
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.model_accepts_loss_kwargs = False  # our losses are means over the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        student = self.accelerator.unwrap_model(model)
        terms = step_losses(
            model, student, inputs["inputs"], to_targets(inputs, student.device), self._stage, self._matching
        )
        for name, term in terms.items():
            self._terms[name].append(term.detach())
        return terms["total"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = {name: float(torch.stack(values).mean()) for name, values in self._terms.items()}
            self._terms.clear()
            bad = [name for name, value in means.items() if value != value or value in (float("inf"), float("-inf"))]
            if bad:
                raise NonFiniteLossError(
                    f"the loss is not finite: {', '.join(f'{n} = {means[n]}' for n in bad)}",
                    where=f"step {self.state.global_step}",
                    remedy="lower learning_rate or the weight of that loss; bf16 needs a smaller rate than float32",
                )
            logs = {**logs, **{name: value for name, value in means.items() if name != "total"}}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate assumes one flat batch of ids
