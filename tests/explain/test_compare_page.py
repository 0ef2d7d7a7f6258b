"""The page of a comparison: in a real browser, where one is installed, and with hostile texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import EVIL

from hf_neuronselect.explain.charts import NARROW, WIDE, in_both_widths
from hf_neuronselect.explain.compare_charts import Point, dot_chart, heat_map, upset_plot
from hf_neuronselect.explain.compare_page import ComparePage, Figure, Part, Section, Table, compare_page

NAMES = ("first", "second", "third")
VALUES = np.asarray([[1.0, 0.25, 0.0], [0.25, 1.0, 0.5], [0.0, 0.5, 1.0]])


def page(evil: str = "") -> ComparePage:
    """A page with every kind of part."""
    points = [Point(f"nait{evil}", 0.5, 0.4, 0.6, marks=(0.3, 0.7)), Point("random", 0.1, control=True)]
    figures = [
        Figure("Precision.", "said", in_both_widths(partial(dot_chart, points, 0.1, "precision", f"alt {evil}")), "dots"),
        Figure("Overlap.", evil, in_both_widths(partial(heat_map, NAMES, NAMES, VALUES, 1.0, "heat")), "heat"),
    ]  # fmt: skip
    sets = [(("first", "third"), 5), (("second",), 3)]
    upset = Figure("Sets.", "", in_both_widths(partial(upset_plot, NAMES, (5, 3, 5), sets, "sets")))
    rows = [("b", "10", "x"), (f"a{evil}", "9.5", "y"), ("c", "", "z"), ("d", "1,000", "w")]
    part = Part(f"a part{evil}", figures=figures, tables=[Table(("name", "number", "word"), rows, (2,))],
                texts=[(f"row 3{evil}", evil or "a text")])  # fmt: skip
    return ComparePage(
        f"nait{evil}", "is first", f"lead {evil}", [("pool", f"9 rows{evil}")], [f"warned {evil}"], figures[:1],
        [("what", "1.0", evil)], [Section("targets", "Targets", evil, [part, Part("sets", figures=[upset])])],
        f"neuronselect compare \\\n    --pool '{evil}'",
    )  # fmt: skip


def test_numbers_are_where_they_belong() -> None:
    svg = dot_chart([Point("a", 0.5, 0.25, 1.0), Point("b", 0.0, control=True)], 0.5, "x", "alt", WIDE)
    (dot,) = re.findall(r'<circle class="picks" cx="([\d.]+)"', svg)
    (span,) = re.findall(r'class="span picks" d="M([\d.]+) [\d.]+H([\d.]+)"', svg)
    (base,) = re.findall(r'class="cut" d="M([\d.]+)', svg)
    (square,) = re.findall(r'<rect class="chance" x="([\d.]+)"', svg)
    left, right = WIDE * 0.26, WIDE - 50
    assert float(dot) == float(base) == pytest.approx((left + right) / 2, abs=0.1)
    assert [float(x) for x in span] == pytest.approx([left + (right - left) / 4, right], abs=0.1)
    assert float(square) == pytest.approx(left - 5, abs=0.1)
    cells = re.findall(r"<title>(\w+), (\w+): ([-\d.]+)</title><rect class=\"(\w+)\" fill-opacity=\"([\d.]+)\"",
                       heat_map(NAMES, NAMES, -VALUES, 1.0, "alt", NARROW))  # fmt: skip
    for i, one in enumerate(NAMES):
        for k, other in enumerate(NAMES):
            (found,) = (cell for cell in cells if cell[:2] == (one, other))
            assert -float(found[2]) == VALUES[i, k]
            assert found[3] == ("picks" if VALUES[i, k] else "chance")
            assert float(found[4]) == pytest.approx(0.6 * VALUES[i, k])
    assert "NaN" not in heat_map(["a"], ["b"], np.asarray([[np.nan]]), 1.0, "alt", WIDE)
    bars = re.findall(r'height="([\d.]+)"', upset_plot(NAMES, (5, 3, 5), [(("first",), 4), (("second",), 1)], "", WIDE))
    assert float(bars[0]) == pytest.approx(4 * float(bars[1]))
    assert upset_plot(NAMES, (0, 0, 0), [], "none", NARROW).count("<rect") == 0


def test_texts_are_escaped_and_steer_nothing() -> None:
    html = compare_page(page(f"{EVIL}\x1b[31m\u202e"))
    assert "<img" not in html and html.count("<script>") == 1 and "&lt;img" in html
    assert "\x1b" not in html and "\u202e" not in html and "://" not in html
    assert not re.search(r"\sstyle=|\son\w+=\"", re.sub(r"&[^;]+;", "", html))


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    windows: list[Any] = []
    said: list[str] = []
    loaded: list[str] = []

    def shown(made: ComparePage, **options: Any) -> Any:
        path = tmp_path / "compare.html"
        path.write_text(compare_page(made), encoding="utf-8")
        windows.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        window = windows[-1].new_page()
        window.on("console", lambda message: said.append(message.text))
        window.on("pageerror", lambda error: said.append(str(error)))
        window.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        window.on("request", lambda request: loaded.append(request.url))
        window.goto(path.as_uri())
        return window

    yield shown
    assert not said, said
    assert not [url for url in loaded if not url.startswith(("file:", "data:"))], loaded
    for one in windows:
        one.close()


def column(window: Any, i: int) -> list[str]:
    return window.evaluate("(i) => [...document.querySelectorAll('table tbody tr')].map((row) => row.cells[i].textContent)", i)  # fmt: skip


@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_and_fits(show: Any, width: int) -> None:
    window = show(page(), viewport={"width": width, "height": 800})
    assert window.evaluate("document.documentElement.scrollWidth") == width
    pictures = window.locator("svg[role=img]")
    assert pictures.count() == 8 and all(one.get_attribute("aria-label") for one in pictures.all())
    assert window.locator("header h1").text_content() == "nait is first"
    assert window.evaluate("new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size") == window.locator("[id]").count()  # fmt: skip


def test_tables_are_sorted_with_the_keyboard(show: Any) -> None:
    window = show(page())
    number = window.locator("thead button", has_text="number")
    number.focus()
    window.keyboard.press("Enter")
    assert column(window, 1) == ["1,000", "10", "9.5", ""]
    assert window.locator("thead th").nth(1).get_attribute("aria-sort") == "descending"
    window.keyboard.press("Enter")
    assert column(window, 1) == ["9.5", "10", "1,000", ""]
    window.locator("thead button", has_text="word").click()
    assert column(window, 2) == ["w", "x", "y", "z"]
    assert window.locator("thead th").nth(1).get_attribute("aria-sort") is None


def test_pictures_in_one_place_and_the_command(show: Any) -> None:
    window = show(page())
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    box = window.locator("main .pictures").first
    assert box.locator("figure:visible").count() == 1 and "Precision" in box.locator("figure:visible").text_content()
    box.locator("button", has_text="heat").click()
    assert "Overlap" in box.locator("figure:visible").text_content()
    window.click("#copy")
    window.wait_for_function("document.getElementById('copy').textContent === 'Copied'")
    assert window.evaluate("navigator.clipboard.readText()") == window.text_content("#command")
    window.emulate_media(media="print")
    assert box.locator("figure:visible").count() == 2 and not window.locator("#copy").is_visible()


def test_hostile_texts_stay_texts(show: Any) -> None:
    window = show(page(EVIL))
    assert window.locator("blockquote p").text_content() == EVIL
    assert window.locator("img").count() == 0 and window.locator("script").count() == 1
    assert EVIL in window.text_content("h1") and EVIL in window.text_content("#command")


def test_long_names_fit_a_phone(show: Any) -> None:
    made = page("x" * 300)
    window = show(
        replace(made, figures=[*made.figures, replace(made.figures[0], tab="y" * 300)]),
        viewport={"width": 390, "height": 800},
    )
    assert window.evaluate("document.documentElement.scrollWidth") == 390


def test_dark(show: Any) -> None:
    colours = [show(page(), color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor") for scheme in ("light", "dark")]  # fmt: skip
    assert colours[0] != colours[1]
