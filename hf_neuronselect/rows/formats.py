r"""Read rows of any instruction format as messages.

Formats, detected from the column names or named by the user:

========== =============================================== =========================================
format      columns                                         becomes
========== =============================================== =========================================
messages    ``messages`` [``tools``]                        unchanged
prompt      ``prompt``, ``completion`` [``tools``]          strings: one user and one assistant turn
alpaca      ``instruction``, ``output`` [``input``,         ``instruction\n\ninput`` as the user turn
            ``system``]
sharegpt    ``conversations`` [``system``, ``tools``]        roles renamed, calls of tools read
qa          ``question``, ``answer``                        one user and one assistant turn
text        ``text``                                        tokenised unchanged, without turns (choice)
========== =============================================== =========================================

Turns have ``role`` and ``content`` or ``from`` and ``value``, whatever the format; capitals in a role do not matter.
Numbers, dates and booleans in the place of a text are read as text.

A row that cannot be read is never dropped: its :class:`Conversation` has the reason in ``skip``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import NeuronSelectError, NeuronSelectWarning, unknown
from .turns import Skipped, is_missing, read_messages, read_text, read_tools, read_turns

Row = dict[str, Any]
"""A row of a dataset: column -> value."""
PICK_COLUMNS = ("neuron_score", "neuron_rank", "source_index")
"""Columns that a selection adds to its rows."""


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
TEXTS = frozenset(
    column
    for parts in (_REQUIRED, _OPTIONAL)
    for columns in parts.values()
    for column in columns
    if column not in ("messages", "conversations", "tools")
)
"""Columns of the formats whose values are texts (some may be lists of turns, too)."""


def row_format(
    columns: Iterable[str],
    name: str = "auto",
    renames: Mapping[str, str] | None = None,
    rows: str = "the data",
) -> RowFormat:
    """The format of rows with these columns.

    Args:
        columns: column names of the data.
        name: a format's name, or ``auto``: the first format whose required columns are all present.
        renames: a format's column -> the data's column, e.g. ``{"instruction": "question"}``.
        rows: what an error calls the data.

    Raises:
        NeuronSelectError: unknown format, or a required column is missing.
    """
    columns, renames = list(columns), dict(renames or {})
    if name != "auto" and name not in _REQUIRED:
        raise unknown("row format", name, [*_REQUIRED, "auto"], "row_format")
    if absent := [theirs for theirs in renames.values() if theirs not in columns]:
        raise NeuronSelectError(
            f"no such column; {rows} has {', '.join(columns) or 'none'}", option="columns", value=absent[0]
        )
    for candidate, required in _REQUIRED.items():
        names = {ours: renames.get(ours, ours) for ours in (*required, *_OPTIONAL[candidate])}
        if name in ("auto", candidate) and all(names[ours] in columns for ours in required):
            present = tuple((ours, theirs) for ours, theirs in names.items() if theirs in columns)
            return RowFormat(candidate, present)
    wanted = "; ".join(f"{f}: {', '.join(c)}" for f, c in _REQUIRED.items() if name in ("auto", f))
    raise NeuronSelectError(
        f"columns missing: {rows} has {', '.join(columns) or 'none'}, but it needs one of ({wanted}); "
        "rename them, or say which is which: --columns question=prompt,answer=reply, "
        "in Python columns={'question': 'prompt', 'answer': 'reply'}",
        option="row_format",
        value=name,
    )


@dataclass(frozen=True)
class Conversation:
    """One row: ``messages`` (with ``tools``), or plain ``text``, or the reason it was skipped in ``skip``."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] | None = None
    text: str | None = None
    skip: str = ""

    def content(self) -> str:
        """All turns in one string, roles included."""
        if self.text is not None:
            return self.text
        extra = [{k: m[k] for k in ("tool_calls", "reasoning_content") if k in m} for m in self.messages]
        return "\n".join(
            f"{m['role']}: {m['content']}" + (json.dumps(more, sort_keys=True, default=str) if more else "")
            for m, more in zip(self.messages, extra, strict=True)
        )

    def words(self) -> str:
        """The texts of all turns in one string, without their roles; calls of tools as JSON."""
        if self.text is not None:
            return self.text
        parts = []
        for turn in self.messages:
            parts.append(turn["content"])
            if calls := turn.get("tool_calls"):
                parts.append(json.dumps(calls, sort_keys=True, ensure_ascii=False, default=str))
        return "\n".join(part for part in parts if part)

    def exact(self) -> str:
        """Everything that a chat template can print. Rows that are equal in it are duplicates."""
        if self.text is not None:
            return self.text
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False, default=str)

    def questions(self) -> list[str]:
        """The user turns."""
        return [m["content"] for m in self.messages if m["role"] == "user"]


def read_row(row: Mapping[str, Any], fmt: RowFormat) -> Conversation:
    """Read one row. A row that cannot be used is returned with ``skip`` set: ``empty`` or ``error: …``."""
    got = fmt.read(row)
    try:
        if fmt.name == "text":
            text = "" if is_missing(got["text"]) else read_text(got["text"], "text")
            return Conversation(text=text, skip="" if text.strip() else "empty")
        if fmt.name in ("messages", "sharegpt"):
            where = fmt.columns[0][0]
            messages = read_messages(got[where], where)
        elif fmt.name == "prompt":
            messages = read_turns(got["prompt"], "user", "prompt") + read_turns(
                got["completion"], "assistant", "completion"
            )
        elif fmt.name == "qa":
            messages = read_turns(got["question"], "user", "question") + read_turns(
                got["answer"], "assistant", "answer"
            )
        else:
            messages = _alpaca(got)
        system = got.get("system")
        if not is_missing(system) and system != "":
            messages.insert(0, {"role": "system", "content": read_text(system, "system")})
        tools = read_tools(got.get("tools"))
    except Skipped as reason:
        return Conversation(skip=str(reason))
    if not any(m["content"].strip() or m.get("tool_calls") for m in messages):
        return Conversation(skip="empty")
    return Conversation(messages=messages, tools=tools)


def _alpaca(got: Mapping[str, Any]) -> list[dict[str, Any]]:
    if is_missing(got["instruction"]) and is_missing(got["output"]):
        raise Skipped("empty")
    question, more = read_text(got["instruction"], "instruction"), got.get("input")
    if not is_missing(more) and (more := read_text(more, "input")).strip():
        question = f"{question}\n\n{more}"
    answer = read_text(got["output"], "output")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows_of(batch: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Turn a dict of equally long columns into a list of rows."""
    names = list(batch)
    return [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def selection_columns(names: Iterable[str]) -> list[str]:
    """Which of the columns an earlier selection added: its scores, ranks and numbers, and turns that came after them.

    An export keeps only ``source_index``; that is warned of, since the column may be the user's own.
    """
    names = list(names)
    ours = [name for name in names if name in PICK_COLUMNS or name.startswith("neuron_score_")]
    if set(PICK_COLUMNS) <= set(ours):
        return ours + [name for name in names[names.index("source_index") :] if name == "messages"]
    if ours != ["source_index"]:
        return []
    warnings.warn(
        "the column source_index, as of an earlier selection, is left out, since a new one counts the rows of this "
        "pool; rename it to keep it",
        NeuronSelectWarning,
        stacklevel=3,
    )
    return ours
