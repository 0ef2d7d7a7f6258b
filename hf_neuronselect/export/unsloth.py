"""Unsloth: JSON lines of conversations, and a training script."""

from __future__ import annotations

from pathlib import Path

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
    to_json_lines,
)

_SCRIPT = Path(__file__).parent / "templates" / "train_unsloth.py.jinja"


def _write(rows: Rows, base: BaseModel, length: int) -> Files:
    data = [
        {"conversations": row.messages} | ({"tools": row.tools} if row.tools else {}) | {"source_index": index}
        for row, index in zip(rows.conversations, rows.index, strict=True)
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
    return {"train.jsonl": to_json_lines(data), "train_unsloth.py": "\n" + script.render(constants=literals)}


UNSLOTH = Exporter("unsloth", "train_unsloth.py", ("train.jsonl",), "python train_unsloth.py", _write)
