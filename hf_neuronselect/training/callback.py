"""Watches a training run: hyperparameters and losses for the adapter's card, and how far it is."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.progress import Progress

_SHOWN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "weight_decay", "max_length", "packing", "seed", "bf16",
)  # fmt: skip


class CardCallback(TrainerCallback):
    """Records a training run.

    Attributes:
        hyperparameters: as the trainer used them. losses: step and training loss. steps: done in all.
    """

    def __init__(self) -> None:
        self.hyperparameters: dict[str, Any] = {}
        self.losses: list[tuple[int, float]] = []
        self.steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shown = {name: getattr(args, name) for name in _SHOWN}
        if shown["max_steps"] <= 0:
            del shown["max_steps"]
        else:
            del shown["num_train_epochs"]
        shown["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        self.hyperparameters = shown

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After a resume, the history also holds the losses logged before it.
        self.losses = [(int(h["step"]), float(h["loss"])) for h in state.log_history if "loss" in h]
        self.steps = state.global_step


class StepCallback(TrainerCallback):
    """Counts the steps that are left of a training run.

    Args:
        progress: told of each step.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.total = state.max_steps - state.global_step  # some are done where it goes on

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.done(1)
