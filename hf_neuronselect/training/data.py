"""Rows as SFTTrainer takes them: token ids, with the answers marked in TRL's own column."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import SFTConfig

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.sources import Source
from ..models.checkpoint import config_of, limits_of
from ..rows.answers import AnswerEncoder, left_out
from ..rows.encode import Limits
from ..rows.formats import Conversation
from .config import TrainConfig
from .models import load_tokenizer

_CHUNK = 1000  # rows that are tokenised at once


def tokenizer_for(base: Source, config: TrainConfig, token: str | bool | None = None) -> Any:
    """The base's tokenizer with the chat template and the end of text that ``config`` gives it."""
    tokenizer = load_tokenizer(base, token)
    tokenizer.chat_template = config.chat_template() or tokenizer.chat_template
    end = config.sft.get("eos_token")
    if end is not None:
        if end not in tokenizer.get_vocab():  # an older SFTTrainer would take the unknown token for it
            raise NeuronSelectError("is not in the tokenizer's vocabulary", option="eos_token", value=end)
        tokenizer.eos_token = end
    return tokenizer


def clip_length(arguments: SFTConfig, limits: Limits) -> None:
    """Let no row be longer than the model has positions; TRL would feed it longer ones."""
    if limits.positions is not None and (arguments.max_length or sys.maxsize) > limits.positions:
        arguments.max_length = limits.positions


def encoder_of(tokenizer: Any, arguments: SFTConfig, limits: Limits | None = None) -> AnswerEncoder:
    """Tokenises rows as they are trained on.

    Args:
        arguments: as asked for, before :func:`clip_length`. limits: of the model.
    """
    # These ways of packing cut rows into pieces and keep all of them; else what is too long is cut off.
    keeps_all = arguments.packing and arguments.packing_strategy in ("wrapped", "bfd_split")
    limits = limits or Limits()
    return AnswerEncoder(
        tokenizer,
        max_length=None if keeps_all else arguments.max_length,
        truncation_side="left" if getattr(arguments, "truncation_mode", "") == "keep_end" else "right",
        limits=replace(limits, positions=None) if keeps_all else limits,
    )


def training_rows(conversations: Sequence[Conversation], encoder: AnswerEncoder) -> tuple[Dataset, int]:
    """Tokenise rows: ``input_ids``, and ``assistant_masks``, which is 1 for the tokens of answers.

    Rows that cannot be trained on are left out, with a warning that counts them by reason.

    Returns:
        The rows, and how many of them were cut.

    Raises:
        NeuronSelectError: no row is left.
    """
    samples = []
    for start in range(0, len(conversations), _CHUNK):
        samples += encoder.encode(conversations[start : start + _CHUNK])
    usable = [sample for sample in samples if not sample.skip]
    reasons = left_out(samples)
    if not usable:
        raise NeuronSelectError(f"none of the {len(samples)} rows can be trained on: {reasons}", option="data")
    if reasons:
        warnings.warn(
            f"{len(samples) - len(usable)} of {len(samples)} rows cannot be trained on and are left out: {reasons}; mend "
            "these rows, or leave it",
            NeuronSelectWarning, stacklevel=3,
        )  # fmt: skip
    rows = Dataset.from_dict(
        {
            "input_ids": [sample.input_ids.astype(np.int32) for sample in usable],
            "assistant_masks": [sample.pooled.astype(np.int8) for sample in usable],
        }
    )
    return rows, sum(sample.truncated for sample in usable)


def check_trainable(conversations: Sequence[Conversation], base: Source, config: TrainConfig) -> str:
    """Find out before a selection whether its rows can be trained on.

    Returns:
        Why some of these rows cannot, with their numbers; "" if all can.

    Raises:
        NeuronSelectError: none of them can.
    """
    limits = limits_of(config_of(base))
    encoder = encoder_of(tokenizer_for(base, config), config.arguments(Path("unused")), limits)
    samples = encoder.encode(conversations)
    reasons = left_out(samples)
    if samples and all(sample.skip for sample in samples):
        raise NeuronSelectError(f"cannot be trained on these rows: {reasons}", option="model", value=base.id)
    return reasons


def learnt(prepared: Dataset) -> tuple[Dataset, int, int]:
    """What SFTTrainer will train on: rows with a label, their tokens, and those learnt.

    Packing can cut an answer off its question: a row of questions alone has no loss, and is left out with a warning.

    Raises:
        NeuronSelectError: no token would be learnt.
    """
    name = "labels" if "labels" in prepared.column_names else "assistant_masks"
    none = -100 if name == "labels" else 0
    kept, tokens, answers = [], 0, 0
    position = 0
    for batch in prepared.select_columns([name]).with_format("numpy").iter(_CHUNK):
        for row in batch[name]:
            found = int((row[1:] != none).sum())  # the first token of a row is never predicted
            if found:
                kept.append(position)
                tokens, answers = tokens + len(row), answers + found
            position += 1
    if not answers:
        raise NeuronSelectError("no token would be trained on: max_length cuts all answers off", option="train")
    if len(kept) == position:
        return prepared, tokens, answers
    warnings.warn(
        f"{position - len(kept)} of {position} packed rows hold no token of an answer and are left out; "
        "set packing_strategy: bfd to keep rows whole",
        NeuronSelectWarning, stacklevel=3,
    )  # fmt: skip
    return prepared.select(kept), tokens, answers
