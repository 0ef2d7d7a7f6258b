"""What picks are like, against what is counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from tiny import chat

from hf_neuronselect.core.configs import CompareConfig
from hf_neuronselect.metrics.mtld.mtld import mtld, words
from hf_neuronselect.pipelines import measures
from hf_neuronselect.pipelines.measures import RowFacts, shares_of
from hf_neuronselect.rows import near


def facts_of(pool: list[list[dict[str, str]]]) -> RowFacts:
    return RowFacts(Dataset.from_list([{"messages": row} for row in pool]), CompareConfig(pool="p", out="o"))


def test_answers_and_diversity() -> None:
    pool = [chat("abc", "defgh ijk"), chat("why", "so so so so so so"), [{"role": "user", "content": "alone"}], []]
    facts = facts_of(pool)
    found = facts.of(np.asarray([1, 0, 2, 3]))
    texts = [["abc\ndefgh ijk", "defgh ijk"], ["why\nso so so so so so", "so so so so so so"], ["alone", ""], ["", ""]]
    assert found.answers == sum(len(a) for _, a in texts) / sum(len(t) for t, _ in texts)
    assert found.mtld == pytest.approx(np.mean([mtld(a or t) for t, a in texts[:3]]))
    assert facts.of(np.asarray([3])) == measures.Texture(None, None, 0.0 if facts.has_hashes else None)
    assert facts.whole.answers == found.answers and facts.whole.near_copies is None


def test_near_copies() -> None:
    pytest.importorskip("datasketch")
    draw = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(500)]
    texts = [" ".join(draw.choice(vocabulary, 200)) for _ in range(30)]
    texts[7] = texts[3].replace("w1 ", "w2 ")  # a word in some hundred is another
    texts[12] = texts[4]
    texts[20] = " ".join([*texts[5].split()[:100], *texts[6].split()[:100]])  # half of two others

    def runs(text: str) -> set[tuple[str, ...]]:
        own = words(text)
        return {tuple(own[i : i + 5]) for i in range(len(own) - 4)}

    sets = [runs(f"q\n{text}") for text in texts]
    copies = [any(k != i and len(a & b) / len(a | b) >= 0.8 for k, b in enumerate(sets)) for i, a in enumerate(sets)]
    facts = facts_of([chat("q", text) for text in texts])
    assert sum(copies) == 4
    assert facts.of(np.arange(30)).near_copies == np.mean(copies)
    assert facts.of(np.asarray([3, 4, 5])).near_copies == 0  # their copies are not picked


def test_without_datasketch_near_copies_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "find_spec", lambda name: None)
    assert facts_of([chat("a", "b"), chat("a", "b")]).of(np.arange(2)).near_copies is None


def test_each_row_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    before = RowFacts._learn
    monkeypatch.setattr(RowFacts, "_learn", lambda self, i, *a, **b: read.append(i) or before(self, i, *a, **b))
    facts = facts_of([chat("a", f"b {i}") for i in range(5)])
    facts.of(np.asarray([0, 2]))
    facts.of(np.asarray([2, 4, 0]))
    assert sorted(read) == [0, 2, 4]


def test_shares_of_sources() -> None:
    sources = np.asarray(["b", "a", "b", "c", "a", "b"], dtype=object)
    assert list(shares_of(sources, np.asarray([0, 1, 2, 3])).items()) == [("b", 0.5), ("a", 0.25), ("c", 0.25)]
