"""Text from data, models and names, made safe to show: it rings no bell, moves no cursor, turns no line around."""

from __future__ import annotations

import re

# Control characters, line separators, what changes the direction of text, half surrogates. Joiners and other invisible
# characters stay: Persian, Indic scripts, Thai and emoji need them.
_HOSTILE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]")


def shown(text: object, *, lines: bool = False) -> str:
    r"""Text for a terminal: hostile characters become escapes such as ``\x1b``.

    Args:
        lines: keep line ends and tabs, as of a table.
    """

    def escape(found: re.Match[str]) -> str:
        if lines and found[0] in "\n\t":
            return found[0]
        return found[0].encode("unicode_escape").decode()

    return _HOSTILE.sub(escape, str(text))


def replaced(text: str) -> str:
    """Text for a page or a card: hostile characters become U+FFFD; line ends and tabs stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _HOSTILE.sub(lambda found: found[0] if found[0] in "\n\t" else "\ufffd", text)
