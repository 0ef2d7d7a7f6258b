"""Turns of a conversation, however they are written, as messages: roles, texts, calls of tools."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np

ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Other names of roles, as ShareGPT data has them."""
_CALLING = {"function_call", "tool_call"}
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
RESULTS = "\n</tool_response>\n<tool_response>\n"
"""LLaMA-Factory's separator between the results of simultaneous calls."""


class Skipped(Exception):
    """Raised for a row that cannot be used; the text is the reason."""


def as_text(value: Any) -> str | None:
    """A single value as text, numbers as JSON writes them; None for lists, mappings and missing values."""
    if isinstance(value, str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return str(value) if isinstance(value, (date, time, Decimal)) else None


def read_text(value: Any, where: str) -> str:
    if (text := as_text(value)) is not None:
        return text
    if isinstance(value, Sequence):
        texts = []
        for part in value:
            if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise Skipped(f"error: {where} holds a part of type {kind!r}; only text parts are read")
        return "\n".join(texts)
    raise Skipped(f"error: {where} is {type(value).__name__}, not text")


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _without_none(value: Any) -> Any:
    """Drop keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_messages(value: Any, where: str = "messages") -> list[dict[str, Any]]:
    """Turns of ``role``/``content`` or of ``from``/``value``, as a list or its JSON text."""
    if is_missing(value):
        raise Skipped("empty")
    if isinstance(value, str):
        turns = _json(value)
        value = turns if isinstance(turns, list) else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Skipped(f"error: {where} is {type(value).__name__}, not a list of role/content or from/value turns")
    return [message for i, turn in enumerate(value) for message in _turn(turn, f"{where}[{i}]")]


def _turn(turn: Any, where: str) -> list[dict[str, Any]]:
    """One turn as a message; several results of tools that were joined, as one each."""
    if not isinstance(turn, Mapping):
        raise Skipped(f"error: {where} is {type(turn).__name__}, not a turn with a role and content")
    # Arrow fills keys that only other rows have with None; a chat template would treat them as set.
    message = _without_none(turn)
    sharegpt = "role" not in message
    seen = message.pop("from", None) if sharegpt else message["role"]
    speaker = seen.strip().lower() if isinstance(seen, str) else ""
    role = SPEAKERS.get(speaker, speaker)
    if role not in ROLES:
        raise Skipped(f"error: {where} has the unknown role {seen!r}")
    value = message.pop("value", None) if "content" not in message else message["content"]
    calls = message.pop("tool_calls", None) or []
    if speaker in _CALLING and isinstance(value, str) and not calls:
        value, calls = _called(value)
    content = "" if value is None and calls else read_text(value, f"{where}.content")
    if sharegpt:  # other keys of such turns say how they were made
        message = {key: one for key, one in message.items() if key in ("reasoning_content", "name", "tool_call_id")}
        message = {"role": role, "content": content, **message}
    else:
        message = {**message, "role": role, "content": content}
    if calls:
        message["tool_calls"] = _calls(calls)
    if sharegpt and role == "tool":
        return [message | {"content": part} for part in content.split(RESULTS)]
    return [message]


def _called(value: str) -> tuple[str, list[Any]]:
    """Text and calls of a turn that is ``function_call``: calls as JSON, beside text within ``<tool_call>``."""
    if marked := _CALL.findall(value):
        text, written = _CALL.sub("", value), marked
    else:
        thought = _THOUGHT.match(value)
        text = thought[0] if thought else ""
        written = [value[len(text) :]]
    calls: list[Any] = []
    for one in written:
        read = _json(one)
        calls += read if isinstance(read, list) else [read]
    known = all(isinstance(call, Mapping) and (call.get("name") or call.get("function")) for call in calls)
    return (text, calls) if calls and known else (value, [])


def _calls(calls: Any) -> list[Any]:
    """Tool calls as chat templates take them: a function with its arguments as an object."""
    if isinstance(calls, str):
        calls = _json(calls)
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise Skipped(f"error: tool_calls is {type(calls).__name__}, not a list")
    read = []
    for call in calls:
        if isinstance(call, Mapping) and "function" not in call and "name" in call:
            inner = {key: call[key] for key in ("name", "arguments") if key in call}
            rest = {key: value for key, value in call.items() if key not in inner}
            call = {"type": "function", **rest, "function": inner}
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            call = {**call, "function": _with_object(call["function"], "arguments")}
        read.append(call)
    return read


def _with_object(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A function whose ``key`` is an object although it was written as JSON text."""
    if isinstance(text := function.get(key), str) and isinstance(read := _json(text), dict):
        return {**function, key: read}
    return dict(function)


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a row, as a list or its JSON text; None if there are none."""
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Skipped("error: tools is text that is not JSON") from None
    value = [value] if isinstance(value, Mapping) else _without_none(value)
    if value is not None and not isinstance(value, list):
        raise Skipped(f"error: tools is {type(value).__name__}, not a list")
    tools = []
    for tool in value or ():
        tool = _json(tool) if isinstance(tool, str) else tool
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
            tool = {**tool, "function": _with_object(tool["function"], "parameters")}
        if tool is not None:
            tools.append(tool)
    return tools or None


def _json(text: str) -> Any:
    """The value of a JSON text; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """A prompt or completion: text (one turn) or a list of turns."""
    if is_missing(value):
        raise Skipped("empty")
    if (text := as_text(value)) is not None:
        return [{"role": role, "content": text}]
    return read_messages(value, where)
