"""TRL: JSON lines of messages, and a configuration for ``trl sft``."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

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
    comment,
    to_json,
    to_json_lines,
    to_yaml,
    unmarked,
)

# Renamed in transformers 5.23; the machine that trains likely has the versions of the one that exports.
_NAME = "activation_checkpointing"
_CHECKPOINTING = _NAME if hasattr(TrainingArguments, _NAME) else "gradient_checkpointing"


def _write(rows: Rows, base: BaseModel, length: int) -> Files:
    files: Files = {"train.jsonl": to_json_lines(_data(rows))}
    if base.template is not None:
        files["chat_template.jinja"] = base.template
    files["sft.yaml"] = to_yaml(
        ("The model. Adapt: load_in_4bit: true saves memory (needs bitsandbytes); bf16: true is faster on a GPU that\n"
         "has it (Ampere and later).",
         {"model_name_or_path": base.name, "model_revision": base.revision, "dtype": "bfloat16", "bf16": False}),
        ("The rows, relative to this folder.",
         {"datasets": [{"path": "json", "data_files": "train.jsonl", "split": "train"}]}),
        (comment(_learnt(rows, base)),
         {"chat_template_path": "chat_template.jinja" if base.template is not None else None,
          "assistant_only_loss": rows.samples is None}),
        ("Tokens of a row; longer rows are cut, as they were when they were scored.", {"max_length": length}),
        (ADAPT_LORA, {"use_peft": True, "lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA,
                      "lora_dropout": LORA_DROPOUT, "lora_target_modules": ["all-linear"]}),
        (ADAPT_TRAINING, {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATE,
                          "learning_rate": LEARNING_RATE, "lr_scheduler_type": "cosine", "num_train_epochs": EPOCHS,
                          _CHECKPOINTING: True}),
        ("Output.", {"output_dir": "out", "logging_steps": 10, "save_strategy": "epoch", "report_to": "none"}),
    )  # fmt: skip
    return files


def _data(rows: Rows) -> list[dict[str, Any]]:
    if rows.samples is not None:
        return [
            {"input_ids": row.input_ids.tolist(), "assistant_masks": row.pooled.astype(int).tolist(), "source_index": i}
            for row, i in zip(rows.samples, rows.index, strict=True)
        ]
    data: list[dict[str, Any]] = []
    for row, index in zip(rows.conversations, rows.index, strict=True):
        line: dict[str, Any] = {"messages": row.messages}
        if rows.any_tools:
            # As text, which TRL reads: the tools of different rows have no common type. `null` means no tools.
            line["tools"] = to_json(row.tools)
        data.append(line | {"source_index": index})
    first = data[0]["messages"]
    if rows.any_calls or any(set(m) != {"role", "content"} for row in rows.conversations for m in row.messages):
        # `datasets` takes the turns' keys from the beginning of the file and fails on new ones later, unless the turns
        # differ there: then it keeps each as it is.
        if all(set(turn) == set(first[0]) for turn in first):
            data[0]["messages"] = [first[0] | {"source_index": rows.index[0]}, *first[1:]]
    return data


def _learnt(rows: Rows, base: BaseModel) -> str:
    if rows.samples is not None:
        return (
            "Only the answers are trained on. The model's chat template does not mark them, so the rows are written as "
            "token ids, with assistant_masks 1 for the tokens of answers, which TRL takes as it is."
        )
    if base.template is not None and base.marked:
        return (
            "Only the answers are trained on, which the chat template marks: chat_template.jinja is the form in which "
            "the rows were scored."
        )
    if base.marked:
        return "Only the answers are trained on, which the model's chat template marks."
    return (
        "Only the answers are trained on if the model's chat template marks them ({% generation %}) or TRL knows it; "
        "else TRL stops."
    )


TRL = Exporter(
    "trl",
    "sft.yaml",
    ("train.jsonl", "chat_template.jinja"),
    "trl sft --config sft.yaml",
    unmarked,
    _learnt,
    _write,
)
