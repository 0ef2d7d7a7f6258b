"""The app's page. Only this module imports Gradio, and only the command ``app`` imports this one."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, Literal

import gradio

from ..core.errors import NeuronSelectError
from ..core.text import replaced
from ..explain.fragments import selection_head
from .browse import Browser

MOST_SHOWN = 500
"""Rows of a list that are sent to the page at once."""
_CELLS: dict[str, Literal["number", "str"]] = {
    "place": "number",
    "score": "number",
    "pool_row": "number",
    "source": "str",
    "text": "str",
}
_WIDTHS = {"place": 70, "score": 95, "pool_row": 95, "source": 190, "text": 750}


def page_of(browser: Browser) -> gradio.Blocks:
    """The page, as Gradio's Blocks; the tools are its only public functions."""
    made = browser.selection.provenance
    columns = [name for name in _CELLS if name != "source" or browser.sources]

    def listed(words: str, sources: list[str] | None, low: float | None, high: float | None) -> tuple[Any, str]:
        found = browser.find(words or "", sources or (), low, high)
        lines = [[browser.line(place)[name] for name in columns] for place in found[:MOST_SHOWN]]
        more = f", the first {MOST_SHOWN:,} are listed" if len(found) > MOST_SHOWN else ""
        return (
            lines,
            f"<p>{len(found):,} of {len(browser.score):,} rows{more}, best first. A click on one shows it.</p>",
        )

    def chosen(event: gradio.SelectData) -> tuple[int, str]:
        return number_of(event), text(number_of(event))

    def number_of(event: gradio.SelectData) -> int:
        return int(event.row_value[0])

    def text(place: float | None) -> str:
        return _told(lambda: _whole(browser.text_of(_number(place, "place"))))

    def tell_why(place: float | None) -> str:
        return _told(lambda: browser.explanation(_number(place, "place"))._repr_html_())

    def tell_why_not(number: float | None) -> str:
        return _told(lambda: browser.refusal(_number(number, "pool row"))._repr_html_())

    def tell_contrast(one: float | None, other: float | None) -> str:
        return _told(lambda: browser.difference(_number(one, "place"), _number(other, "place"))._repr_html_())

    private: dict[str, Any] = {"api_visibility": "private"}
    with gradio.Blocks(title=f"{replaced(made.method.name)}: selected rows", analytics_enabled=False) as page:
        gradio.HTML(selection_head(made))
        with gradio.Tab("Selected rows"):
            with gradio.Row():
                words = gradio.Textbox(label="Search", placeholder="words of the text", scale=3)
                sources = gradio.Dropdown(
                    browser.sources, multiselect=True, label="Source", scale=3, visible=bool(browser.sources)
                )
                low = gradio.Number(browser.score.min(), label="Score from", min_width=110)
                high = gradio.Number(browser.score.max(), label="to", min_width=110)
            first, count_said = listed("", [], None, None)
            count = gradio.HTML(count_said)
            table = gradio.Dataframe(
                first, headers=[name.replace("_", " ") for name in columns], datatype=[_CELLS[name] for name in columns],
                interactive=False, max_height=380, show_label=False, type="array",
                column_widths=[_WIDTHS[name] for name in columns],
            )  # fmt: skip
            with gradio.Row():
                place = gradio.Number(0, label="Place (0 is the best)", precision=0, minimum=0, scale=1)
                ask = gradio.Button("Why was it picked?", variant="primary", scale=2)
            whole = gradio.HTML(text(0))
            reasons = gradio.HTML()
        with gradio.Tab("Why not?"):
            near = browser.near()
            with gradio.Row():
                number = gradio.Number(
                    near[0][0] if near else 0, label="Number of a row in the pool", precision=0, minimum=0, scale=1
                )
                ask_not = gradio.Button("Why was it not picked?", variant="primary", scale=2)
            refusal = gradio.HTML()
            gradio.HTML("<p>Just below the cut. A click on one asks why.</p>")
            near_table = gradio.Dataframe(
                [list(one) for one in near], headers=["pool row", "score"], datatype=["number", "number"],
                interactive=False, max_height=300, show_label=False, type="array",
            )  # fmt: skip
        with gradio.Tab("Compare two"):
            with gradio.Row():
                one = gradio.Number(0, label="Place A", precision=0, minimum=0)
                other = gradio.Number(1, label="Place B", precision=0, minimum=0)
                ask_both = gradio.Button("Why does A score higher?", variant="primary", scale=2)
            difference = gradio.HTML()
        for field in (words, sources, low, high):
            field.change(listed, [words, sources, low, high], [table, count], show_progress="hidden",
                         trigger_mode="always_last", **private)  # fmt: skip
        table.select(chosen, None, [place, whole], show_progress="hidden", **private)
        place.change(text, place, whole, show_progress="hidden", **private)
        place.change(lambda: "", None, reasons, show_progress="hidden", **private)
        ask.click(tell_why, place, reasons, **private)
        ask_not.click(tell_why_not, number, refusal, **private)
        near_table.select(number_of, None, number, **private).then(tell_why_not, number, refusal, **private)
        ask_both.click(tell_contrast, [one, other], difference, **private)
        for tool in (browser.about, browser.search, browser.row, browser.why, browser.why_not, browser.contrast):
            gradio.api(tool, api_name=tool.__name__)
    return page


CSS = "footer {display: none !important} .neuronselect-text {white-space: pre-wrap; overflow-wrap: anywhere}"


def theme() -> gradio.themes.Base:
    """Fonts of the reader's own system: Gradio's default ones would be fetched from elsewhere."""
    return gradio.themes.Base(
        primary_hue="orange", neutral_hue="slate",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip


def _told(tell: Callable[[], str]) -> str:
    """What is told, or why it cannot be."""
    try:
        return tell()
    except NeuronSelectError as error:
        return f"<p><b>Not told:</b> {escape(replaced(str(error)))}</p>"


def _number(given: float | None, name: str) -> int:
    if given is None:
        raise NeuronSelectError(f"give the number of a {name}")
    return int(given)


def _whole(text: str) -> str:
    return f'<div class="neuronselect-text" dir="auto">{escape(text)}</div>'
