"""Tokens of a row in their context, as people read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.text import shown
from ..signals.heat import TokenValues

BEFORE, AFTER = 8, 4
"""Tokens of context."""
BYTES = 4
"""Tokens that one character takes at the most."""
MOST = 48
"""Characters of context on either side; a token may be as long."""


@dataclass(frozen=True)
class Spot:
    """A token with the text around it.

    Attributes:
        value: what it adds, or how strongly a feature fires on it. row: the row's number in the pool, where it is another one.
    """

    before: str
    token: str
    after: str
    value: float
    row: int | None = None

    @property
    def pieces(self) -> tuple[str, str, str]:
        """What is before it, the token, what is after it: on one line, cut, and safe for a terminal."""
        return _flat(self.before)[-MOST:], _flat(self.token)[:MOST], _flat(self.after)[:MOST]

    def __str__(self) -> str:
        """On one line, the token in brackets."""
        before, token, after = self.pieces
        return f"{before}[{token}]{after}"


def _flat(text: str) -> str:
    """On one line: line ends and tabs become marks, hostile characters escapes."""
    return shown(text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥"))


def one_line(text: str, characters: int = 90) -> str:
    """The beginning of a text on one line, safe for a terminal."""
    found = " ".join(text[: 8 * characters].split())
    cut = shown(found[:characters])
    return cut if len(found) <= characters and len(text) <= 8 * characters else f"{cut} …"


def spots_of(
    decode: Callable[[Sequence[int]], str], tokens: TokenValues, column: int, *, top: int = 3, row: int | None = None
) -> tuple[Spot, ...]:
    """The tokens with the largest values of a column, largest first, each word once; those that add nothing are left out.

    Args:
        decode: token ids to text. row: the row's number, if it is to be told.
    """
    values, found = tokens.values[:, column], dict[str, Spot]()
    for place in np.argsort(-values, kind="stable").tolist():
        if len(found) == top or values[place] <= 0:
            break
        spot = spot_at(decode, tokens.input_ids, int(tokens.places[place]), float(values[place]))
        found.setdefault(spot.token.strip().casefold(), replace(spot, row=row))
    return tuple(found.values())


def spot_at(
    decode: Callable[[Sequence[int]], str], ids: np.ndarray, at: int, value: float, *,
    around: tuple[int, int] = (BEFORE, AFTER),
) -> Spot:  # fmt: skip
    """A token in its context, ``around`` tokens; parts of a character are shown with the tokens that complete it."""
    spans = [
        (start, start + size)
        for size in range(1, BYTES + 1)
        for start in range(max(0, at - size + 1), at + 1)
        if start + size <= len(ids)
    ]
    # The fewest tokens that make whole characters; else the token itself.
    start, end = next((span for span in spans if "\ufffd" not in decode(ids[slice(*span)].tolist())), (at, at + 1))
    token = decode(ids[start:end].tolist())
    before = decode(ids[max(0, start - around[0]) : start].tolist()).replace("\ufffd", "")
    after = decode(ids[end : end + around[1]].tolist()).replace("\ufffd", "")
    return Spot(before, token, after, value)
