"""Pieces of HTML for notebooks and the app: no script, no style sheet, no background, so that they suit light and dark.

Every text is escaped. Dollar signs stay dollar signs where a notebook typesets formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..core.provenance import Provenance, aim
from ..core.text import replaced
from ..hub.cards import source_name
from .report import percent
from .spots import Spot, one_line

if TYPE_CHECKING:
    from .explanation import Contrast, Explanation, Part, WhyNot
    from .labels import Label

UP, DOWN = "213,94,0", "0,114,178"
"""What raises a score, and what lowers it: red, green, blue."""
_EVERY = "vertical-align:top;padding:.2em 1em .2em 0;border:0;border-bottom:1px solid rgba(128,128,128,.3)"
_CELL = f"text-align:left;white-space:normal;min-width:7em;{_EVERY}"
_NUMBER = f"text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;{_EVERY}"
_QUIET = "opacity:.75"


def selection_head(made: Provenance) -> str:
    """A selection in a sentence, and what speaks against it."""
    counts, paper = made.counts, f" ({made.method.paper})" if made.method.paper else ""
    model = source_name(made.extractor.model) if made.extractor else ""
    inside = f" inside {'the bundled model' if model == 'bundled' else model}" if model else ""
    goal = f" for {aim(made.targets, made.avoided)}" if made.targets else ""
    said = (
        f"<p><b>{counts.selected:,} of {counts.rows:,} rows{_safe(goal)}</b>, picked from "
        f"{_safe(made.pool.id or 'a pool in memory')} by {_safe(made.method.name + paper + inside)}.</p>"
    )
    doubts = "".join(f"<li><b>{_safe(of)}</b>: {_safe(doubt)}</li>" for of, doubt in made.doubts)
    return f"{said}Before you use these rows:<ul>{doubts}</ul>" if doubts else said


def selection_fragment(made: Provenance, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A selection in a sentence, what speaks against it, and its first rows.

    Args:
        head: names of the columns. rows: their cells; the last one of each is a text of the data.
    """
    parts = [selection_head(made), _table(head, [[*map(_safe, row[:-1]), _words(row[-1])] for row in rows])]
    first = f"The first {len(rows)}, best first. " if len(rows) < made.counts.selected else "Best first. "
    parts.append(
        f'<p style="{_QUIET}">{first}<code>.explain(0)</code> says why a row was picked, <code>.why_not(ROW)</code> why '
        "another was not, <code>.plot.scores()</code> where they lie in the pool.</p>"
    )
    return _fragment(parts)


def explanation_fragment(found: Explanation) -> str:
    """Why a row has its score: the parts, and the tokens they come from, the stronger the deeper in colour."""
    place = "" if found.place is None else f", place {found.place} of the selection"
    parts = [
        f"<p><b>Row {found.row} of the pool{place}</b>: score {found.score:.4g} for {_safe(found.target)} by "
        f"{_safe(found.method)}</p><p>{_words(one_line(found.text, 300))}</p><p>Its score: {_safe(found.says)}.</p>"
    ]
    if found.parts:
        most = max(abs(part.share) for part in found.parts) or 1.0
        parts.append(_table([*found.heads, "what it reads"], [_part_cells(part, most) for part in found.parts]))
        if left := found.of - len(found.parts):
            rest = percent(1 - sum(part.share for part in found.parts))
            parts.append(f'<p style="{_QUIET}">and {left:,} more, {rest} of the sum</p>')
    if found.moved:
        most = max(abs(spot.value) for spot in found.moved) or 1.0
        rows = [[f"{spot.value:+.4g}", _marked(spot, spot.value / most)] for spot in found.moved]
        parts.append(_table(["moved the score by", "token"], rows))
    return _fragment([*parts, _notes(found.notes)])


def contrast_fragment(found: Contrast) -> str:
    """Why one row scores higher than another, part by part."""
    rows = [
        [letter, f"{one.row}", f"{one.score:.4g}", _words(one_line(one.text, 200)), _safe(f"{one.says}.")]
        for letter, one in (("A", found.one), ("B", found.other))
    ]
    parts = [_table(["", "pool row", "score", "text", "its score"], rows)]
    if found.parts:
        most = max(abs(a - b) for _, a, b in found.parts) or 1.0
        told = [
            [_safe(name), f"{a:.4g}", f"{b:.4g}", _bar((a - b) / most, f"{a - b:+.4g}"), _label(found.labels, name)]
            for name, a, b in found.parts
        ]
        parts.append(_table(["adds to the score", "A", "B", "A - B", "label"], told))
    return _fragment([*parts, _notes(found.notes)])


def why_not_fragment(found: WhyNot) -> str:
    """Why a row of the pool was not selected."""
    first, *more = found.says
    parts = [f"<p><b>Row {found.row} of the pool</b>: {_safe(first)}.</p>", *(f"<p>{_safe(one)}.</p>" for one in more)]
    if found.contrast is not None:
        parts.append(f"<p>The last row selected is A, this one B:</p>{contrast_fragment(found.contrast)}")
    return _fragment(parts)


# ----------------------------------------------------------------------------------------------- parts
def _part_cells(part: Part, most: float) -> list[str]:
    share, *numbers = part.cells()[1:]
    read = [_words(f"label ({part.label.made}): {part.label}")] if part.label else []
    strongest = max((spot.value for spot in part.tokens), default=0.0) or 1.0
    read += [_marked(spot, spot.value / strongest) for spot in part.tokens]
    read += [f'<span style="{_QUIET}">row {spot.row}:</span> {_marked(spot, 0.5)}' for spot in part.elsewhere]
    return [_safe(part.name), _bar(part.share / most, share), *map(_safe, numbers), "<br>".join(read)]


def _label(labels: Mapping[str, Label], name: str) -> str:
    return _words(f"{labels[name]} ({labels[name].made})") if name in labels else ""


def _marked(spot: Spot, strength: float) -> str:
    """A token in its context; ``strength`` from -1 to 1 is its colour."""
    before, token, after = (escape(piece) for piece in spot.pieces)
    shade = f"rgba({UP if strength >= 0 else DOWN},{0.15 + 0.45 * min(1.0, abs(strength)):.2f})"
    mark = f'<mark style="background:{shade};color:inherit;border-radius:.2em;padding:0 .1em">{token}</mark>'
    return f'<span style="white-space:pre-wrap;overflow-wrap:anywhere" dir="auto">{before.lstrip()}{mark}{after}</span>'


def _bar(share: float, said: str) -> str:
    """A number above a bar of its size, at most 6 letters wide."""
    colour, width = f"rgb({UP if share >= 0 else DOWN})", 6 * min(1.0, abs(share))
    return f'{_safe(said)}<div style="height:.3em;width:{width:.2f}em;background:{colour};margin-left:auto"></div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML; a column is one of numbers where its first cell begins with one."""
    first = rows[0] if rows else [""] * len(head)
    styles = [_NUMBER if _begins_with_a_number(cell) else _CELL for cell in first]

    def line(kind: str, cells: Sequence[str]) -> str:
        found = (f'<{kind} style="{style}">{cell}</{kind}>' for style, cell in zip(styles, cells, strict=True))
        return f'<tr style="border:0">{"".join(found)}</tr>'

    body = "".join(line("td", row) for row in rows)
    top = line("th", [*map(_safe, head)])
    whole = f'<table style="border-collapse:collapse;border:0"><thead>{top}</thead><tbody>{body}</tbody></table>'
    return f'<div style="overflow-x:auto">{whole}</div>'


def _begins_with_a_number(cell: str) -> bool:
    try:
        float(cell.partition("<")[0].removesuffix("%").replace(",", ""))
    except ValueError:
        return False
    return True


def _words(text: str) -> str:
    """A text of the data, in its own direction."""
    return f'<span dir="auto" style="overflow-wrap:anywhere">{_safe(text)}</span>'


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p style="{_QUIET}">Note: {_safe(note)}.</p>' for note in notes)


def _safe(text: str) -> str:
    return escape(replaced(text))


def _fragment(parts: Sequence[str]) -> str:
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'
