"""Parts of plain pages: every text of the data is escaped."""

from __future__ import annotations

from html.parser import HTMLParser

from datasets import Dataset
from tiny import chat

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelector
from hf_neuronselect.explain.report import table

EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def tags(html: str) -> set[str]:
    parser = Tags()
    parser.feed(html)
    return set(parser.seen)


def test_a_table_escapes_its_head_and_cells() -> None:
    html = table([EVIL], [[EVIL], [1.5], [3]])
    assert tags(html) == {"table", "tr", "th", "td"} and html.count("&lt;script&gt;") == 2
    assert "<td class=n>1.5</td>" in html and "<td class=n>3</td>" in html


def test_a_hostile_role_is_quoted_as_a_reason_and_escaped(target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    """A row's role reaches the report through the reason why the row was left out."""
    rows = [chat("a question", "an answer"), [{"role": EVIL, "content": "hi"}]]
    pool = Dataset.from_list([{"messages": messages} for messages in rows])
    selection = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, ratio=1.0)
    assert EVIL in selection.provenance.counts.reasons[0]
    html = selection.report()
    assert html.count("<script") == 2  # the page's own: its data and what shows them
    assert "unknown role" in html and "&lt;script&gt;" in html
