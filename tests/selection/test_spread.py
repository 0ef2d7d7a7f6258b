"""Picks kept apart: at most a share from one source, no near copies."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chat, rows
from typer.testing import CliRunner

from hf_neuronselect import NeuronSelectError, NeuronSelector, NeuronSelectWarning, Selection
from hf_neuronselect.cli.app import app
from hf_neuronselect.core.configs import CompareConfig
from hf_neuronselect.core.provenance import Budget
from hf_neuronselect.core.spread import Spread
from hf_neuronselect.pickers import picker_of
from hf_neuronselect.pickers.vectors import Vectors
from hf_neuronselect.rows import near
from hf_neuronselect.selection.budget import pick
from hf_neuronselect.selection.spread import spread_out

OPTIONS = CompareConfig(pool="p", out=Path("o"))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.1, 0.3, 0.5, 1.0]), wanted=st.integers(1, 30))
def test_no_source_has_more_than_its_share(seed: int, share: float, wanted: int) -> None:
    draw = np.random.default_rng(seed)
    sources = draw.choice(["a", "b", "c"], 30).tolist()
    pool = Dataset.from_dict({"text": [f"row {i}" for i in range(30)], "source": sources})
    order = draw.permutation(30)[:25]
    taken: list[int] = []
    for i in order.tolist():  # the reference
        if len(taken) < wanted and sum(sources[k] == sources[i] for k in taken) < max(1, int(share * wanted)):
            taken.append(i)
    assert spread_out(order, wanted, Spread(source_share=share), pool, OPTIONS).tolist() == taken


def test_near_copies_of_a_better_row_are_passed_over() -> None:
    pytest.importorskip("datasketch")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice([f"w{i}" for i in range(300)], 120)) for _ in range(300)]
    texts[290] = texts[2] + " more"
    texts[5] = texts[280].upper()
    pool = Dataset.from_list([{"messages": chat("same question", text)} for text in texts])
    order = np.arange(300)[::-1].copy()
    found = spread_out(order, None, Spread(drop_near_copies=True), pool, OPTIONS).tolist()
    assert found == [i for i in order.tolist() if i not in (2, 5)]
    assert spread_out(order, 12, Spread(drop_near_copies=True), pool, OPTIONS).tolist() == found[:12]


def test_a_selection_records_it_and_says_when_rows_are_too_few(tmp_path: Path) -> None:
    pool = rows(30, 1)  # sources s0, s1, s2 in turn
    selection = NeuronSelector("random").select(pool, k=9, spread=Spread(source_share=0.34))
    assert sorted(selection.dataset["source"]) == ["s0"] * 3 + ["s1"] * 3 + ["s2"] * 3
    assert selection.provenance.spread == Spread(source_share=0.34)
    assert selection.rethreshold(k=3).dataset["source"] != selection.rethreshold(k=3).dataset["source"][:1] * 3
    selection.save_pretrained(tmp_path / "s")
    assert Selection.from_pretrained(tmp_path / "s").provenance.spread == Spread(source_share=0.34)
    with pytest.warns(NeuronSelectWarning, match="k=10: only 3 rows are left by source_share"):
        few = NeuronSelector("random").select(pool, k=10, spread=Spread(source_share=0.1))
    assert sorted(few.dataset["source"]) == ["s0", "s1", "s2"]
    assert NeuronSelector("random").select(pool, k=9).provenance.spread is None
    scores = {one: NeuronSelector("random").select(pool, k=9, spread=one).scores for one in (None, Spread(0.2))}
    assert scores[None].column("score").equals(scores[Spread(0.2)].column("score"))


def test_a_picker_looks_at_more_rows_than_are_wanted_where_some_are_passed_over() -> None:
    """The first 150 rows are of one source, the next 100 all alike: two of each are wanted, not two copies."""
    scores, valid = np.arange(250.0, 0, -1), np.ones(250, bool)
    angles = np.deg2rad([*np.linspace(0, 150, 150), *[200.0] * 99, 300.0])
    vectors = Vectors(np.arange(250), dense=np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    pool = Dataset.from_dict({"text": [f"r{i}" for i in range(250)], "source": ["a"] * 150 + ["b"] * 100})
    thin = partial(spread_out, spread=Spread(source_share=0.5), pool=pool, options=OPTIONS)
    picker = picker_of("diverse(cosine=0.9999999)")
    found = pick({"t": scores}, valid, np.ones(250), Budget(k=4), picker=picker, vectors=vectors, thin=thin)
    assert found.indices.tolist() == [0, 1, 150, 249]


def test_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    rows(30, 1).rename_column("source", "origin").to_json(tmp_path / "pool.jsonl")
    words = ["select", "--pool", str(tmp_path / "pool.jsonl"), "--method", "longest", "--k", "6", "--source-share", "0.34",
             "--source-column", "origin", "--drop-near-copies", "--out", str(tmp_path / "out")]  # fmt: skip
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    command = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "--source-share 0.34" in command and "--source-column origin" in command and "--drop-near-copies" in command
    assert Selection.from_pretrained(tmp_path / "out").provenance.spread == Spread(0.34, "origin", True)


def test_what_cannot_be_spread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    selector, pool = NeuronSelector("random"), rows(9)
    with pytest.raises(NeuronSelectError, match=r"must lie in \(0, 1\]; 0.2: at most a fifth"):
        Spread(source_share=0)
    with pytest.raises(NeuronSelectError, match="source_column='kind': the pool has no such column; it has messages"):
        selector.select(pool, k=3, spread=Spread(0.5, "kind"))
    with pytest.raises(NeuronSelectError, match="needs k or ratio"):
        selector.select(pool, threshold=3, spread=Spread(0.5))
    with pytest.raises(NeuronSelectError, match="cannot be spread: load the pool as a Dataset"):
        selector.select(pool.to_iterable_dataset(), k=3, spread=Spread(0.5))
    monkeypatch.setattr(near, "find_spec", lambda name: None)
    with pytest.raises(NeuronSelectError, match=r"drop_near_copies=True: needs datasketch: pip install"):
        selector.select(pool, k=3, spread=Spread(drop_near_copies=True))
