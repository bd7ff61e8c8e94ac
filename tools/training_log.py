"""The trainer's log as readable lines on stderr."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = ("loss", "lm", "kl", "attention", "learning_rate")


class TrainingLog(TrainerCallback):
    """One line a logging step: stage, step of how many, each loss term."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        terms = "  ".join(f"{name} {logs[name]:.4g}" for name in SHOWN if name in logs)
        print(f"{args.run_name} {state.global_step}/{state.max_steps}  {terms}", file=sys.stderr, flush=True)
