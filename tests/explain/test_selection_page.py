"""The report's page: its facts are those of the record, its policy allows only itself, texts of the data stay texts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from reports import EVIL, report
from tiny import chat

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelector
from hf_neuronselect.core.provenance import Avoided, SourceRecord, TargetRecord
from hf_neuronselect.core.text import replaced
from hf_neuronselect.explain import page_data
from hf_neuronselect.explain import selection_page as made_by
from hf_neuronselect.explain.charts import cut_of, edges_of, top_shares
from hf_neuronselect.explain.page_data import MOST_ROWS, embedded
from hf_neuronselect.explain.selection_page import selection_page
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.selection.selection import Selection


class Page(HTMLParser):
    """Texts of the scripts and the style of a page, its policy, its tags, and everything else in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.inside, self.policy, self.tags, self.loads = "", "", set[str](), list[str]()
        self.parts: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.parts[""] = self.parts.get("", "") + " "
        self.inside = f"{tag} {given.get('type', '')}".strip() if tag in ("script", "style") else ""
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self.loads += [str(given[name]) for name in ("src", "href", "action", "data", "srcset") if name in given]
        assert "style" not in given and not [name for name in given if name.startswith("on")], (tag, given)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.parts[self.inside] = self.parts.get(self.inside, "") + data

    @property
    def data(self) -> dict:
        return json.loads(self.parts["script application/json"])


def small(target: Dataset, extractor: NeuronFeatureExtractor, texts: list[str], k: int = 4, **more) -> Selection:
    pool = Dataset.from_list([{"messages": chat(text, f"answer {i}"), "source": f"s{i % 2}"}
                              for i, text in enumerate(texts)])  # fmt: skip
    return NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=k, **more)


def test_facts_of_the_page_are_those_of_the_record() -> None:
    found = report()
    html = selection_page(found)
    page = Page(html)
    words = re.sub(r"\s+", " ", page.parts[""])
    for fact in ("3 of 10 rows for t", "Picked from me/pool by mona (arXiv:1), for 8 exemplars of t.", "made 2030-01-02",
                 "in 12 s", "62%", "by chance: 5%", "30.0%", "2 equal to an earlier row", "row 3: a bad role",
                 "me/pool", "--pool me/pool@" + "0" * 40, "--k 3"):  # fmt: skip
        assert fact in words, fact
    score, picked = found.table.score, found.table.picked
    gain = (score[picked].mean() - score.mean()) / score.std()
    assert f"{gain:+.2f}" in words and f"random: 0 ± {np.sqrt(7 / 9 / 3):.2f}" in words
    tokens = found.table.n_tokens
    assert f"{tokens[picked].mean():,.0f}" in words and f"random: {tokens.mean():,.0f} ±" in words
    data = page.data
    assert [one[0] for one in data["picks"]] == [0, 1, 2] and data["sources"] == ["source 0", "source 1", "source 2"]
    assert data["picks"][1][1] == pytest.approx(score[1], rel=1e-5) and data["picks"][1][2] == tokens[1]
    assert data["roles"] == ["user", "assistant"] and data["picks"][0][6] == [[0, "a question"], [1, "an answer"]]
    assert data["cut"] == pytest.approx(score[2], rel=1e-5) and data["spread"] == pytest.approx(score.std(), rel=1e-5)


def test_the_error_of_a_random_draw_is_that_of_many_draws() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    means = [np.random.default_rng(i).choice(values, 24, replace=False).mean() for i in range(4000)]
    assert made_by._shortfall(60, 24) * values.std() == pytest.approx(np.std(means), rel=0.05)
    assert made_by._shortfall(60, 60) == 0


def test_the_policy_allows_the_page_s_own_style_and_script_alone() -> None:
    page = Page(selection_page(report()))
    digest = {name: base64.b64encode(hashlib.sha256(page.parts[name].encode()).digest()).decode() for name in
              ("style", "script")}  # fmt: skip
    assert page.policy == (
        f"default-src 'none'; style-src 'sha256-{digest['style']}'; script-src 'sha256-{digest['script']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert not [one for one in page.loads if not one.startswith(("#", "data:"))]


@pytest.mark.parametrize("examples", [True, False])
def test_hostile_texts_are_data(examples: bool) -> None:
    text = EVIL + "\u2028\x1b[31m\u202eevil\0\ud800"
    found = report(text=text, examples=examples, sources={EVIL: 3}, pool_sources={EVIL: 9, "b": 1})
    found = replace(found, picks=[replace(one, source=EVIL, said=one.said if examples else None)
                                  for one in found.picks])  # fmt: skip
    hostile = replace(found.made, method=replace(found.made.method, paper=EVIL), pool=SourceRecord(id=EVIL),
                      counts=replace(found.made.counts, reasons=(EVIL,)))  # fmt: skip
    html = selection_page(replace(found, made=hostile))
    page = Page(html)
    assert html == replaced(html) and "img" not in page.tags and html.count("<script") == 2
    if examples:
        assert page.data["picks"][0][6][0][1] == replaced(text) and page.data["sources"] == [replaced(EVIL)[:80]]
    assert json.loads(embedded(EVIL + "\u2028&")) == EVIL + "\u2028&" and not set("<>&\u2028") & set(embedded(EVIL))


def test_without_examples_no_text_of_the_data(target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    texts = [f"word{i} question{i}" for i in range(12)]
    selection = small(target, extractor, texts)
    full, bare = selection.report(), selection.report(examples=False)
    shown = Page(full).data
    assert [one[0] for one in shown["picks"]] == selection.indices.tolist()
    assert all(texts[one[0]] == one[6][0][1] for one in shown["picks"])
    assert all(texts[one[0]] == one[3][0][1] for one in shown["near"]) and len(shown["near"]) == 8
    assert not re.findall(r"word\d|answer \d|s[01]\b", "".join(Page(bare).parts[name] for name in ("", "script application/json")))  # fmt: skip
    data = Page(bare).data
    assert [one[:3] for one in data["picks"]] == [one[:3] for one in shown["picks"]]
    assert not data["sources"] and not any(one[6] for one in data["picks"]) and not any(one[3] for one in data["near"])


def test_near_misses_and_sources_of_a_selection_read_from_disk(
    target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    selection = small(target, extractor, [f"question {i}" for i in range(30)])
    here = Page(selection.report())
    order = np.lexsort((np.arange(30), -np.asarray(selection.scores["score"])))
    rest = [int(i) for i in order if i not in selection.indices]
    assert [one[0] for one in here.data["near"]] == rest[:20]
    assert "of the pool." in here.parts[""] and "was not at hand" not in here.parts[""]
    selection.save_pretrained(tmp_path / "s")
    again = Page(Selection.from_pretrained(tmp_path / "s").report())
    assert again.data["picks"] == here.data["picks"]
    assert [one[:3] for one in again.data["near"]] == [one[:3] for one in here.data["near"]]
    assert not any(one[3] for one in again.data["near"]) and again.parts[""].count("was not at hand") == 2


def test_a_large_selection_fits_in_a_page() -> None:
    for text in ("word " * 200_000, "<&>" * 2_000, "漢字" * 2_000):
        html = selection_page(report(picks=10_000, total=12_000, text=text))
        assert len(html.encode()) < 5_000_000, len(html.encode())
    data = Page(html).data
    assert len(data["picks"]) == 10_000 and all(len(one[6][0][1]) > 10 for one in data["picks"])
    left = data["picks"][9_999]
    assert left[7] == 4_000 - len(left[6][0][1]) > 0
    page = Page(selection_page(report(picks=MOST_ROWS + 5, total=MOST_ROWS + 9, text=text)))
    assert len(page.data["picks"]) == MOST_ROWS and f"The first {MOST_ROWS:,} of {MOST_ROWS + 5:,}" in page.parts[""]


def test_a_text_is_cut_to_its_bytes_in_the_page() -> None:
    for text in ("a" * 50, "<" * 50, "漢" * 50, 'a"\\' * 20, ""):
        for most in (0, 1, 7, 20, 1000):
            kept = page_data._fitting(text, most)
            assert text.startswith(kept) and len(embedded(kept).encode()) - 2 <= most
    turns, left, taken = page_data._cut(Conversation([{"role": "user", "content": "abc"}] * 40), 1000, {})
    assert len(turns) == 12 and left == 28 * 3 and taken == 36
    assert page_data._cut(Conversation(text="a\r\nb\r\nc"), 1000, {})[:2] == ([[0, "a\nb\nc"]], 0)


def test_several_targets_have_their_columns(target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    pool = Dataset.from_list([{"messages": chat(f"question {i}", "yes " * i)} for i in range(1, 30)])
    other = Dataset.from_list([{"messages": chat("yes yes", "yes yes yes")}])
    selector = NeuronSelector("mona").fit({"t": target, "other": other}, extractor=extractor)
    selection = selector.select(pool, k=6)
    page = Page(selection.report())
    data, scores = page.data, selection.scores
    assert data["targets"] == ["t", "other"] and page.parts[""].count("Scores for ") == 2
    columns = [np.asarray(scores[f"score_{name}"]) for name in data["targets"]]
    for row, _, _, _, best, of_targets, *_ in data["picks"]:
        assert of_targets == pytest.approx([one[row] for one in columns], rel=1e-5)
        places = [(one <= one[row]).sum() for one in columns]
        assert best == int(np.argmax(places))
    assert "the target that gains least" in page.parts[""]


@pytest.mark.parametrize("targets", [1, 2])
def test_a_stream(targets: int, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    pool = Dataset.from_list([{"messages": chat(f"question {i}", "yes " * i)} for i in range(1, 30)])
    other = Dataset.from_list([{"messages": chat("yes yes", "yes yes yes")}])
    selector = NeuronSelector("mona").fit({"t": target, "o": other} if targets == 2 else target, extractor=extractor)
    selection = selector.select(pool.to_iterable_dataset(), k=6)
    page = Page(selection.report())
    assert page.parts[""].count("Scores ") == targets and "nan" not in page.parts[""].lower()
    assert [one[1] for one in page.data["picks"]] == pytest.approx(list(selection.dataset["neuron_score"]), rel=1e-5)
    assert len(page.data["near"]) == (0 if targets == 2 else 20)
    assert ("keeps no score" in page.parts[""]) == (targets == 2)


def test_pools_without_a_picture(target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    """Constant scores, all rows picked, no tokens: the page says less, and nothing wrong."""
    flat = replace(report().table, score=np.ones(10), n_tokens=np.full(10, -1))
    page = Page(selection_page(replace(report(), table=flat)))
    assert "Scores of the pool" not in page.parts[""] and "nan" not in page.parts[""].lower()
    assert "tokens were not counted" in page.parts[""] and page.data["spread"] == 0
    page = Page(selection_page(report(picks=10)))
    assert "None: every row that could be picked was picked." in page.parts[""] and "cut " not in page.parts[""]
    for method in ("full", "random"):
        pool = Dataset.from_list([{"messages": chat(f"question {i}", "yes " * i)} for i in range(1, 9)])
        made = NeuronSelector(method).select(pool, **({} if method == "full" else {"k": 2}))
        assert "nan" not in re.sub(r"\w*nan\w+|\w+nan\w*", "", Page(made.report()).parts[""].lower())


def test_the_cut_is_where_one_score_parts_the_rows() -> None:
    score = np.asarray([3.0, 2.0, 2.0, 1.0])
    assert cut_of(score, np.asarray([True, True, False, False])) == 2.0
    assert cut_of(score, np.asarray([True, False, False, True])) is None
    assert cut_of(score, np.ones(4, dtype=bool)) is None and cut_of(score, np.zeros(4, dtype=bool)) is None


@pytest.mark.parametrize("seed", range(20))
def test_bars_end_at_the_cut(seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=900) * 10.0 ** (seed % 5 - 2)
    cut = float(np.sort(scores)[-60])
    edges = edges_of(scores, 56, cut)
    assert (
        cut in edges and edges[0] <= scores.min() and edges[-1] >= scores.max() * (1 - 1e-12) and 56 <= len(edges) <= 59
    )
    assert np.histogram(scores, edges)[0][edges[:-1] >= cut].sum() == 60


def test_shares_of_small_sources_are_added_up() -> None:
    found = top_shares({"a": 6, "b": 2, "c": 2}, {"a": 5, "b": 5, "c": 5, "d": 5}, most=2)
    assert found == [("a", 0.6, 0.25), ("b", 0.2, 0.25), ("2 others", 0.2, 0.5)]
    assert top_shares({"a": 1}, None) == [("a", 1.0, None)]


def test_held_out_exemplars_are_marked_on_the_axis_of_the_scores() -> None:
    found = report(picks=40, total=500)
    html = unescape(selection_page(found))
    cut = found.table.score[39]
    share = np.mean([one >= cut for one in (2.0, 1.5, 0.25, -9.0)])
    assert f"4 exemplars by what they score when they are not fitted on: {share:.0%} of them from the cut on." in html
    rugs = re.findall(r'class="rug ([a-z-]+)" d="([^"]*)"', html.partition('class="narrow"')[0])
    assert [(kind, path.count("M")) for kind, path in rugs] == [("picks", 40), ("chance", 40), ("held-out", 4)]
    places = [float(one) for one in re.findall(r"M([\d.]+)", rugs[2][1])]
    ends = [float(one) for one in re.search(r'class="axis" d="M([\d.]+) [\d.]+H([\d.]+)', html).groups()]  # type: ignore[union-attr]
    assert places == sorted(places, reverse=True) and places[-1] == ends[0], "one below all rows is at the axis' end"
    cut_at = float(re.search(r'class="cut" d="M([\d.]+)', html).group(1))  # type: ignore[union-attr]
    assert [one >= cut_at - 0.1 for one in places] == [one >= cut for one in (2.0, 1.5, 0.25, -9.0)]
    assert "exemplars, by what they score when they are not fitted on</span>" in html
    without = replace(found.made, targets={"t": TargetRecord(used=8)})
    assert "held-out" not in Page(selection_page(replace(found, made=without))).parts[""]
    avoiding = replace(found.made, avoided=Avoided(targets={"u": TargetRecord()}))
    assert 'class="rug held-out"' not in selection_page(replace(found, made=avoiding))


def test_pictures_draw_every_row_and_every_pick() -> None:
    """The bars' tooltips add up to the pool and to the picks, far outliers included."""
    found = report(picks=40, total=500)
    found.table.score[0] = 1e4
    html = unescape(selection_page(found))
    bars = re.findall(
        r"<title>score [^:]*: ([\d,]+) rows, ([\d,]+) of them picked", html.partition('class="narrow"')[0]
    )
    assert sum(int(rows.replace(",", "")) for rows, _ in bars) == 500
    assert sum(int(picks.replace(",", "")) for _, picks in bars) == 40
