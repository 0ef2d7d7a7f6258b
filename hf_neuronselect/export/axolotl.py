"""Axolotl: JSON lines (or parquet) of messages, and a configuration for ``axolotl train``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from .base import (
    ACCUMULATE,
    ADAPT_LORA,
    ADAPT_TRAINING,
    BATCH,
    EPOCHS,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_DROPOUT,
    LORA_RANK,
    BaseModel,
    Exporter,
    Files,
    Rows,
    call_arguments,
    comment,
    labelled,
    to_json,
    to_json_lines,
    to_yaml,
    unmarked,
)

_CHUNK = 10 << 20  # bytes from whose rows `datasets` takes the types of a JSON-lines file


def _write(rows: Rows, base: BaseModel, length: int) -> Files:
    if rows.samples is not None:
        dataset: dict[str, Any] = {"path": "train.jsonl", "ds_type": "json", "split": "train", "type": None}
        text = to_json_lines([labelled(sample) for sample in rows.samples])
        return {"train.jsonl": text, "axolotl.yaml": _config(rows, base, length, _template(base), dataset)}
    data = _data(rows)
    text = to_json_lines(data)
    table = None if len(text.encode()) <= _CHUNK else _late_types(data)
    name, kind = ("train.jsonl", "json") if table is None else ("train.parquet", "parquet")
    template = _template(base)
    dataset = {
        "path": name,
        "ds_type": kind,
        "split": "train",
        "type": "chat_template",
        **template,
        "field_messages": "messages",
        **({"field_tools": "tools"} if rows.any_tools else {}),
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    config = _config(rows, base, length, template, dataset)
    return {name: text if table is None else table, "axolotl.yaml": config}


def _template(base: BaseModel) -> dict[str, Any]:
    if base.template is not None:
        return {"chat_template": "jinja", "chat_template_jinja": base.template}
    return {"chat_template": "tokenizer_default_fallback_chatml"}


def _config(rows: Rows, base: BaseModel, length: int, template: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    return to_yaml(
        ("The model. Adapt: load_in_4bit: true with adapter: qlora saves memory.\n"
         "A tokenizer without a padding token needs special_tokens: {pad_token: ...}.",
         {"base_model": base.name, "revision_of_model": base.revision}),
        ("The chat template: the model's own; if it has none, the form in which rows were scored, or ChatML.",
         template),
        (comment("The rows, relative to this folder. " + _learnt(rows, base)),
         {"datasets": [dataset], "dataset_prepared_path": "prepared", "val_set_size": 0.0}),
        ("Tokens of a row; longer rows are cut. Adapt: sample_packing is faster with flash attention.",
         {"sequence_len": length, "excess_length_strategy": "truncate", "sample_packing": False}),
        (ADAPT_LORA, {"adapter": "lora", "lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA,
                      "lora_dropout": LORA_DROPOUT, "lora_target_linear": True}),
        (ADAPT_TRAINING, {"micro_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATE,
                          "learning_rate": LEARNING_RATE, "lr_scheduler": "cosine", "num_epochs": EPOCHS,
                          "optimizer": "adamw_torch_fused", "bf16": "auto", "gradient_checkpointing": True}),
        ("Output.", {"output_dir": "out", "logging_steps": 10, "saves_per_epoch": 1}),
    )  # fmt: skip


def _learnt(rows: Rows, base: BaseModel) -> str:
    if rows.samples is not None:
        return (
            "Only the answers and their ends are trained on. The model's chat template does not mark them, so the rows "
            "are written as token ids, with labels -100 for all other tokens, which Axolotl takes as it is."
        )
    return "Only the answers and their ends are trained on, which Axolotl finds by itself (roles_to_train)."


def _data(rows: Rows) -> list[dict[str, Any]]:
    data = []
    for i, (row, index) in enumerate(zip(rows.conversations, rows.index, strict=True)):
        try:
            line: dict[str, Any] = {"messages": [_typed_turn(turn) for turn in row.messages]}
        except ValueError as cause:
            raise rows.error(i, str(cause), "mend or leave out the row and select again", "axolotl") from cause
        if rows.any_tools:
            line["tools"] = [_typed_tool(tool) for tool in row.tools] if row.tools else None
        data.append(line | {"source_index": index})
    return data


def _typed_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Write arguments as JSON text, which Axolotl reads: arguments of different tools have no common type."""
    turn = dict(turn)
    if turn.get("tool_calls"):
        calls = []
        for call in turn["tool_calls"]:
            name, arguments = call_arguments(call)
            rest = {k: v for k, v in call.items() if k not in ("name", "arguments")}
            calls.append({"type": "function", **rest, "function": {"name": name, "arguments": to_json(arguments)}})
        turn["tool_calls"] = calls
    return turn


def _typed_tool(tool: Any) -> Any:
    """Write parameters as JSON text, which Axolotl reads."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("parameters", ""), str):
        return tool
    return {**tool, "function": {**function, "parameters": to_json(function["parameters"])}}


def _late_types(data: list[dict[str, Any]]) -> pa.Table | None:
    """The rows as a table, if types taken from the first rows alone would not fit later ones."""
    size = count = 0
    while count < len(data) and size < _CHUNK * 4 // 5:
        size += len(to_json(data[count]).encode())
        count += 1
    try:
        whole = pa.array(data)
        return None if pa.array(data[:count]).type == whole.type else pa.Table.from_struct_array(whole)
    except pa.ArrowInvalid:  # no common type at all
        return None


AXOLOTL = Exporter(
    "axolotl",
    "axolotl.yaml",
    ("train.jsonl", "train.parquet"),
    "axolotl train axolotl.yaml",
    unmarked,
    _learnt,
    _write,
)
