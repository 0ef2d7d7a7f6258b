"""Unsloth: JSON lines of conversations, and a training script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .base import (
    ACCUMULATE,
    BATCH,
    EPOCHS,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_RANK,
    BaseModel,
    Exporter,
    Files,
    Rows,
    labelled,
    to_json_lines,
)

_SCRIPT = Path(__file__).parent / "templates" / "train_unsloth.py.jinja"


def _write(rows: Rows, base: BaseModel, length: int) -> Files:
    data: list[dict[str, Any]]
    if rows.samples is not None:
        data = [labelled(row) | {"source_index": i} for row, i in zip(rows.samples, rows.index, strict=True)]
    else:
        data = [
            {"conversations": row.messages} | ({"tools": row.tools} if row.tools else {}) | {"source_index": i}
            for row, i in zip(rows.conversations, rows.index, strict=True)
        ]
    constants = [
        ("MODEL", base.name, ""),
        ("REVISION", base.revision, "None: the newest commit"),
        ("TEMPLATE", base.template, "None: the model's own chat template, or ChatML if it has none"),
        ("MAX_LENGTH", length, "tokens of a row; longer rows are cut"),
        ("LOAD_IN_4BIT", True, "False: 16-bit weights, which take four times the memory"),
        ("LORA_R", LORA_RANK, "a higher rank can learn more"),
        ("LORA_ALPHA", LORA_ALPHA, ""),
        ("BATCH", BATCH, ""),
        ("ACCUMULATE", ACCUMULATE, "a step has batch x accumulation rows"),
        ("LEARNING_RATE", LEARNING_RATE, ""),
        ("EPOCHS", EPOCHS, ""),
    ]
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    script = environment.from_string(_SCRIPT.read_text(encoding="utf-8"))
    literals = [(name, repr(value), comment) for name, value, comment in constants]
    return {
        "train.jsonl": to_json_lines(data),
        "train_unsloth.py": "\n" + script.render(constants=literals, tokens=rows.samples is not None),
    }


def _learnt(rows: Rows, base: BaseModel) -> str:
    if rows.samples is not None:
        return (
            "Only the answers are trained on. Unsloth finds answers by the text before them alone, which is not enough "
            "for all rows, so the rows are written as token ids, with labels -100 for all other tokens."
        )
    return (
        "The answers are trained on, and whatever follows them up to the next question, as Unsloth has it: with some "
        "chat templates also the results of tools."
    )


UNSLOTH = Exporter("unsloth", "train_unsloth.py", ("train.jsonl",), "python train_unsloth.py",
                   lambda base: base.tokenizer is not None, _learnt, _write)  # fmt: skip
