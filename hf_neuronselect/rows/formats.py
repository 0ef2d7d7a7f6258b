r"""Read rows of any instruction format as messages.

Formats, detected from the column names or named by the user:

========== =============================================== =========================================
format      columns                                         becomes
========== =============================================== =========================================
messages    ``messages`` [``tools``]                        unchanged
prompt      ``prompt``, ``completion`` [``tools``]          strings: one user and one assistant turn
alpaca      ``instruction``, ``output`` [``input``,         ``instruction\n\ninput`` as the user turn
            ``system``]
sharegpt    ``conversations`` of ``from``/``value``         roles renamed
            [``system``, ``tools``]
qa          ``question``, ``answer``                        one user and one assistant turn
text        ``text``                                        tokenised unchanged, without turns (choice)
========== =============================================== =========================================

A row that cannot be read is never dropped: its :class:`Conversation` has the reason in ``skip``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import NeuronSelectError, unknown

Row = dict[str, Any]
"""A row of a dataset: column -> value."""

ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class RowFormat:
    """A row format and the names of its columns in the user's data.

    Args:
        name: ``messages``, ``prompt``, ``alpaca``, ``sharegpt``, ``qa`` or ``text``.
        columns: the format's own column name -> the data's column name.
    """

    name: str
    columns: tuple[tuple[str, str], ...]

    @property
    def used(self) -> list[str]:
        return [theirs for _, theirs in self.columns]

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {ours: row.get(theirs) for ours, theirs in self.columns}


_REQUIRED = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "qa": ("question", "answer"),
    "text": ("text",),
}
_OPTIONAL = {
    "messages": ("tools",),
    "prompt": ("tools",),
    "alpaca": ("input", "system"),
    "sharegpt": ("system", "tools"),
    "qa": ("system",),
    "text": (),
}


def row_format(columns: Iterable[str], name: str = "auto", renames: Mapping[str, str] | None = None) -> RowFormat:
    """The format of rows with these columns.

    Args:
        columns: column names of the data.
        name: a format's name, or ``auto``: the first format whose required columns are all present.
        renames: a format's column -> the data's column, e.g. ``{"instruction": "question"}``.

    Raises:
        NeuronSelectError: unknown format, or a required column is missing.
    """
    columns, renames = list(columns), dict(renames or {})
    if name != "auto" and name not in _REQUIRED:
        raise unknown("row format", name, [*_REQUIRED, "auto"], "row_format")
    if absent := [theirs for theirs in renames.values() if theirs not in columns]:
        raise NeuronSelectError(
            f"no such column; the data has {', '.join(columns) or 'none'}", option="columns", value=absent[0]
        )
    for candidate, required in _REQUIRED.items():
        names = {ours: renames.get(ours, ours) for ours in (*required, *_OPTIONAL[candidate])}
        if name in ("auto", candidate) and all(names[ours] in columns for ours in required):
            present = tuple((ours, theirs) for ours, theirs in names.items() if theirs in columns)
            return RowFormat(candidate, present)
    wanted = "; ".join(f"{f}: {', '.join(c)}" for f, c in _REQUIRED.items() if name in ("auto", f))
    raise NeuronSelectError(
        f"columns missing: the data has {', '.join(columns) or 'none'}, but it needs one of ({wanted}); "
        "rename them, or map them with columns={'instruction': 'question', ...}",
        option="row_format",
        value=name,
    )


class _Skip(Exception):
    """Raised for a row that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Conversation:
    """One row: ``messages`` (with ``tools``), or plain ``text``, or the reason it was skipped in ``skip``."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] | None = None
    text: str | None = None
    skip: str = ""

    def content(self) -> str:
        """All turns in one string, roles included. Rows with equal content are duplicates."""
        if self.text is not None:
            return self.text
        extra = [{k: m[k] for k in ("tool_calls", "reasoning_content") if k in m} for m in self.messages]
        return "\n".join(
            f"{m['role']}: {m['content']}" + (json.dumps(more, sort_keys=True, default=str) if more else "")
            for m, more in zip(self.messages, extra, strict=True)
        )

    def questions(self) -> list[str]:
        """The user turns."""
        return [m["content"] for m in self.messages if m["role"] == "user"]


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        texts = []
        for part in value:
            if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise _Skip(f"error: {where} holds a part of type {kind!r}; only text parts are read")
        return "\n".join(texts)
    raise _Skip(f"error: {where} is {type(value).__name__}, not text")


def _without_none(value: Any) -> Any:
    """Drop keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value


def _messages(value: Any, where: str = "messages") -> list[dict[str, Any]]:
    if value is None:
        raise _Skip("empty")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _Skip(f"error: {where} is {type(value).__name__}, not a list of role/content turns")
    read = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise _Skip(f"error: {where}[{i}] is {type(turn).__name__}, not a role/content turn")
        # Arrow fills keys that only other rows have with None; a chat template would treat them as set.
        message = _without_none(turn)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise _Skip(f"error: {where}[{i}] has the unknown role {role!r}")
        if "content" in message or not message.get("tool_calls"):
            message["content"] = _content(message.get("content"), f"{where}[{i}].content")
        else:
            message["content"] = ""
        read.append(message)
    return read


def _turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """A prompt or completion: text (one turn) or a list of turns."""
    if value is None:
        raise _Skip("empty")
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, where)


def _sharegpt(value: Any) -> list[dict[str, Any]]:
    if value is None:
        raise _Skip("empty")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _Skip(f"error: conversations is {type(value).__name__}, not a list of from/value turns")
    turns = []
    for i, turn in enumerate(value):
        seen = turn.get("from") if isinstance(turn, Mapping) else type(turn).__name__
        if not isinstance(turn, Mapping) or not isinstance(seen, str) or seen not in SHAREGPT_ROLES:
            raise _Skip(f"error: conversations[{i}] has the unknown role {seen!r}")
        turns.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return _messages(turns, "conversations")


def read_row(row: Mapping[str, Any], fmt: RowFormat) -> Conversation:
    """Read one row. A row that cannot be used is returned with ``skip`` set: ``empty`` or ``error: …``."""
    got = fmt.read(row)
    try:
        if fmt.name == "text":
            text = _content(got["text"], "text") if got["text"] is not None else ""
            return Conversation(text=text, skip="" if text.strip() else "empty")
        if fmt.name == "messages":
            messages = _messages(got["messages"])
        elif fmt.name == "prompt":
            messages = _turns(got["prompt"], "user", "prompt") + _turns(got["completion"], "assistant", "completion")
        elif fmt.name == "qa":
            messages = _turns(got["question"], "user", "question") + _turns(got["answer"], "assistant", "answer")
        elif fmt.name == "alpaca":
            question, more = got["instruction"], got.get("input")
            if question is None and got["output"] is None:
                raise _Skip("empty")
            question = _content(question, "instruction")
            if more is not None and (more := _content(more, "input")).strip():
                question = f"{question}\n\n{more}"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _content(got["output"], "output")},
            ]
        else:
            messages = _sharegpt(got["conversations"])
        if system := got.get("system"):
            messages.insert(0, {"role": "system", "content": _content(system, "system")})
        tools = _without_none(got.get("tools")) or None
        if isinstance(tools, str):
            try:
                tools = json.loads(tools) or None
            except json.JSONDecodeError:
                raise _Skip("error: tools is text that is not JSON") from None
    except _Skip as reason:
        return Conversation(skip=str(reason))
    if not any(m["content"].strip() or m.get("tool_calls") for m in messages):
        return Conversation(skip="empty")
    return Conversation(messages=messages, tools=tools)


def rows_of(batch: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Turn a dict of equally long columns into a list of rows."""
    names = list(batch)
    return [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
