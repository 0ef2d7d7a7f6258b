"""Why rows on a report have their scores: the parts of a score, and the text with how much each token adds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.text import replaced
from ..rows.formats import Conversation
from ..signals.heat import TokenValues
from .explanation import Part
from .spots import BYTES

MOST_TOKENS, MOST_BYTES = 800, 14_000
"""Tokens of a row that are shown, and bytes that they take in the page, at most."""
LEVELS = 6
"""Shades of a token."""
AS_READ = "as the model reads it"
"""Role of a text that is not written in the model's input as it is in the data."""
# Characters that find a text which was cut off, at most and at least; that may follow the last text of a row.
_PROBE, _LEAST, _CLOSE = 24, 3, 64
_WORDS = re.compile(r"\w+|\W+")


@dataclass(frozen=True)
class Heat:
    """A row's text in pieces, a token or a few each, and what each adds to its score.

    Attributes:
        turns: a role, and the pieces of what it says.
        values: float64 ``[pieces]``, of all turns in their order. parts: float64 ``[pieces, parts]``, of single parts.
        outside: share of what all tokens add, signs aside, that is on tokens of no turn: a chat template's, or not shown.
        whole: whether every turn is shown to its end.
    """

    turns: tuple[tuple[str, tuple[str, ...]], ...]
    values: np.ndarray
    parts: np.ndarray
    outside: float
    whole: bool


@dataclass(frozen=True)
class Reasons:
    """Why a row has its score for a target.

    Attributes:
        says: in words and numbers. parts: those that are told; a fact ``usual`` is the share of an average row of the pool.
        of: how many parts there are.
        heat: None where tokens say nothing, or cannot be read.
    """

    target: str
    says: str
    parts: tuple[Part, ...] = ()
    of: int = 0
    heat: Heat | None = None


# -------------------------------------------------------------------------------------------- texts
def turns_of(said: Conversation) -> list[tuple[str, str]]:
    """Role and text of each turn; a turn's reasoning and its calls of tools as turns of their own."""
    if said.text is not None:
        return [("text", said.text)]
    turns = []
    for one in said.messages:
        role = str(one["role"])
        if thought := one.get("reasoning_content"):
            turns.append((f"{role}, reasoning", str(thought)))
        calls = one.get("tool_calls")
        if one["content"] or not calls:
            turns.append((role, str(one["content"])))
        if calls:
            turns.append((f"{role}, calls", json.dumps(calls, ensure_ascii=False, sort_keys=True, default=str)))
    return turns


def pieces_of(decode: Callable[[Sequence[int]], str], ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Tokens as texts that make up the whole text when they are joined; parts of a character stay together.

    Returns:
        int64 ``[pieces]``, the first token of each piece; and their texts.
    """
    starts, texts = [], []
    before, at = slice(0, 0), 0
    while at < len(ids):
        ahead = decode(ids[before].tolist())
        for size in range(1, min(BYTES, len(ids) - at) + 1):
            # With the piece before it: some tokenizers drop a space where a text begins.
            both = decode(ids[before.start : at + size].tolist())
            text = both[len(ahead) :] if both.startswith(ahead) else decode(ids[at : at + size].tolist())
            if "\ufffd" not in text:
                break
        else:  # no whole character: damaged text stays as it is
            size, text = 1, decode([int(ids[at])])
        starts.append(at)
        texts.append(text)
        before, at = slice(at, at + size), at + size
    return np.asarray(starts, np.int64), texts


def spans_of(text: str, parts: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the parts of a row are in the text that the model reads; the last ones may be cut off, or missing.

    None: they are written otherwise there.
    """
    spans, at, cut = [], 0, False
    for part in (one.strip() for one in parts):
        start = -1 if cut else text.find(part, at)
        if start >= 0:
            spans.append((start, start + len(part)))
        elif cut:
            spans.append((len(text), len(text)))
        else:
            start = text.find(part[:_PROBE], at)
            ending = next((n for n in range(_PROBE, _LEAST - 1, -1) if text[at:].endswith(part[:n])), 0)
            if start >= 0 and part.startswith(text[start:]):
                spans.append((start, len(text)))
            elif ending:
                spans.append((len(text) - min(ending, len(part)), len(text)))
            elif len(text) - at <= _CLOSE:
                spans.append((len(text), len(text)))
            else:
                return None
            cut = True
        at = spans[-1][1]
    return spans


# --------------------------------------------------------------------------------------------- heat
def heat_of(decode: Callable[[Sequence[int]], str], tokens: TokenValues, said: Conversation) -> Heat:
    """A row's text with what its tokens add.

    Args:
        decode: token ids to text. tokens: ``values`` have a column for the score, and one for each part.
    """
    every = np.zeros((len(tokens.input_ids), tokens.values.shape[1]))
    every[tokens.places] = tokens.values
    starts, texts = pieces_of(decode, tokens.input_ids[:MOST_TOKENS])
    added = np.add.reduceat(every[:MOST_TOKENS], starts, axis=0) if len(starts) else every[:0]
    text, turns = "".join(texts), turns_of(said)
    spans = spans_of(text, [one for _, one in turns])
    if spans is None:
        turns, spans = [(AS_READ, text)], [(0, len(text))]
    ends = np.cumsum([len(one) for one in texts])
    shown: list[tuple[str, tuple[str, ...]]] = []
    order: list[int] = []
    room = MOST_BYTES
    for (role, _), (first, last) in zip(turns, spans, strict=True):
        pieces: list[str] = []
        for i in range(int(np.searchsorted(ends, first, side="right")), len(texts)):
            begin = int(ends[i]) - len(texts[i])
            piece = texts[i][max(0, first - begin) : last - begin] if begin < last else ""
            room -= 4 + len(json.dumps(piece)) if piece else 0
            if begin >= last or room < 0:
                break
            if piece:
                pieces.append(piece)
                order.append(i)
        if pieces or first < len(text):
            shown.append((role, tuple(pieces)))
    total = float(np.abs(every[:, 0]).sum())
    inside = float(np.abs(added[sorted(set(order)), 0]).sum()) if order else 0.0
    return Heat(
        tuple(shown), added[order, 0], added[order, 1:], 1 - inside / total if total else 0.0,
        whole=room >= 0 and len(tokens.input_ids) <= MOST_TOKENS
        and all(last - first == len(one.strip()) for (_, one), (first, last) in zip(turns, spans, strict=True)),
    )  # fmt: skip


def word_heat(said: Conversation, amounts: Mapping[str, float]) -> Heat:
    """A row's text with what its words add, an equal part of it wherever a word is found.

    Args:
        amounts: lower-case word -> what it adds to the score.
    """
    turns, count, left = [], dict[str, int](), MOST_BYTES
    for role, text in turns_of(said):
        pieces = []
        for found in _WORDS.finditer(text[: 2 * MOST_BYTES]):
            left -= 4 + len(json.dumps(found[0]))
            if left < 0:
                break
            pieces.append(found[0])
            if (word := found[0].casefold()) in amounts:
                count[word] = count.get(word, 0) + 1
        turns.append((role, tuple(pieces)))
    words = [piece.casefold() for _, pieces in turns for piece in pieces]
    values = np.asarray([amounts[word] / count[word] if word in count else 0.0 for word in words])
    total = sum(map(abs, amounts.values()))
    inside = sum(abs(amounts[word]) for word in count)
    return Heat(tuple(turns), values, np.zeros((len(words), 0)), 1 - inside / total if total else 0.0, whole=left >= 0)


# ----------------------------------------------------------------------------------------- the page
def reasons_data(found: Reasons, roles: dict[str, int]) -> dict[str, Any]:
    """Reasons as a page's script reads them, safe to show.

    Args:
        roles: role -> its number, to which new roles are added.
    """
    heat = found.heat
    parts = []
    for i, part in enumerate(found.parts):
        own = heat is not None and heat.parts.shape[1] > i
        parts.append({
            "name": replaced(str(part.label) if part.label else part.name)[:160],
            "unit": replaced(part.name)[:60] if part.label else "", "made": replaced(part.label.made) if part.label else "",
            "share": _rounded(part.share), "rarity": None if part.rarity is None else _rounded(part.rarity),
            "usual": None if part.usual is None else _rounded(part.usual), "levels": levels_of(heat.parts[:, i]) if heat is not None and own else "",
        })  # fmt: skip
    data: dict[str, Any] = {"target": found.target, "says": replaced(found.says)[:600], "parts": parts, "of": found.of}
    if heat is not None:
        data["turns"] = [
            [roles.setdefault(replaced(role)[:40], len(roles)), [replaced(one) for one in pieces]]
            for role, pieces in heat.turns
        ]
        data |= {"levels": levels_of(heat.values), "outside": _rounded(heat.outside), "whole": heat.whole}
    return data


def levels_of(values: np.ndarray) -> str:
    """A shade for each piece: ``0`` to ``6`` for what raises a score, ``a`` to ``f`` for what lowers it.

    Shades grow as the value's power of 1.5: where nearly every token adds something, those that add most are seen.
    """
    most = float(np.abs(values).max(initial=0.0))
    if not most or not np.isfinite(most):
        return "0" * len(values)
    steps = np.rint(np.sign(values) * (np.abs(values) / most) ** 1.5 * LEVELS).astype(int)
    return "".join(str(step) if step >= 0 else "abcdef"[-step - 1] for step in steps.tolist())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
