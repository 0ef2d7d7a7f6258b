"""Fills an adapter's card while it is trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub.cards import AdapterCard

_SHOWN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "weight_decay", "max_length", "packing", "seed", "bf16",
)  # fmt: skip


class CardCallback(TrainerCallback):
    """Hyperparameters, losses and results go into an :class:`~hf_neuronselect.hub.cards.AdapterCard`."""

    def __init__(self, card: AdapterCard) -> None:
        self.card = card

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shown = {name: getattr(args, name) for name in _SHOWN}
        if shown["max_steps"] <= 0:
            del shown["max_steps"]
        else:
            del shown["num_train_epochs"]
        shown["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        self.card.hyperparameters |= shown

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.card.losses.append((state.global_step, float(logs["loss"])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After a resume the history holds what was logged before it, too.
        self.card.losses = [(int(h["step"]), float(h["loss"])) for h in state.log_history if "loss" in h]
        self.card.results["steps"] = state.global_step
