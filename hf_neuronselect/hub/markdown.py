"""Markdown of cards: text that cannot break out, and a README's own text kept when its card is written again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import NeuronSelectError

README = "README.md"
PLACE = "path/or/id/of/this"  # in a card until it is pushed; then the repository's id
BEGIN, END = "<!-- neuronselect: begin -->", "<!-- neuronselect: end -->"

# The user's own values of these survive when a card is written again.
_USERS_OWN = ("license", "license_name", "license_link", "language", "pretty_name", "extra_gated_prompt")
# Metadata specific to this artifact; always regenerated.
_PACKAGES_OWN = ("configs", "source_datasets", "datasets", "base_model", "model_name", "model-index", "library_name",
                 "pipeline_tag")  # fmt: skip


# Describe the data files, which a selection replaces: those of other rows would make `datasets` refuse them.
_OF_OTHER_ROWS = ("dataset_info",)


# ------------------------------------------------------------------------------------ hostile text
def cell(value: Any) -> str:
    """Escape a value, so that it cannot break a Markdown table or start markup."""
    text = "".join(c for c in " ".join(str(value).split()) if c.isprintable())
    for old, new in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("`", "'"),
        ("[", "\\["),
        ("*", "\\*"),
    ):
        text = text.replace(old, new)
    return text


def fenced(text: str, lines: int = 8, width: int = 200) -> str:
    """Show the first lines of a text in a code fence that the text cannot close; comments are broken up."""
    kept = text.splitlines()[:lines]
    shown = "\n".join(line if len(line) <= width else line[:width] + " …" for line in kept)
    if len(text.splitlines()) > lines:
        shown += "\n…"
    shown = "".join(c for c in shown if c.isprintable() or c in "\n\t").replace("<!--", "<! --")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def facts(pairs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of a two-column table; empty values are left out."""
    return [(cell(name), cell(value)) for name, value in pairs.items() if value not in (None, "", {}, [])]


# ------------------------------------------------------------------------------------ own text kept
def _head_and_body(text: str) -> tuple[dict[str, Any], str]:
    match = re.match(r"\A---\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text
    try:
        head = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as cause:
        raise NeuronSelectError(
            f"its YAML head cannot be read ({' '.join(str(cause).split())[:120]}); mend it or remove it",
            option=README,
        ) from cause
    return (head if isinstance(head, dict) else {}), text[match.end() :]


def check_readme(folder: Path) -> None:
    """Refuse a folder whose README cannot be kept when its card is written, before any work is done for it.

    Raises:
        NeuronSelectError: its YAML head cannot be read, or it is not UTF-8.
    """
    if (folder / README).exists():
        _head_and_body(read_text(folder / README))


def read_text(path: Path) -> str:
    """Read a README.

    Raises:
        NeuronSelectError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise NeuronSelectError("is not UTF-8 text; save it again as UTF-8, or remove it", option=README,
                                value=path.name) from cause  # fmt: skip


def merge_card(existing: str, new: str) -> str:
    """Write a card again: the package's part and metadata are new, the rest stays.

    Args:
        existing: a README that may have its own text, tags and licence. new: a rendered card.

    Raises:
        NeuronSelectError: the existing YAML head cannot be read.
    """
    if BEGIN not in new:  # a metric's README is written by hand
        return new
    old_head, old_body = _head_and_body(existing)
    new_head, new_body = _head_and_body(new)
    before, begin, rest = old_body.partition(BEGIN)
    written, end, after = rest.partition(END)
    if begin and end:  # what the package wrote last time is not the user's
        old_head = _users_metadata(old_head, written)
    head = new_head | {name: old_head[name] for name in _USERS_OWN if old_head.get(name)}
    head |= {name: value for name, value in old_head.items() if name not in (*head, *_OF_OTHER_ROWS)}
    if tags := list(dict.fromkeys([*_as_list(new_head.get("tags")), *_as_list(old_head.get("tags"))])):
        head["tags"] = tags
    ours = new_body[new_body.index(BEGIN) : new_body.index(END) + len(END)]
    if not (before.strip() or after.strip()):  # no text of the user's
        body = new_body
    elif begin and end:
        body = before + ours + after
    else:
        body = f"{old_body.rstrip()}\n\n{ours}\n"
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{body}"


def _users_metadata(head: Mapping[str, Any], written: str) -> dict[str, Any]:
    """The head without the values that the package wrote together with the text ``written``."""
    kept = {name: value for name, value in head.items() if name not in _PACKAGES_OWN}
    if f"states `{cell(head.get('license') or '')}`" in written:
        kept.pop("license", None)
    kept["tags"] = [tag for tag in _as_list(head.get("tags")) if not str(tag).startswith("neuronselect")]
    return {name: value for name, value in kept.items() if value}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
