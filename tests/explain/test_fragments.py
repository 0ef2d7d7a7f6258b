"""What notebooks show of a selection and of explanations: its numbers, plain tags, and texts of the data as texts."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from datasets import Dataset
from reports import EVIL
from tiny import chat

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelector, Selection
from hf_neuronselect.explain.explanation import Contrast, Explanation, Part, WhyNot
from hf_neuronselect.explain.fragments import selection_fragment
from hf_neuronselect.explain.labels import Label
from hf_neuronselect.explain.spots import Spot

TAGS = {"div", "p", "b", "ul", "li", "code", "span", "mark", "br", "table", "thead", "tbody", "tr", "th", "td"}
HOSTILE = f"{EVIL}\x1b[31m\u202e & $x$ مرحبا"


class Read(HTMLParser):
    """The words, cells and shades of a fragment, of which every tag and attribute is a harmless one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.rows, self.open = "", list[list[str]](), list[str]()
        self.feed(html)
        assert not self.open, "every tag is closed"
        assert html.startswith('<div class="tex2jax_ignore mathjax_ignore">'), "dollars are no formulas"
        assert not re.search("[\x00-\x08\x1b\u202e]", html)
        self.shades = re.findall(r"<mark style=\"background:rgba\((.*?)\)", html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS and {name for name, _ in attrs} <= {"style", "class", "dir"}, (tag, attrs)
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if "tr" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def selection(target: Dataset, extractor: NeuronFeatureExtractor) -> Selection:
    pool = Dataset.from_list([{"messages": chat(f"{HOSTILE} {i}", "yes"), "source": HOSTILE} for i in range(12)])
    return NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=7)


def test_a_selection_shows_its_first_rows(selection: Selection) -> None:
    found = Read(selection._repr_html_())
    assert "7 of 12 rows for t, picked from a pool in memory by mona (arXiv:2503.15573) inside" in found.words
    assert found.rows[0] == ["score", "pool row", "source", "text"] and len(found.rows) == 6
    for i, (score, number, source, text) in enumerate(found.rows[1:]):
        assert (score, number) == (f"{selection.dataset['neuron_score'][i]:.4g}", str(selection.indices[i]))
        assert text.startswith("user: </script><script>alert(1)") and source.startswith("</script>")
    assert "The first 5, best first." in found.words


def test_what_speaks_against_a_selection_is_shown(selection: Selection) -> None:
    made = selection.provenance
    doubtful = replace(made, targets={"t": replace(made.targets["t"], doubts=(EVIL,))})
    assert f"Before you use these rows:t: {EVIL}" in Read(selection_fragment(doubtful, ["text"], [["x"]])).words


def test_few_rows_without_sources(target: Dataset, extractor: NeuronFeatureExtractor, pool: Dataset) -> None:
    bare = pool.select_columns(["messages"])
    found = Read(NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(bare, k=2)._repr_html_())
    assert found.rows[0] == ["score", "pool row", "text"] and len(found.rows) == 3
    assert "Best first." in found.words and "The first" not in found.words


def explanation(**more: object) -> Explanation:
    label = Label((EVIL,), (), (), 0.75, 0.1, 0.1)
    strong, weak = Spot("a\n", EVIL, "b", 4.0), Spot("", "weak", "", 1.0)
    elsewhere = Spot("", "else", "", 9.0, row=8)
    parts = (
        Part("feature 3", "feature", 3, 2.0, 0.5, {"value": 1.5}, label, 0.25, None, (strong, weak), (elsewhere,)),
        Part("feature 4", "feature", 4, -1.0, -0.25, {"value": 0.5}, None, 0.5),
    )
    given = {"method": "mona", "target": EVIL, "row": 7, "place": 0, "score": 0.5, "text": HOSTILE, "says": "half",
             "parts": parts, "of": 5, "notes": (EVIL,)}  # fmt: skip
    return Explanation(**given | more)  # type: ignore[arg-type]


def test_an_explanation_shows_its_parts_and_tokens() -> None:
    found = Read(explanation()._repr_html_())
    assert found.rows[0] == ["feature", "share", "value", "pool rows with it", "what it reads"]
    assert [row[:4] for row in found.rows[1:]] == [
        ["feature 3", "50.0%", "1.5", "25.0%"],
        ["feature 4", "-25.0%", "0.5", "50.0%"],
    ]
    read = found.rows[1][4]
    assert f"a⏎{EVIL[:48]}b" in read and "row 8: else" in read and f"AUC 0.75): “{EVIL}”" in read
    assert found.shades == ["213,94,0,0.60", "213,94,0,0.26", "213,94,0,0.38"]
    assert "and 3 more, 75.0% of the sum" in found.words and f"Note: {EVIL}." in found.words
    moved = Read(explanation(parts=(), moved=(Spot("", "up", "", 2.0), Spot("", "down", "", -1.0)))._repr_html_())
    assert moved.rows[1:] == [["+2", "up"], ["-1", "down"]]
    assert moved.shades == ["213,94,0,0.60", "0,114,178,0.38"]


def test_a_contrast_and_a_why_not_show_theirs() -> None:
    one, other = explanation(parts=()), explanation(parts=(), row=9, score=0.25, notes=("another",))
    label = Label(("word",), (), (), 0.75, 0.1, 0.1)
    contrast = Contrast(one, other, (("feature 3", 0.5, 0.25), (EVIL, 0.0, 0.5)), {"feature 3": label})
    found = Read(contrast._repr_html_())
    assert [row[:3] for row in found.rows[1:3]] == [["A", "7", "0.5"], ["B", "9", "0.25"]]
    assert found.rows[4:] == [
        ["feature 3", "0.5", "0.25", "+0.25", "“word” (made by a machine, AUC 0.75)"],
        [EVIL, "0", "0.5", "-0.5", ""],
    ]
    assert f"Note: {EVIL}.Note: another." in found.words
    why = WhyNot(9, "below", 0.25, 3, 0.5, 2, ("its score is below the cut", EVIL), contrast)
    told = Read(why._repr_html_())
    assert "Row 9 of the pool: its score is below the cut." in told.words and f"{EVIL}." in told.words
    assert told.rows == found.rows
    assert Read(replace(why, contrast=None)._repr_html_()).rows == []


def test_a_real_explanation_is_shown(selection: Selection) -> None:
    why = selection.explain(0)
    found = Read(why._repr_html_())
    assert [row[0] for row in found.rows[1:]] == [part.name for part in why.parts]
    assert why.says in found.words and found.shades
    assert Read(selection.contrast(0, 3)._repr_html_()).rows
    left = next(i for i in range(12) if i not in selection.indices)
    assert f"Row {left} of the pool" in Read(selection.why_not(left)._repr_html_()).words
