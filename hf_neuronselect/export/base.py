"""What all exporters share: their interface, the rows they write, and JSON and YAML that any reader accepts."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from ..core.errors import NeuronSelectError
from ..rows.encode import Limits, Sample
from ..rows.formats import Conversation

Files = dict[str, str | pa.Table]
"""Contents of an export by file name, the configuration last."""

LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
BATCH, ACCUMULATE, LEARNING_RATE, EPOCHS = 2, 8, 2e-4, 2
ADAPT_TRAINING = "Adapt: a step has batch x accumulation x GPUs rows; the learning rate is usual for LoRA."
ADAPT_LORA = "LoRA on every linear layer of the blocks. Adapt: a higher rank can learn more."


@dataclass(frozen=True)
class BaseModel:
    """The model to be trained.

    Attributes:
        name: Hub id or folder. revision: the commit the selection was made with, if it was made with this model.
        tokenizer: None if it is not on this machine. template: the chat template it lacks, or that its rows were scored
            with instead of its own; else None. marked: whether its chat template marks the answers. limits: of rows, as far
            as they are known.
    """

    name: str
    revision: str | None
    tokenizer: Any = None
    template: str | None = None
    marked: bool = False
    limits: Limits = Limits()


@dataclass(frozen=True)
class Rows:
    """The selected rows, best first: ``conversations[i]`` is row ``index[i]`` of the pool.

    Attributes:
        samples: their token ids with the answers marked, for a trainer that cannot find the answers by itself.
    """

    conversations: list[Conversation]
    index: list[int]
    samples: list[Sample] | None = None

    @property
    def any_tools(self) -> bool:
        return any(row.tools for row in self.conversations)

    @property
    def any_calls(self) -> bool:
        return any(turn.get("tool_calls") for row in self.conversations for turn in row.messages)

    def error(self, i: int, fault: str, mend: str, trainer: str) -> NeuronSelectError:
        return NeuronSelectError(
            f"row {i} of the selection (source_index {self.index[i]}) {fault}; {mend}", option="format", value=trainer
        )


@dataclass(frozen=True)
class Exporter:
    """How one trainer reads a selection.

    Attributes:
        name: the trainer, as ``--format`` calls it.
        config: its configuration file. data: every other file it may write.
        command: starts the training inside the export's folder.
        tokens: whether a model's rows are written as token ids.
        learnt: says what is trained on.
        write: returns all files for the rows, the base model and the tokens kept of a row.
    """

    name: str
    config: str
    data: tuple[str, ...]
    command: str
    tokens: Callable[[BaseModel], bool]
    learnt: Callable[[Rows, BaseModel], str]
    write: Callable[[Rows, BaseModel, int], Files]


def unmarked(base: BaseModel) -> bool:
    """Whether the answers can be found in the model's chat template, but are not marked there."""
    return base.tokenizer is not None and not base.marked


def labelled(sample: Sample) -> dict[str, list[int]]:
    """A row as most trainers take token ids: ``labels`` are -100 except for the answers."""
    ids = sample.input_ids.tolist()
    labels = np.where(sample.pooled, sample.input_ids, -100).tolist()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that also escapes characters which some readers treat as a line end."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def to_json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{to_json(row)}\n" for row in rows)


def to_yaml(*sections: tuple[str, Mapping[str, Any]]) -> str:
    """Sections of (comment, keys); keys whose value is None are left out."""
    parts = []
    for comment, keys in sections:
        keys = {key: value for key, value in keys.items() if value is not None}
        dumped = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=1000) if keys else ""
        parts.append("".join(f"# {line}\n" for line in comment.split("\n")) + dumped)
    return "\n" + "\n".join(parts)


def comment(text: str) -> str:
    """Text in lines short enough for a comment."""
    return "\n".join(textwrap.wrap(text, 118))


def call_arguments(call: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and arguments of a tool call, the arguments as an object.

    Raises:
        ValueError: no name, or arguments that are text but not JSON.
    """
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not function.get("name"):
        raise ValueError("has a tool call without a function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            raise ValueError(f"calls {function['name']} with arguments that are not JSON") from None
    return str(function["name"]), arguments
