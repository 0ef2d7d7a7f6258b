"""A selection as other trainers read it: the rows, and a config that runs in the folder it is written to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers import AutoTokenizer

from ..core.errors import NeuronSelectError, one_of
from ..rows.formats import Conversation, RowFormat, read_row, row_format
from ..selection.selection import Selection

FORMATS: tuple[str, ...] = ("trl", "axolotl", "llamafactory", "unsloth")

# The config of each, by which an earlier export is known, and what else may lie beside it.
_CONFIG = {"trl": "sft.yaml", "axolotl": "axolotl.yaml", "llamafactory": "llamafactory.yaml", "unsloth": "train_unsloth.py"}  # fmt: skip
_DATA = {
    "trl": ("train.jsonl", "chat_template.jinja"),
    "axolotl": ("train.jsonl", "train.parquet"),
    "llamafactory": ("train.json", "dataset_info.json"),
    "unsloth": ("train.jsonl",),
}
_RUN = {
    "trl": "trl sft --config sft.yaml",
    "axolotl": "axolotl train axolotl.yaml",
    "llamafactory": "llamafactory-cli train llamafactory.yaml",
    "unsloth": "python train_unsloth.py",
}
_MARK = "# neuronselect export for "
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CHUNK = 10 << 20  # `datasets` takes a JSON-lines file's types from its first so many bytes


@dataclass(frozen=True)
class _Base:
    """The model that is to be trained.

    Attributes:
        name: Hub id or folder. revision: of it, if it is the one the selection was made with.
        known: whether its tokenizer is at hand. template: the chat template it lacks, or None.
        marks_answers: whether TRL can tell the answers from the rest by its template.
    """

    name: str
    revision: str | None
    known: bool
    template: str | None
    marks_answers: bool


@dataclass(frozen=True)
class _Rows:
    """The rows, read: ``conversations[i]`` is row ``index[i]`` of the pool, best first."""

    conversations: list[Conversation]
    index: list[int]

    @property
    def any_tools(self) -> bool:
        return any(row.tools for row in self.conversations)

    @property
    def any_calls(self) -> bool:
        return any(turn.get("tool_calls") for row in self.conversations for turn in row.messages)

    def error(self, i: int, what: str, mend: str, trainer: str) -> NeuronSelectError:
        return NeuronSelectError(
            f"row {i} of the selection (source_index {self.index[i]}) {what}; {mend}", option="format", value=trainer
        )


def export_selection(
    selection: Selection, trainer: str, out: str | Path, *, base_model: str | None = None
) -> list[Path]:
    """Write the rows, best first, and the config another trainer needs to fine-tune on them.

    Args:
        trainer: one of :data:`FORMATS`.
        out: new, empty, or a folder an export wrote before (its files are replaced).
        base_model: Hub id or folder of what is trained; default the selection's own model, at its commit.

    Returns:
        The files: data first, then the config.

    Raises:
        NeuronSelectError: an unknown trainer, a folder of something else, no model to name, or a row the trainer
            cannot hold.
    """
    one_of(trainer, FORMATS, "format")
    out = Path(out)
    before = _earlier(out)
    rows = _read(selection, trainer)
    base = _base(selection, base_model, plain=not (rows.any_tools or rows.any_calls))
    extractor = selection.provenance.extractor
    length = extractor.options.max_length if extractor and extractor.options else 2048
    files = _WRITERS[trainer](rows, base, length)
    name = _CONFIG[trainer]
    files[name] = "".join(f"# {line}\n" for line in _header(selection, trainer)) + files[name]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in before:
            (out / old).unlink(missing_ok=True)
        for file, content in files.items():
            if isinstance(content, str):
                (out / file).write_text(content, encoding="utf-8", newline="\n")
            else:
                pq.write_table(content, out / file)
    except OSError as cause:
        raise NeuronSelectError(
            f"cannot be written: {cause.strerror or cause}", option="out", value=out.name
        ) from cause
    return [out / file for file in files]


def _earlier(out: Path) -> list[str]:
    """What an earlier export left in ``out``.

    Raises:
        NeuronSelectError: it is no folder, or one of something else.
    """
    if not out.exists():
        return []
    if not out.is_dir():
        raise NeuronSelectError("is a file; name a folder", option="out", value=out.name)
    found = [trainer for trainer, config in _CONFIG.items() if _is_ours(out / config)]
    if not found and any(out.iterdir()):
        raise NeuronSelectError("exists and is not an export; name another folder", option="out", value=out.name)
    return [name for trainer in found for name in (_CONFIG[trainer], *_DATA[trainer])]


def _is_ours(config: Path) -> bool:
    if not config.is_file():
        return False
    with config.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(_MARK)


# --------------------------------------------------------------------------------------------- rows
def _format_of(selection: Selection) -> RowFormat:
    """How the selected rows were read when they were scored."""
    columns = selection.dataset.column_names
    settings = selection.provenance.extractor.options if selection.provenance.extractor else None
    # Columns after `source_index` are not the rows' own: a saved selection has roles and contents there, without the
    # calls a prompt and completion may hold.
    own = columns[: columns.index("source_index")] if "source_index" in columns else columns
    own = [name for name in own if not name.startswith("neuron_")]
    found = row_format(own, settings.row_format, settings.columns) if settings else row_format(own)
    return row_format(columns) if found.name == "text" and "messages" in columns else found


def _read(selection: Selection, trainer: str) -> _Rows:
    if not len(selection):
        raise NeuronSelectError("the selection has no rows", option="format", value=trainer)
    fmt = _format_of(selection)
    data = selection.dataset.with_format(None).select_columns(fmt.used)
    rows = _Rows([read_row(row, fmt) for row in data], [int(i) for i in selection.indices])
    for i, row in enumerate(rows.conversations):
        if row.skip:
            raise rows.error(i, f"cannot be read ({row.skip})", "leave it out and select again", trainer)
        if row.text is not None:
            raise rows.error(
                i,
                "is plain text, and chat trainers want turns",
                "add a column messages (user and assistant turns) to the pool and select again, or train on the texts "
                "as they are: the selection folder loads with load_dataset",
                trainer,
            )
        if not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in row.messages):
            raise rows.error(i, "has no assistant turn: there is nothing to learn", "leave it out and select again",
                             trainer)  # fmt: skip
    return rows


def _json(value: Any, indent: int | None = None) -> str:
    """JSON in one line (or indented); what some readers take for a line's end is escaped, too."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{_json(row)}\n" for row in rows)


def _arguments(call: Mapping[str, Any]) -> tuple[str, Any]:
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


# -------------------------------------------------------------------------------------------- model
def _base(selection: Selection, base_model: str | None, *, plain: bool) -> _Base:
    """The model, and what its tokenizer tells if it is on this machine.

    Args:
        plain: a tokenizer without a chat template may get the plain one, which knows no tools.
    """
    name, revision = base_model, None
    if name is None:
        model = selection.provenance.extractor.model if selection.provenance.extractor else None
        if model is None or not model.on_hub or not _HUB_ID.fullmatch(str(model.id)):
            raise NeuronSelectError(
                "the selection was not made with a model of the Hub; name what is to be trained (ORG/NAME or a folder)",
                option="base_model",
            )
        name, revision = str(model.id), model.commit
    elif not name.strip() or any(not c.isprintable() for c in name):
        raise NeuronSelectError("a Hub id (ORG/NAME) or a folder", option="base_model", value=name)
    if os.path.isdir(name):
        name = os.path.abspath(name)  # the config runs in a folder of its own
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # not here, or of code that is not run: the config is written without asking it
        return _Base(name, revision, False, None, True)
    if tokenizer.chat_template is None:
        return _Base(name, revision, True, _plain_template() if plain else None, True)
    return _Base(name, revision, True, None, _marks_answers(tokenizer))


def _plain_template() -> str:
    """The form in which rows are scored where a model has no chat template."""
    from ..training.models import PLAIN_TEMPLATE

    return PLAIN_TEMPLATE


def _marks_answers(tokenizer: Any) -> bool:
    """Whether TRL can train on the answers alone: the template marks them, or TRL has one like it that does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    template = template.get("default", "") if isinstance(template, Mapping) else template
    try:
        return bool(has_generation_markers(template) or get_training_chat_template(tokenizer))
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------- config
def _one_line(value: Any) -> str:
    """Text that cannot end a comment."""
    text = " ".join(str(value).split())[:300]
    return "".join(c if c.isprintable() else "?" for c in text)


def _header(selection: Selection, trainer: str) -> list[str]:
    made = selection.provenance
    pool = made.pool
    options = ", ".join(f"{name}={value}" for name, value in made.method.options.items())
    targets = ", ".join(made.targets)
    stated = pool.license or "not said; see where the rows come from"
    restricted = f"; restricted: {pool.restricted}" if pool.restricted else ""
    where = " ".join(filter(None, (pool.config, pool.split)))
    commit = pool.commit or pool.fingerprint or "?"
    lines = [
        f"{_MARK[2:]}{trainer}: run it in this folder with `{_RUN[trainer]}`.",
        "Adapt what is marked; another export into this folder overwrites the file.",
        f"dataset: {pool.id or 'rows in memory'} at {commit} {where}",
        f"method: {made.method.name} {f'({options})' if options else ''} {f'for {targets}' if targets else ''}",
        f"rows: {len(selection)} of {made.counts.rows}, best first",
        f"licence of the dataset: {stated}{restricted}",
    ]
    return [_one_line(line) for line in lines]


def _yaml(*sections: tuple[str, Mapping[str, Any]]) -> str:
    """Sections of (comment, keys); what the keys hold is written by the YAML library alone."""
    parts = []
    for comment, keys in sections:
        keys = {key: value for key, value in keys.items() if value is not None}
        dumped = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=1000) if keys else ""
        parts.append("".join(f"# {line}\n" for line in comment.split("\n")) + dumped)
    return "\n" + "\n".join(parts)


_LORA = {"r": 16, "alpha": 32, "dropout": 0.05}
_BATCH, _ACCUMULATE, _RATE, _EPOCHS = 2, 8, 2e-4, 2
_ADAPT_TRAINING = "Adapt: batch x accumulation x GPUs is a step's rows; LoRA's usual rate; passes over the rows."
_ADAPT_LORA = "LoRA on every linear layer of the blocks. Adapt: the rank is what it may learn."


def _write_trl(rows: _Rows, base: _Base, length: int) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for row, index in zip(rows.conversations, rows.index, strict=True):
        line: dict[str, Any] = {"messages": row.messages}
        if rows.any_tools:
            # As text, which TRL reads: the tools of different rows have no common type. `null` is no tools.
            line["tools"] = _json(row.tools)
        data.append(line | {"source_index": index})
    first = data[0]["messages"]
    if rows.any_calls or any(set(m) != {"role", "content"} for row in rows.conversations for m in row.messages):
        # `datasets` fixes the turns' keys by the file's beginning and fails on new ones later, unless turns differ
        # there: then it keeps each as it is.
        if all(set(turn) == set(first[0]) for turn in first):
            data[0]["messages"] = [first[0] | {"source_index": rows.index[0]}, *first[1:]]
    files = {"train.jsonl": _lines(data)}
    if base.template is not None:
        files["chat_template.jinja"] = base.template
        loss = "The model has no chat template: this is the plain form in which its rows were scored."
    elif not base.known:
        loss = (
            "Only the answers are trained on. If TRL calls the chat template not training-compatible, or there is\n"
            "none (base models), name a template that marks answers ({% generation %}) with chat_template_path."
        )
    elif base.marks_answers:
        loss = "Only the answers are trained on."
    else:
        loss = (
            "The model's chat template does not mark the answers, so whole rows are trained on. Better: name one that\n"
            "does ({% generation %}) with chat_template_path, and set this to true."
        )
    files["sft.yaml"] = _yaml(
        ("The model. Adapt: load_in_4bit: true saves memory (needs bitsandbytes); bf16: true is faster on a GPU that\n"
         "has it (Ampere and later).",
         {"model_name_or_path": base.name, "model_revision": base.revision, "dtype": "bfloat16", "bf16": False}),
        ("The rows, relative to this folder.",
         {"datasets": [{"path": "json", "data_files": "train.jsonl", "split": "train"}]}),
        (loss, {"chat_template_path": "chat_template.jinja" if base.template is not None else None,
                "assistant_only_loss": base.marks_answers}),
        ("Tokens of a row; longer ones are cut, as they were when they were scored.", {"max_length": length}),
        (_ADAPT_LORA, {"use_peft": True, "lora_r": _LORA["r"], "lora_alpha": _LORA["alpha"],
                       "lora_dropout": _LORA["dropout"], "lora_target_modules": ["all-linear"]}),
        (_ADAPT_TRAINING, {"per_device_train_batch_size": _BATCH, "gradient_accumulation_steps": _ACCUMULATE,
                           "learning_rate": _RATE, "lr_scheduler_type": "cosine", "num_train_epochs": _EPOCHS,
                           "activation_checkpointing": True}),
        ("Where it goes.", {"output_dir": "out", "logging_steps": 10, "save_strategy": "epoch", "report_to": "none"}),
    )  # fmt: skip
    return files


def _write_axolotl(rows: _Rows, base: _Base, length: int) -> dict[str, Any]:
    data = []
    for i, (row, index) in enumerate(zip(rows.conversations, rows.index, strict=True)):
        try:
            line: dict[str, Any] = {"messages": [_typed_turn(turn) for turn in row.messages]}
        except ValueError as cause:
            raise rows.error(i, str(cause), "mend or leave out the row and select again", "axolotl") from cause
        if rows.any_tools:
            line["tools"] = [_typed_tool(tool) for tool in row.tools] if row.tools else None
        data.append(line | {"source_index": index})
    text = _lines(data)
    table = None if len(text.encode()) <= _CHUNK else _late_types(data)
    name, kind = ("train.jsonl", "json") if table is None else ("train.parquet", "parquet")
    template: dict[str, Any] = {"chat_template": "tokenizer_default_fallback_chatml"}
    if base.template is not None:
        template = {"chat_template": "jinja", "chat_template_jinja": base.template}
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
    config = _yaml(
        ("The model. Adapt: load_in_4bit: true with adapter: qlora saves memory.\n"
         "A tokenizer without a padding token needs special_tokens: {pad_token: ...}.",
         {"base_model": base.name, "revision_of_model": base.revision}),
        ("The chat template: the model's own, or ChatML where it has none (or the form in which rows were scored).",
         template),
        ("The rows, relative to this folder; only the answers and their ends are trained on.",
         {"datasets": [dataset], "dataset_prepared_path": "prepared", "val_set_size": 0.0}),
        ("Tokens of a row; longer ones are cut. Adapt: sample_packing is faster with flash attention.",
         {"sequence_len": length, "excess_length_strategy": "truncate", "sample_packing": False}),
        (_ADAPT_LORA, {"adapter": "lora", "lora_r": _LORA["r"], "lora_alpha": _LORA["alpha"],
                       "lora_dropout": _LORA["dropout"], "lora_target_linear": True}),
        (_ADAPT_TRAINING, {"micro_batch_size": _BATCH, "gradient_accumulation_steps": _ACCUMULATE,
                           "learning_rate": _RATE, "lr_scheduler": "cosine", "num_epochs": _EPOCHS,
                           "optimizer": "adamw_torch_fused", "bf16": "auto", "gradient_checkpointing": True}),
        ("Where it goes.", {"output_dir": "out", "logging_steps": 10, "saves_per_epoch": 1}),
    )  # fmt: skip
    return {name: text if table is None else table, "axolotl.yaml": config}


def _typed_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON text, which Axolotl reads: those of different tools have no common type."""
    turn = dict(turn)
    if turn.get("tool_calls"):
        calls = []
        for call in turn["tool_calls"]:
            name, arguments = _arguments(call)
            rest = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
            calls.append({"type": "function", **rest, "function": {"name": name, "arguments": _json(arguments)}})
        turn["tool_calls"] = calls
    return turn


def _typed_tool(tool: Any) -> Any:
    """Parameters as JSON text, which Axolotl reads."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("parameters", ""), str):
        return tool
    return {**tool, "function": {**function, "parameters": _json(function["parameters"])}}


def _late_types(data: list[dict[str, Any]]) -> pa.Table | None:
    """The rows as a table, if a reader that types them by the first ones would fail on later ones."""
    size = count = 0
    while count < len(data) and size < _CHUNK * 4 // 5:
        size += len(_json(data[count]).encode())
        count += 1
    try:
        whole = pa.array(data)
        return None if pa.array(data[:count]).type == whole.type else pa.Table.from_struct_array(whole)
    except pa.ArrowInvalid:  # no common type at all
        return None


# LLaMA-Factory's own, where it joins the results of calls made at once.
_RESULTS = "\n</tool_response>\n<tool_response>\n"


def _write_llamafactory(rows: _Rows, base: _Base, length: int) -> dict[str, Any]:
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
            line["tools"] = _json(row.tools) if row.tools else ""
        data.append(line | {"source_index": index})
    columns = {"messages": "conversations", "system": "system"} | ({"tools": "tools"} if rows.any_tools else {})
    info = {"selection": {"file_name": "train.json", "formatting": "sharegpt", "columns": columns}}
    config = _yaml(
        ("The model. Adapt: quantization_bit: 4 saves memory (needs bitsandbytes).",
         {"model_name_or_path": base.name, "model_revision": base.revision}),
        ("The rows, by dataset_info.json in this folder; only the answers are trained on. Adapt: name the model's\n"
         "template (template: llama3, qwen3, ...); without it the tokenizer's chat template is used, with tools in a\n"
         "general form, and none for a base model that has none.",
         {"dataset": "selection", "dataset_dir": ".", "cutoff_len": length, "train_on_prompt": False}),
        (_ADAPT_LORA, {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": _LORA["r"],
                       "lora_alpha": _LORA["alpha"], "lora_dropout": _LORA["dropout"], "lora_target": "all"}),
        (_ADAPT_TRAINING + "\nbf16 needs a GPU that has it.",
         {"per_device_train_batch_size": _BATCH, "gradient_accumulation_steps": _ACCUMULATE, "learning_rate": _RATE,
          "lr_scheduler_type": "cosine", "num_train_epochs": float(_EPOCHS), "bf16": True}),
        ("Where it goes.", {"output_dir": "out", "logging_steps": 10, "save_strategy": "epoch", "report_to": "none"}),
    )  # fmt: skip
    body = "[\n" + ",\n".join(_json(line) for line in data) + "\n]\n"
    return {"train.json": body, "dataset_info.json": _json(info, indent=2) + "\n", "llamafactory.yaml": config}


def _sharegpt(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, str]]]:
    """The system text, and turns in which the user's (or a tool's) and the assistant's alternate.

    Raises:
        ValueError: what in them LLaMA-Factory would leave out without a word, or not read.
    """
    system, turns = "", []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role in ("system", "developer"):
            if i > 0:
                raise ValueError(f"has a {role} turn after the first (turn {i})")
            system = content
        elif role == "user":
            turns.append({"from": "human", "value": content})
        elif role == "assistant":
            turns.append(_sharegpt_answer(message))
        elif turns and turns[-1]["from"] == "observation":
            turns[-1]["value"] += _RESULTS + content
        else:
            turns.append({"from": "observation", "value": content})
    for i, turn in enumerate(turns):
        if turn["from"] not in (("human", "observation"), ("gpt", "function_call"))[i % 2]:
            raise ValueError("does not alternate between user (or tool) and assistant, beginning with the user")
    if len(turns) % 2:
        raise ValueError("does not end with an assistant turn")
    return system, turns


def _sharegpt_answer(message: Mapping[str, Any]) -> dict[str, str]:
    thought = message.get("reasoning_content") or ""
    before = (f"<think>\n{thought}\n</think>\n\n" if thought else "") + message["content"]
    if not message.get("tool_calls"):
        return {"from": "gpt", "value": before}
    calls = [dict(zip(("name", "arguments"), _arguments(call), strict=True)) for call in message["tool_calls"]]
    # An angle bracket in an argument could be taken for the end of the call or of a thought.
    value = _json(calls).replace("<", "\\u003c")
    if message["content"].strip():
        value = f"<tool_call>{value}</tool_call>"  # text beside calls: the calls are marked
    return {"from": "function_call", "value": before + value}


_UNSLOTH = '''
import json
import os

from unsloth import FastLanguageModel, is_bfloat16_supported  # first: it changes what is imported after it
from unsloth.chat_templates import get_chat_template, train_on_responses_only

from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def turn_marks(tokenizer):
    """What the chat template writes before a user turn and before an assistant turn."""
    words = ["first question", "first answer", "second question", "second answer"]
    roles = ["user", "assistant"] * 2
    turns = [{"role": role, "content": text} for role, text in zip(roles, words)]
    text, before = tokenizer.apply_chat_template(turns, tokenize=False), []
    for word in words:
        piece, text = text.split(word, 1)
        before.append(piece)

    def header(piece):  # without the end of the turn before it, which the model is to learn
        return (piece[len(os.path.commonprefix([piece, text])) :] or piece).lstrip()

    return header(before[2]), header(os.path.commonprefix([before[1], before[3]]))


def main():
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=MODEL, revision=REVISION, max_seq_length=MAX_LENGTH, load_in_4bit=LOAD_IN_4BIT
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0,  # what Unsloth is fast with
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    if TEMPLATE is not None:
        tokenizer.chat_template = TEMPLATE
    elif not tokenizer.chat_template:
        tokenizer = get_chat_template(tokenizer, chat_template="chatml")

    with open("train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [
        tokenizer.apply_chat_template(row["conversations"], tools=row.get("tools"), tokenize=False) for row in rows
    ]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(
            output_dir="out",
            dataset_text_field="text",
            max_length=MAX_LENGTH,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            learning_rate=LEARNING_RATE,
            num_train_epochs=EPOCHS,
            lr_scheduler_type="cosine",
            optim="adamw_8bit",
            bf16=is_bfloat16_supported(),
            fp16=not is_bfloat16_supported(),
            logging_steps=10,
            save_strategy="epoch",
            seed=0,
            report_to="none",
        ),
    )
    # Only the answers are trained on.
    if hasattr(tokenizer, "_unsloth_input_part"):  # a template of Unsloth's own brings its marks
        trainer = train_on_responses_only(trainer)
    else:
        question, answer = turn_marks(tokenizer)
        trainer = train_on_responses_only(trainer, instruction_part=question, response_part=answer)
    trainer.train()
    model.save_pretrained("out")
    tokenizer.save_pretrained("out")


if __name__ == "__main__":
    main()
'''


def _write_unsloth(rows: _Rows, base: _Base, length: int) -> dict[str, Any]:
    data = [
        {"conversations": row.messages} | ({"tools": row.tools} if row.tools else {}) | {"source_index": index}
        for row, index in zip(rows.conversations, rows.index, strict=True)
    ]
    constants = {
        "MODEL": (base.name, ""),
        "REVISION": (base.revision, "None: the newest"),
        "TEMPLATE": (base.template, "None: the model's own chat template, or ChatML where it has none"),
        "MAX_LENGTH": (length, "tokens of a row; longer ones are cut"),
        "LOAD_IN_4BIT": (True, "False: 16-bit weights, four times the memory"),
        "LORA_R": (_LORA["r"], "the rank is what it may learn"),
        "LORA_ALPHA": (_LORA["alpha"], ""),
        "BATCH": (_BATCH, ""),
        "ACCUMULATE": (_ACCUMULATE, "batch x accumulation is a step's rows"),
        "LEARNING_RATE": (_RATE, ""),
        "EPOCHS": (_EPOCHS, ""),
    }
    lines = [f"{key} = {value!r}" + (f"  # {said}" if said else "") for key, (value, said) in constants.items()]
    imports, rest = _UNSLOTH.split("\n\n\n", 1)
    script = f"{imports}\n\n# Adapt these.\n" + "\n".join(lines) + f"\n\n\n{rest}"
    return {"train.jsonl": _lines(data), "train_unsloth.py": script}


_WRITERS = {
    "trl": _write_trl,
    "axolotl": _write_axolotl,
    "llamafactory": _write_llamafactory,
    "unsloth": _write_unsloth,
}
