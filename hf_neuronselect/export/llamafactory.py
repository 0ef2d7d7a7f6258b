"""LLaMA-Factory: ShareGPT rows with their ``dataset_info.json``, and a configuration for ``llamafactory-cli``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..rows.turns import RESULTS
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
    to_json,
    to_yaml,
)


def _write(rows: Rows, base: BaseModel, length: int) -> Files:
    columns = {"messages": "conversations", "system": "system"} | ({"tools": "tools"} if rows.any_tools else {})
    info = {"selection": {"file_name": "train.json", "formatting": "sharegpt", "columns": columns}}
    config = to_yaml(
        ("The model. Adapt: quantization_bit: 4 saves memory (needs bitsandbytes).",
         {"model_name_or_path": base.name, "model_revision": base.revision}),
        (comment("The rows, described by dataset_info.json in this folder. " + _learnt(rows, base)),
         {"dataset": "selection", "dataset_dir": ".", "cutoff_len": length, "train_on_prompt": False}),
        (ADAPT_LORA, {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": LORA_RANK,
                      "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT, "lora_target": "all"}),
        (ADAPT_TRAINING + "\nbf16 needs a GPU that has it.",
         {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATE,
          "learning_rate": LEARNING_RATE, "lr_scheduler_type": "cosine", "num_train_epochs": float(EPOCHS),
          "bf16": True}),
        ("Output.", {"output_dir": "out", "logging_steps": 10, "save_strategy": "epoch", "report_to": "none"}),
    )  # fmt: skip
    body = "[\n" + ",\n".join(to_json(line) for line in _data(rows)) + "\n]\n"
    return {"train.json": body, "dataset_info.json": to_json(info, indent=2) + "\n", "llamafactory.yaml": config}


def _learnt(rows: Rows, base: BaseModel) -> str:
    return (
        "Only the answers are trained on (train_on_prompt: false). LLaMA-Factory renders rows by templates of its own, "
        "which can differ from the one they were scored with. Adapt: name the model's (template: llama3, qwen3, ...); "
        "without it the tokenizer's chat template is used, if it has one, with tools in a general form."
    )


def _data(rows: Rows) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = []
    for i, (row, index) in enumerate(zip(rows.conversations, rows.index, strict=True)):
        try:
            system, turns = _sharegpt(row.messages)
        except ValueError as cause:
            raise rows.error(
                i, str(cause), "leave it out and select again, or export for trl, axolotl or unsloth", "llamafactory"
            ) from cause
        line: dict[str, Any] = {"conversations": turns, "system": system}
        if rows.any_tools:
            line["tools"] = to_json(row.tools) if row.tools else ""
        data.append(line | {"source_index": index})
    return data


def _sharegpt(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, str]]]:
    """The system text, and turns that alternate between user (or tool) and assistant.

    Raises:
        ValueError: a row that LLaMA-Factory would silently drop or cannot read.
    """
    system, turns = "", []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if message.get("tool_calls") and role != "assistant":
            raise ValueError(f"calls a tool in a {role} turn (turn {i})")
        if role in ("system", "developer"):
            if i > 0:
                raise ValueError(f"has a {role} turn after the first (turn {i})")
            system = content
        elif role == "user":
            turns.append({"from": "human", "value": content})
        elif role == "assistant":
            turns.append(_answer(message))
        elif turns and turns[-1]["from"] == "observation":
            turns[-1]["value"] += RESULTS + content
        else:
            turns.append({"from": "observation", "value": content})
    for i, turn in enumerate(turns):
        if turn["from"] not in (("human", "observation"), ("gpt", "function_call"))[i % 2]:
            raise ValueError("does not alternate between user (or tool) and assistant, beginning with the user")
    if len(turns) % 2:
        raise ValueError("does not end with an assistant turn")
    return system, turns


def _answer(message: Mapping[str, Any]) -> dict[str, str]:
    thought = message.get("reasoning_content") or ""
    before = (f"<think>\n{thought}\n</think>\n\n" if thought else "") + message["content"]
    if not message.get("tool_calls"):
        return {"from": "gpt", "value": before}
    calls = [dict(zip(("name", "arguments"), call_arguments(call), strict=True)) for call in message["tool_calls"]]
    # An angle bracket in an argument could be read as the end of the call or of a thought.
    value = to_json(calls).replace("<", "\\u003c")
    if message["content"].strip():
        value = f"<tool_call>{value}</tool_call>"  # calls beside text are marked
    return {"from": "function_call", "value": before + value}


LLAMAFACTORY = Exporter(
    "llamafactory",
    "llamafactory.yaml",
    ("train.json", "dataset_info.json"),
    "llamafactory-cli train llamafactory.yaml",
    lambda base: False,
    _learnt,
    _write,
)
