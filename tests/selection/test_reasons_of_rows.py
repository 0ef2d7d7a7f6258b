"""Reasons on the report: the method's own, of the rows shown alone, each read once; else a sentence says what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from tiny import chat, make_extractor, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.core.configs import ReportConfig
from hf_neuronselect.pipelines.report import report
from hf_neuronselect.selection.reader import Reader
from hf_neuronselect.selection.reasons import NEAR, PICKS
from hf_neuronselect.selection.reported import reported
from hf_neuronselect.signals import heat as token_heat
from hf_neuronselect.store.store import FeatureStore, write_store


def made(method: str, pool: Dataset, target: Any, extractor: Any, k: int = 15, **options: Any) -> Selection:
    return NeuronSelector(method, **options).fit(target, extractor=extractor).select(pool, k=k)


def test_rows_shown_have_the_method_s_own_reasons(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a sample parts are told by their size alone, as the method gives them.
    monkeypatch.setattr("hf_neuronselect.selection.reasons.sampled", lambda *_: (None, "none"))
    selection = made("mona", pool, {"t": target}, extractor)
    found = reported(selection, examples=True)
    near = [one.row for one in found.near[:NEAR]]
    assert list(found.reasons) == [*selection.indices[:PICKS].tolist(), *near] and not found.unexplained
    explainer = selection.explainer()
    for number, one in found.reasons.items():
        why = explainer.why(number)
        assert (
            one.says == why.says and [part.id for part in one.parts] == why.ids[:5].tolist() and one.of == len(why.ids)
        )
        assert one.heat is not None and one.heat.whole
        # All tokens add up to the numerator of eq. 8, and each part's tokens to the part.
        assert one.heat.values.sum() == pytest.approx(why.total * (1 - one.heat.outside), rel=1e-4)
        text = explainer.evidence.text_of(number)
        for i, part in enumerate(one.parts[:2]):
            alone = token_heat.unit_values(extractor, text, "mona", [part.id]).values[:, 0]
            assert one.heat.parts[:, i].max() == pytest.approx(part.amount * alone.max() / alone.sum(), rel=0.3)


def test_rows_are_read_once_and_exemplars_not_again(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = made("mona", pool, {"t": target}, extractor)
    signals, tokens, read, units = list[int](), list[str](), Reader.read, token_heat.unit_values

    def counted(self: Reader, data: Any, **more: Any) -> Any:
        for batch in read(self, data, **more):
            signals.append(len(batch))
            yield batch

    monkeypatch.setattr(Reader, "read", counted)
    monkeypatch.setattr(
        "hf_neuronselect.selection.behind.unit_values",
        lambda extractor, text, *rest: (tokens.append(text.content()), units(extractor, text, *rest))[1],
    )
    assert len(reported(selection, examples=True).reasons) == PICKS + NEAR
    assert sum(signals) == len(pool), "a sample of at least 100 rows has the rows shown in it"
    assert len(tokens) == PICKS + NEAR
    signals.clear()
    monkeypatch.setattr("hf_neuronselect.selection.reasons.COMPUTED_ROWS", 30)
    assert len(reported(selection, examples=True).reasons) == PICKS + NEAR
    assert PICKS + NEAR < sum(signals) <= 30
    signals.clear()
    assert not reported(selection, examples=False).reasons and not signals
    found = reported(selection, examples=True, reasons=False)
    assert not found.reasons and not signals and "neuronselect report" in found.unexplained


@pytest.mark.parametrize("method", ["nait", "nait-contrast", "hidden", "polysemantic", "bm25", "dsir", "random", "longest", "ifd",
                                    "sae-diversity", "rds-plus", "zip-fit"])  # fmt: skip
def test_every_method_says_why(method: str, pool: Dataset, target: Dataset, tiny_folder: Path) -> None:
    extractor = make_extractor(tiny_folder, features=NeuronSelector(method).signals, max_length=96)
    selection = made(method, pool, target, extractor, k=4)
    found = reported(selection, examples=True)
    assert len(found.reasons) == 4 + NEAR and not found.unexplained and all(one.says for one in found.reasons.values())
    heated = [one.heat for one in found.reasons.values() if one.heat is not None]
    assert len(heated) == (
        10 if method in ("nait", "nait-contrast", "polysemantic", "bm25", "dsir", "sae-diversity") else 0
    )
    assert all(np.isfinite(one.values).all() for one in heated) and selection.report()


@pytest.mark.parametrize("centre", ["none", "pool"])
def test_a_method_that_looks_at_the_pool_does_not_look_again(
    centre: str, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    selection = made("mona", pool, target, extractor, centre=centre)
    found = reported(selection, examples=True)
    assert len(found.reasons) == PICKS + NEAR
    for i, number in enumerate(selection.indices[:3].tolist()):
        told = float(found.reasons[number].says.split()[0])
        assert told == pytest.approx(selection.dataset["neuron_score"][i], rel=1e-3)
    selection.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s")
    again.selector.extractor = extractor  # type: ignore[union-attr]
    found = reported(again, examples=True)
    assert bool(found.reasons) == (centre == "none")
    assert ("weighs a row by the whole pool" in found.unexplained) == (centre == "pool")


def test_several_targets(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    other = Dataset.from_list([{"messages": chat("yes yes", "yes yes yes")}])
    found = reported(made("mona", pool, {"t": target, "o": other}, extractor), examples=True)
    named = {one.target for one in found.reasons.values()}
    assert named == {"t", "o"} and len(found.reasons) == PICKS + NEAR


def test_a_stream_has_reasons_of_its_picks(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    found = reported(made("mona", pool.to_iterable_dataset(), target, extractor, k=5), examples=True)
    assert len(found.reasons) == 5 and all(one.heat for one in found.reasons.values())


def test_odd_rows(target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    plain = rows(8)
    odd = [chat("x", ""), chat("\x1b[31m\u202e\0 <b>", "مرحبا بالعالم"), chat("word " * 200_000, "end")]
    pool = concatenate_datasets(
        [
            plain,
            Dataset.from_list(
                [{**plain[0], "id": 9 + i, "messages": one} for i, one in enumerate(odd)], features=plain.features
            ),
        ]
    )
    selection = made("mona", pool, target, extractor, k=11)
    found = reported(selection, examples=True)
    assert len(found.reasons) == 11 and all(one.heat is not None for one in found.reasons.values())
    html = selection.report()
    assert not set(html) & set("\x1b\0\u202e") and len(html) < 400_000


def test_without_the_model_a_sentence_says_what_adds_them(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    made("mona", pool, target, extractor).save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s")
    assert reported(again, examples=True).unexplained == (
        "Why these rows have their scores is not shown: the model is not loaded; neuronselect report FOLDER loads it and adds them."
    )
    assert "which is not on the Hub: name its folder" in reported(again, examples=True, reasons=True).unexplained
    assert "is not shown: the model is not loaded" in again.report() and '"why":{}' in again.report()


# ------------------------------------------------------------------------------------------ the command
def test_the_command_adds_them(
    pool: Dataset, target: Dataset, tiny_folder: Path, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    selection = made("mona", pool, {"t": target}, extractor)
    selection.save_pretrained(tmp_path / "s", reasons=False)
    before = json.loads((tmp_path / "s" / "selection.json").read_text())
    pool.to_json(tmp_path / "pool.jsonl")
    write_store(pool, extractor, tmp_path / "store", pool_about={"id": "pool"}, shard_rows=16)
    options = {"folder": tmp_path / "s", "pool": str(tmp_path / "pool.jsonl")}
    local = {"model": tiny_folder / "model", "sae": tiny_folder / "sae"}
    report(ReportConfig(**options, **local))
    html = (tmp_path / "s" / "report.html").read_text()
    assert '"why":{}' not in html and "The stronger a token" in html, re.findall("is not shown: [^<]*", html)
    report(ReportConfig(**options, features=tmp_path / "store"))  # a store is enough for all but tokens
    html = (tmp_path / "s" / "report.html").read_text()
    assert '"why":{}' not in html and "The stronger a token" not in html
    report(ReportConfig(**options, **local, examples=False))
    assert '"why":{}' in (tmp_path / "s" / "report.html").read_text()
    assert json.loads((tmp_path / "s" / "selection.json").read_text()) == before
    with pytest.raises(NeuronSelectError, match=r"it is of few at None, 59 rows, and the selection of"):
        report(ReportConfig(folder=tmp_path / "s", features=few(pool, extractor, tmp_path)))
    with pytest.raises(NeuronSelectError, match="the selection's targets are t: NAME=ROWS"):
        report(ReportConfig(folder=tmp_path / "s", target=(f"u={tmp_path / 'pool.jsonl'}",)))
    with pytest.raises(NeuronSelectError, match="no such folder"):
        report(ReportConfig(folder=tmp_path / "none"))


def few(pool: Dataset, extractor: NeuronFeatureExtractor, folder: Path) -> Path:
    write_store(pool.select(range(59)), extractor, folder / "few", pool_about={"id": "few"})
    return FeatureStore(folder / "few").folder
