"""The report in a real browser: Chromium, where it and playwright are installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import EVIL, report

from hf_neuronselect.explain.explanation import Part
from hf_neuronselect.explain.page_data import Report, ReportRow
from hf_neuronselect.explain.pool_map import PoolMap
from hf_neuronselect.explain.profile import Panel, Profile
from hf_neuronselect.explain.reasons import Reasons, heat_of
from hf_neuronselect.explain.selection_page import selection_page
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.signals.heat import TokenValues


class Shown:
    """A report's page in a window, with everything that it said, asked and loaded."""

    def __init__(self, browser: Any, folder: Path, made: Report, *, before: str = "", **options: Any) -> None:
        path = folder / "report.html"
        path.write_text(selection_page(made), encoding="utf-8")
        self.window = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        self.page = self.window.new_page()
        self.said: list[str] = []
        self.loaded: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.loaded.append(request.url))
        if before:
            self.page.add_init_script(before)
        self.page.goto(path.as_uri())

    def column(self, name: str) -> list[str]:
        """Texts of a column of the table, from the top."""
        return self.page.evaluate(
            """(name) => [...document.querySelectorAll("#view .row")]
                .sort((a, b) => a.getAttribute("aria-rowindex") - b.getAttribute("aria-rowindex"))
                .map((row) => row.querySelector("." + name).textContent)""",
            name,
        )

    def found(self, words: str) -> str:
        self.page.fill("#search", words)
        self.page.wait_for_timeout(250)
        return self.page.text_content("#found")


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    windows: list[Shown] = []

    def shown(made: Report, **options: Any) -> Shown:
        windows.append(Shown(browser, tmp_path, made, **options))
        return windows[-1]

    yield shown
    for one in windows:
        assert not one.said, one.said
        assert not [url for url in one.loaded if not url.startswith(("file:", "data:"))], one.loaded
        one.window.close()


def many(rows: int, total: int | None = None) -> Report:
    """Picks whose texts, sources and lengths are known by their numbers."""
    made = report(picks=rows, total=total or rows + 10)
    said = [
        Conversation(
            [{"role": "user", "content": f"question number{i}"}, {"role": "assistant", "content": "yes\n" * 40}]
        )
        for i in range(rows)
    ]
    return replace(
        made, picks=[ReportRow(i, one, f"source {i % 3}") for i, one in enumerate(said)], sources={"source 0": rows}
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_and_fits(show: Any, width: int) -> None:
    shown = show(many(30), viewport={"width": width, "height": 800})
    page = shown.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".card").count() == 6 and len(shown.column("place")) >= 8
    page.click("#more")
    assert page.locator("#cards .card").count() == 18
    first = page.locator("#cards .card").first
    assert "number0" in first.text_content()
    button = first.locator("button")
    assert button.text_content() == "Show all" and first.locator("p").nth(1).bounding_box()["height"] < 200
    button.click()
    assert button.get_attribute("aria-expanded") == "true" and first.locator("p").nth(1).bounding_box()["height"] > 500
    pictures = page.locator("svg[role=img]")
    assert pictures.count() >= 4 and all(one.get_attribute("aria-label") for one in pictures.all())
    assert page.locator("#pictures svg:visible").count() == 1


def test_search_filter_and_sort(show: Any) -> None:
    made = many(300)
    shown = show(made)
    page = shown.page
    assert page.text_content("#found") == "300 rows"
    assert shown.found("QUESTION number12") == "11 of 300 rows"  # 12 and 120 to 129
    assert shown.column("place")[:3] == ["13", "121", "122"]
    page.select_option("#of-source select", label="source 0")
    assert page.text_content("#found") == "5 of 300 rows"  # 12, 120, 123, 126, 129
    assert shown.found("") == "100 of 300 rows"
    page.select_option("#of-source select", label="all")
    page.select_option("#sort", "tokens")
    tokens = np.sort(made.table.n_tokens[made.table.picked])[::-1].tolist()
    assert list(map(int, shown.column("tokens"))) == tokens[: len(shown.column("tokens"))]
    page.click("#head .tokens button")
    assert list(map(int, shown.column("tokens"))) == tokens[::-1][: len(shown.column("tokens"))]
    assert page.get_attribute("#head .tokens", "aria-sort") == "ascending"
    page.click("#head .place button")
    assert shown.column("place")[:3] == ["1", "2", "3"]
    assert page.get_attribute("#head .place", "aria-sort") == "ascending"
    assert shown.found("no such words") == "0 of 300 rows" and not shown.column("place")


@pytest.mark.parametrize(("place", "found"), [(0, 30), (1, 10), (2, 10), (3, 10)])
def test_sources_whose_names_are_empty_or_have_spaces(show: Any, place: int, found: int) -> None:
    made = many(30)
    names = ["", " two  spaces ", "plain"]
    shown = show(replace(made, picks=[replace(one, source=names[i % 3]) for i, one in enumerate(made.picks)]))
    shown.page.select_option("#of-source select", index=1)
    shown.page.select_option("#of-source select", index=place)
    assert shown.page.text_content("#found") == ("30 rows" if found == 30 else f"{found} of 30 rows")


def test_keys(show: Any) -> None:
    # A reader may have the search in use before the page is done: the row's window must not ask for the focus then.
    early = "addEventListener('DOMContentLoaded', () => document.querySelector('#search').focus())"
    page = show(many(300), before=early).page
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search" and page.input_value("#search") == ""
    page.focus("#view")
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    dialog = page.locator("#one")
    assert dialog.get_attribute("open") is not None and "number1" in dialog.text_content()
    assert page.evaluate("document.activeElement.textContent") == "Close"
    page.keyboard.press("ArrowRight")
    assert "number2" in dialog.text_content() and "3 of 300" in dialog.text_content()
    page.keyboard.press("Escape")
    assert dialog.get_attribute("open") is None
    page.focus("#view")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert "number299" in dialog.text_content() and page.is_disabled("#next")
    page.locator("#one button", has_text="Close").click()
    assert dialog.get_attribute("open") is None


@pytest.mark.parametrize("before", ["", "delete Navigator.prototype.clipboard"])
def test_the_command_is_copied(show: Any, before: str) -> None:
    shown = show(many(5), before=before)
    page = shown.page
    if not before:
        shown.window.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    page.wait_for_function("document.getElementById('copy').textContent === 'Copied'")
    page.focus("#search")
    page.keyboard.press("Control+V")
    assert page.input_value("#search").split() == page.text_content("#command").split() != []


def test_hostile_texts_stay_texts(show: Any) -> None:
    made = report(text=EVIL, sources={EVIL: 3}, pool_sources={EVIL: 9})
    made = replace(made, picks=[replace(one, source=EVIL) for one in made.picks],
                   near=[ReportRow(7, Conversation(text=EVIL + "\u05d0\u05d1"))], pool_at_hand=True)  # fmt: skip
    shown = show(made)
    page = shown.page
    assert page.locator("#cards p").first.text_content() == EVIL
    page.locator("#view .row").first.click()
    assert page.locator("#one p").first.text_content() == EVIL
    assert EVIL in page.text_content("#near-rows")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_no_other_script_runs(show: Any) -> None:
    shown = show(many(3))
    shown.page.evaluate(
        """() => { const one = document.createElement("script"); one.textContent = "document.title = 'run'";
                   document.body.append(one);
                   const sheet = document.createElement("style"); sheet.textContent = "h1{display:none}";
                   document.body.append(sheet); }"""
    )
    assert shown.page.title() != "run" and shown.page.locator("h1").is_visible()
    assert len(shown.said) == 2 and all("Content Security Policy" in one for one in shown.said)
    shown.said.clear()


def test_ten_thousand_rows_scroll(show: Any) -> None:
    shown = show(many(10_000))
    page = shown.page
    assert page.text_content("#found") == "10,000 rows"
    slowest = page.evaluate(
        """async () => {
            const view = document.getElementById("view"), times = [];
            for (let i = 0; i < 60; i++) {
                view.scrollTop += 3517;
                const start = performance.now();
                await new Promise(requestAnimationFrame);
                await new Promise(requestAnimationFrame);
                times.push(performance.now() - start);
                if (view.querySelectorAll(".row").length > 60) throw new Error("too many rows in the page");
            }
            return times.sort((a, b) => a - b)[30];
        }"""
    )
    assert slowest < 200  # the median of two frames, on a busy machine
    page.evaluate("document.getElementById('view').scrollTop = 1e9")
    page.wait_for_timeout(200)
    assert shown.column("place")[-1] == "10,000"
    assert shown.found("number9999") == "1 of 10,000 rows" and shown.column("place") == ["10,000"]


def test_without_texts(show: Any) -> None:
    made = replace(report(picks=40, total=90, text=""), examples=False)
    shown = show(made)
    assert shown.page.locator("#search").count() == 0 and shown.page.locator(".card").count() == 0
    assert shown.column("place")[:2] == ["1", "2"]
    shown.page.locator("#view .row").first.click()
    assert "without texts of the data" in shown.page.text_content("#one")


def test_several_targets(show: Any) -> None:
    made = many(60, 200)
    table = replace(made.table, targets={"a": made.table.score, "b": made.table.score[::-1].copy()})
    shown = show(replace(made, table=table))
    page = shown.page
    assert page.locator("#pictures figure:visible").count() == 1
    page.locator(".tabs button", has_text="b").click()
    assert "Scores for b" in page.locator("#pictures figure:visible").text_content()
    page.select_option("#of-target select", label="a")
    assert set(shown.column("best")) == {"a"} and page.text_content("#found") == "60 rows"
    page.select_option("#of-target select", label="b")
    assert page.text_content("#found") == "0 of 60 rows"


def test_reasons_and_shades(show: Any) -> None:
    made = many(30, 60)
    said = [one.said for one in made.picks[:2]]
    reasons = {}
    for row, one in enumerate([*said, said[0]]):
        text = f"<s>user\n{one.messages[0]['content']}\n<s>assistant\n{one.messages[1]['content']}"
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        values = np.zeros((len(ids), 2))
        values[text.index("question"), 0] = values[text.index("number"), 1] = 1.0
        values[text.index("yes"), 0] = -0.5
        heat = heat_of(lambda ids: bytes(ids).decode(), TokenValues(ids, np.arange(len(ids)), values), one)
        parts = tuple(Part(f"feature {i}", "feature", i, 1.0, 0.5 / (i + 1), {}) for i in range(2))
        reasons[row if row < 2 else 40] = Reasons("t", f"{EVIL} says {row}", parts, 7, heat)
    shown = show(replace(made, reasons=reasons, near=[ReportRow(40, said[0])], pool_at_hand=True))
    page = shown.page
    first = page.locator("#cards .card").first

    def shaded() -> list[str]:
        every = first.locator(".turn span[class^=h]")
        return every.evaluate_all("all => all.map((one) => one.textContent + one.className)")

    assert shaded() == ["qh6", "yhb"] and f"{EVIL} says 0." in first.text_content()
    press = first.locator("button.part")
    assert press.count() == 1 and "50 %" in press.text_content() and "and 5 more parts" in first.text_content()
    press.focus()
    page.keyboard.press("Enter")
    assert press.get_attribute("aria-pressed") == "true" and shaded() == ["nh6"]
    press.click()
    assert press.get_attribute("aria-pressed") == "false" and shaded() == ["qh6", "yhb"]
    assert page.locator("#near-cards .card").count() == 1 and "not picked" in page.text_content("#near-cards")
    assert page.locator("#cards .card").nth(2).locator(".why").count() == 0
    assert "underlined lowers" in page.text_content("#best") and page.locator("img").count() == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_the_map_is_read_by_pointer_and_keys(show: Any, width: int) -> None:
    made = many(30, 60)
    places = np.asarray([[i % 8, i // 8] for i in range(60)], dtype=float)
    found = PoolMap("mona", np.arange(60), places, np.arange(60) < 30, {"t": np.asarray([[6.5, 0.5]])}, (0.25, 0.125))
    texts = {i: f"{EVIL} text {i}" for i in range(60)}
    panel = Panel("hidden", False, np.arange(4), np.ones((3, 4), np.float32), np.zeros((5, 4), np.float32), 0.5)
    shown = show(replace(made, map=found, map_texts=texts, exemplar_texts={"t": [EVIL]}, profile=Profile((panel,))),
                 viewport={"width": width, "height": 800})  # fmt: skip
    page = shown.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plane = page.locator("#plane svg")
    assert not page.locator("#plane .ring").is_visible()  # until a row is pointed at
    plane.scroll_into_view_if_needed()
    box = plane.bounding_box()
    x, y = next(
        (one[0], one[1])
        for one in page.evaluate("JSON.parse(document.getElementById('data').textContent).map")
        if one[2] == 19
    )
    page.mouse.move(box["x"] + x * box["width"] / 1000, box["y"] + y * box["height"] / 620)
    assert f"{EVIL} text 19" in page.text_content("#here") and "a pick · row 19 · place 20" in page.text_content(
        "#here"
    )
    assert page.locator("#plane .ring").is_visible()
    page.focus("#plane")
    for key, row in (("ArrowRight", 20), ("ArrowUp", 28), ("ArrowLeft", 27), ("ArrowDown", 19)):
        page.keyboard.press(key)
        assert f"text {row}" in page.text_content("#here"), key
    assert page.locator("#profile svg image").count() == 2 and page.locator("#profile svg:visible").count() == 1
    assert page.locator("img").count() == 0 and "38% of the pool's variance" in page.text_content("#map")


def test_dark_and_on_paper(show: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        shown = show(many(20), color_scheme=scheme)
        colours.append(shown.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]
    shown.page.emulate_media(media="print", color_scheme="light")
    assert not shown.page.locator("#table").is_visible() and shown.page.locator(".on-paper").is_visible()
