"""report.html: one self-contained page about a selection. Every text of the data is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..rows.formats import read_row, row_format

if TYPE_CHECKING:
    from ..selection.selection import Selection

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{border-bottom:1px solid #d8dee4;padding:.35rem .6rem;text-align:left;vertical-align:top}
th{background:#f6f8fa}td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;margin:0;font:13px/1.4 ui-monospace,monospace;overflow-wrap:anywhere}
img{max-width:100%}small{color:#57606a}
"""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; numbers to the right, everything escaped."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            value = f"{value:.4g}"
        number = isinstance(value, int) or str(value).replace(".", "", 1).lstrip("-").isdigit()
        return f"<td{' class=n' if number else ''}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in [header, *rows]
    ]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def page(title: str, *parts: str) -> str:
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def picture(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def excerpt(selection: Selection, i: int, characters: int = 600) -> str:
    """The beginning of a selected row's text."""
    own = [c for c in selection.dataset.column_names if not c.startswith("neuron_") and c != "source_index"]
    settings = (selection.provenance.get("extractor") or {}).get("options") or {}
    fmt = row_format(own, settings.get("row_format", "auto"), dict(settings.get("columns") or []))
    text = read_row(selection.dataset[i], fmt).content()
    return text if len(text) <= characters else text[:characters] + " …"


def selection_report(selection: Selection, rows: int = 20) -> str:
    """Facts, counts and the first ``rows`` rows of a selection as a page; with 0 no text of the data is in it."""
    made = selection.provenance
    budget = ", ".join(f"{name} {value}" for name, value in made["budget"].items())
    facts = [
        ("method", made["method"]["name"]),
        ("targets", ", ".join(made["targets"])),
        ("budget", budget),
        *((f"rows: {name}", value) for name, value in made["counts"].items() if name != "reasons" and value),
        *((f"mean tokens: {name.removesuffix('_mean')}", value) for name, value in made["tokens"].items() if value),
    ]
    shown = [
        (row["neuron_rank"], f"{row['neuron_score']:.4f}", row["source_index"])
        for row in selection.dataset.select(range(min(rows, len(selection))))
    ]
    body = "".join(
        f"<tr><td class=n>{rank}</td><td class=n>{score}</td><td class=n>{index}</td>"
        f"<td><pre>{escape(excerpt(selection, i))}</pre></td></tr>"
        for i, (rank, score, index) in enumerate(shown)
    )
    head = "<tr><th>rank</th><th>score</th><th>row</th><th>text</th></tr>"
    reasons = made["counts"]["reasons"]
    notes = f"<h2>Rows left out</h2>{table(['why'], [[r] for r in reasons])}" if reasons else ""
    return page(
        f"{len(selection)} rows selected by {made['method']['name']}",
        table(["", ""], facts),
        notes,
        f"<h2>The first rows</h2><table>{head}{body}</table>" if shown else "",
    )
