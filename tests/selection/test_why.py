"""Why rows were selected and others were not; what is refused, and that both sides are then named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from tiny import chat, make_extractor, rows, write_sae

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.cli.main import main
from hf_neuronselect.core.configs import ExplainConfig
from hf_neuronselect.explain.labels import Label, Labels
from hf_neuronselect.pipelines.explain import explain
from hf_neuronselect.selection import behind
from hf_neuronselect.store.store import FeatureStore, write_store

HOSTILE = "\x1b[31mred\x1b[0m \u202eevil\u202c \x07bell مرحبا"


def made(method: str, pool: Dataset, target: Dataset, extractor: Any, k: int = 5, **options: Any) -> Selection:
    return NeuronSelector(method, **options).fit({"t": target}, extractor=extractor).select(pool, k=k)


@pytest.fixture
def store(pool: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path) -> FeatureStore:
    write_store(pool, extractor, tmp_path / "store", pool_about={"id": "pool"}, shard_rows=16)
    return FeatureStore(tmp_path / "store")


def test_a_pick_is_explained_in_full(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, store: FeatureStore
) -> None:
    selection = made("mona", pool, target, extractor)
    found = selection.explain(2, features=store)
    tables = store.dataset("mona")
    index, value = tables["mona_indices"], tables["mona_values"]
    named = [dict(zip(row["mona_indices"], row["mona_values"], strict=True)) for row in map(extractor, target)]
    assert len(found.parts) == 10 and found.of > 10 and found.place == 2
    assert found.notes[-1].startswith("there are no labels of the SAE layers.2")
    for part in found.parts:
        having = [i for i in range(60) if part.id in index[i]]
        assert part.rarity == pytest.approx(len(having) / 60)
        assert {i for i, _ in part.exemplars or ()} == {i for i, row in enumerate(named) if part.id in row}
        assert part.facts["value"] == pytest.approx(
            dict(zip(index[found.row], value[found.row], strict=True))[part.id], rel=1e-6
        )
    for part in found.parts[:5]:
        strengths = {
            i: dict(zip(index[i], value[i], strict=True)).get(part.id, 0.0) for i in range(60) if i != found.row
        }
        best = sorted(strengths, key=lambda i: (-strengths[i], i))[:2]
        assert [spot.row for spot in part.elsewhere] == best
        assert part.tokens and all(spot.value > 0 for spot in part.tokens)
    everywhere = {unit for unit in range(96) if sum(unit in row for row in index) >= 0.99 * 60}
    why = selection.selector.method.explain(  # type: ignore[union-attr]
        selection.explainer(features=store).evidence.row(found.row),
        selection.selector.targets["t"],
        None,  # type: ignore[union-attr]
    )
    common = np.isin(why.ids, sorted(everywhere))
    said = [note for note in found.notes if "of the pool's rows: they set" in note]
    assert len(said) == bool(common.any())
    if said:
        assert said[0].startswith(
            f"{common.sum()} of the {len(why.ids)} parts, {why.shares[common].sum():.0%} of the sum"
        )
    told = str(found)
    assert f"Row {found.row} of the pool, place 2 of the selection" in told and "pool rows with it" in told
    assert f"{1 - sum(part.share for part in found.parts):.1%} of the sum" in told


def test_parts_that_set_a_row_apart_come_first(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, store: FeatureStore
) -> None:
    """With a store: by what a feature adds beyond its mean over the pool, here written out over all 60 rows."""
    selection = made("mona", pool, target, extractor)
    plain, found = selection.explain(2, top=2000), selection.explain(2, top=2000, features=store)
    of_target = selection.selector.targets["t"]["prototype"]  # type: ignore[union-attr]
    mean = np.zeros(len(of_target))
    for index, value in zip(*(store.dataset("mona")[f"mona_{of}"] for of in ("indices", "values")), strict=True):
        for unit, size in zip(index, value, strict=True):
            mean[unit] += min(size, of_target[unit]) / 60
    assert {part.id: part.amount for part in plain.parts} == pytest.approx(
        {part.id: part.amount for part in found.parts}
    )
    beyond = [part.amount - mean[part.id] for part in found.parts]
    assert beyond == sorted(beyond, reverse=True) and [one.id for one in found.parts] != [one.id for one in plain.parts]
    for part in found.parts:
        assert part.usual == pytest.approx(mean[part.id] / mean.sum())
    assert all(part.usual is None for part in plain.parts)
    assert "usual" in str(found).split("\n\n")[1].split("\n")[0] and "usual" in found._repr_html_()
    assert "usual" not in str(plain)


def test_a_store_alone_explains(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, store: FeatureStore, tmp_path: Path
) -> None:
    """Without the model everything is told but tokens, and what is missing is said."""
    selection = made("mona", pool, target, extractor)
    whole = selection.explain(0, features=store)
    selection.save_pretrained(tmp_path / "s")
    alone = Selection.from_pretrained(tmp_path / "s").explain(0, features=store)
    assert [(p.id, p.share, p.rarity) for p in alone.parts] == [(p.id, p.share, p.rarity) for p in whole.parts]
    assert not any(part.tokens for part in alone.parts)
    assert any("tokens are not told" in note and "model" in note for note in alone.notes)
    assert any("exemplars" in note for note in alone.notes) and any("--pool" in note for note in alone.notes)
    with pytest.raises(NeuronSelectError, match="which is not on the Hub: name its folder"):
        Selection.from_pretrained(tmp_path / "s").explain(0)


def test_tokens_that_moved_a_drift(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    found = made("nait", pool, target, extractor).explain(0)
    assert sum(part.amount for part in found.parts) == pytest.approx(found.score, rel=1e-5)
    assert found.moved and found.moved[0].value > 0 > found.moved[-1].value
    assert "Tokens that moved the score:" in str(found)


@pytest.mark.parametrize("method", ["nait-contrast", "hidden", "rds-plus", "nag", "polysemantic", "bm25", "dsir", "zip-fit",
                                    "random", "longest", "ifd", "sae-diversity"])  # fmt: skip
def test_other_methods_say_what_they_can(method: str, pool: Dataset, target: Dataset, tiny_folder: Path) -> None:
    selector = NeuronSelector(method)
    extractor = make_extractor(tiny_folder, features=selector.signals, max_length=96)
    selection = selector.fit({"t": target}, extractor=extractor).select(pool, k=4)
    found = selection.explain(1)
    assert found.says and str(found).count("\n") >= 2 and not [note for note in found.notes if "computed again" in note]
    assert str(selection.contrast(0, 3)) and selection.why_not(int(selection.indices[0])).stage == "selected"


# ------------------------------------------------------------------------------------------- why not
def test_what_left_a_row_out(target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path) -> None:
    plain = rows(30)
    odd = Dataset.from_list(
        [
            {**plain[4], "id": 30},
            {**plain[5], "messages": target[0]["messages"]},
            {**plain[6], "messages": chat("", "")},
            {**plain[7], "messages": [{"role": "robot", "content": "x"}]},
        ],
        features=plain.features,
    )
    pool = concatenate_datasets([plain, odd])
    selection = made("mona", pool, target, extractor)
    for row, stage, says in (
        (30, "duplicate", "it is row 4 again"), (31, "leak", "holds an exemplar's question"), (32, "empty", "it has no text"),
        (33, "error", "robot"),
    ):  # fmt: skip
        found = selection.why_not(row)
        assert found.stage == stage and found.rank is None and says in str(found), str(found)
    score, picked = selection.scores.column("score").to_numpy(), set(selection.indices.tolist())
    below = next(i for i in range(30) if i not in picked)
    found = selection.why_not(below)
    cut = min(score[list(picked)])
    assert (found.stage, found.score, found.cut) == ("below", pytest.approx(score[below]), pytest.approx(cut))
    assert f"is {cut - score[below]:.4g} below the cut" in str(found)
    assert found.ahead == sum(score[i] > score[below] for i in range(30) if i not in picked)
    assert found.contrast is not None and found.contrast.other.row == below
    assert found.contrast.one.row == selection.indices[-1]
    assert sum(a for _, a, _ in selection.why_not(below, top=999).contrast.parts) == pytest.approx(cut, rel=1e-4)
    assert selection.why_not(int(selection.indices[1])).stage == "selected"
    with pytest.raises(NeuronSelectError, match="the pool has rows 0 to 33"):
        selection.why_not(34)
    selection.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s")
    assert "with the pool (--pool) or a store" in str(again.why_not(below)) and "--pool" in str(again.why_not(30))


def test_a_row_that_the_quota_of_its_source_left_out(pool: Dataset, target: Dataset, extractor: Any) -> None:
    from hf_neuronselect.core.spread import Spread

    selection = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(
        pool, k=6, spread=Spread(source_share=0.34)
    )  # fmt: skip
    score, picked = selection.scores.column("score").to_numpy(), set(selection.indices.tolist())
    passed = next(i for i in np.argsort(-score).tolist() if i not in picked)
    found = selection.why_not(passed)
    assert found.stage == "passed over" and "share that one source may have" in str(found)


def test_a_selection_without_rows(target: Dataset, tmp_path: Path) -> None:
    pool = rows(30)
    fitted = NeuronSelector("dsir").fit({"t": target})
    high = fitted.select(pool, threshold=1e9)
    assert not len(high)
    found = high.why_not(3)
    assert (found.stage, found.cut, found.contrast) == ("below", 1e9, None) and "below the cut at 1e+09" in str(found)
    assert "last pick" not in str(found)
    with pytest.raises(NeuronSelectError, match="^row=0: the selection has no rows$"):
        high.explain(0)
    high.save_pretrained(tmp_path / "s")
    with pytest.raises(
        NeuronSelectError, match="has no rows, since none is within its budget: select again with a lower"
    ):
        Selection.from_pretrained(tmp_path / "s")


def test_contrast(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selection = made("mona", pool, target, extractor)
    found = selection.contrast(0, 4, top=999)
    assert sum(a - b for _, a, b in found.parts) == pytest.approx(found.one.score - found.other.score, rel=1e-4)
    gaps = [abs(a - b) for _, a, b in found.parts]
    assert gaps == sorted(gaps, reverse=True) and "A - B" in str(found)
    with pytest.raises(NeuronSelectError, match="rows 0 to 4"):
        selection.contrast(0, 5)


def test_a_contrast_reads_either_row_once(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer = made("mona", pool, target, extractor).explainer()
    read, row = list[int](), explainer.evidence.row
    monkeypatch.setattr(explainer.evidence, "row", lambda number: read.append(number) or row(number))
    explainer.contrast(0, 4)
    assert read == explainer.selection.indices[[0, 4]].tolist()


def test_rows_where_features_are_strongest_are_read_once(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    explainer = made("mona", pool, target, extractor).explainer(features=store)
    read: list[Any] = []
    values = behind.unit_values
    monkeypatch.setattr(behind, "unit_values", lambda *given: read.append(given[1]) or values(*given))
    parts = explainer.explain(0).parts
    spots = [(part.id, spot) for part in parts for spot in part.elsewhere]
    assert len(spots) == 10 > len({spot.row for _, spot in spots}) == len(read) - 1
    for unit, spot in spots:
        assert unit is not None and spot.row is not None
        text = explainer.evidence.text_of(spot.row)
        assert explainer.behind.tokens("mona", [unit], text, top=1, row=spot.row)[unit] == (spot,)


# ------------------------------------------------------------------------------------------ bad input
def test_another_sae_pool_store_or_exemplars_are_refused_and_both_are_named(
    tiny_folder: Path, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    made("mona", pool, target, extractor).save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s")
    write_sae(tmp_path / "sae" / "layers.2", 32, seed=9)
    known = again.provenance.extractor
    assert known is not None and known.sae is not None
    with pytest.raises(
        NeuronSelectError, match=f"was fitted with layers.2 at {known.sae.commit}, this is layers.2 at content:"
    ):
        explain(ExplainConfig(folder=tmp_path / "s", row=0, model=tiny_folder / "model", sae=tmp_path / "sae"))
    given = {"extractor": extractor}
    with pytest.raises(NeuronSelectError, match=r"it has 59 rows, and the selection is from .*, 60 rows"):
        again.explain(0, pool=pool.select(range(59)), **given)
    with pytest.raises(NeuronSelectError, match="is not the selection's row 0"):
        again.explain(0, pool=rows(60, seed=5), **given)
    with pytest.raises(NeuronSelectError, match=r"these 6 exemplars are not the 6 of .* that it was fitted on"):
        again.explain(0, exemplars=rows(6, seed=8), **given)
    other = make_extractor(tiny_folder, sae=str(tmp_path / "sae"))
    write_store(pool, other, tmp_path / "store", pool_about={"id": "pool"})
    with pytest.raises(
        NeuronSelectError, match=f"another extraction .* made with model at .*, layers.2 at {known.sae.commit}"
    ):
        again.explain(0, features=FeatureStore(tmp_path / "store"), **given)
    write_store(pool.select(range(9)), extractor, tmp_path / "few", pool_about={"id": "few"})
    with pytest.raises(NeuronSelectError, match=r"it is of few at None, 9 rows, and the selection of .*, 60 rows"):
        again.explain(0, features=FeatureStore(tmp_path / "few"), **given)
    with pytest.raises(NeuronSelectError, match="one of t"):
        again.explain(0, target="u", **given)


def test_hostile_and_odd_rows(target: Dataset, extractor: NeuronFeatureExtractor, tiny_folder: Path) -> None:
    """ANSI codes, right to left, 1 MB, one token, features found nowhere else."""
    pool = Dataset.from_list(
        [{"messages": chat(text, "yes")} for text in (HOSTILE, "add two numbers " * 65_000, "x", "print list 7")]
    )
    selection = made("mona", pool, target, extractor, k=4)
    for i in range(4):
        told = str(selection.explain(i))
        assert not set(told) & set("\x1b\x07\u202e\u202c\r") and len(told) < 20_000
    short = make_extractor(tiny_folder, max_length=1)
    alone = made("mona", pool.select([2]), target, short, k=1)
    assert str(alone.explain(0))


def test_the_command(
    pool: Dataset, target: Dataset, tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = [{**pool[0], "messages": chat(HOSTILE, HOSTILE)}]
    whole = concatenate_datasets([pool, Dataset.from_list(odd, features=pool.features)])
    whole.to_json(tmp_path / "pool.jsonl")
    target.to_json(tmp_path / "t.jsonl")
    places = ["--model", str(tiny_folder / "model"), "--sae", str(tiny_folder / "sae")]
    rows_of = ["--pool", str(tmp_path / "pool.jsonl"), "--target", f"t={tmp_path / 't.jsonl'}"]

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["neuronselect", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    out = str(tmp_path / "s")
    assert run("select", *rows_of, "--k", "61", "--out", out, *places)[0] == 0
    assert run("extract", *rows_of[:2], "--method", "mona", "--out", str(tmp_path / "store"), *places)[0] == 0
    last = int(np.flatnonzero(Selection.from_pretrained(out).indices == 60)[0])
    code, told, err = run("explain", out, "--row", str(last), "--features", str(tmp_path / "store"), *rows_of, *places)
    assert code == 0, err
    assert "exemplars:" in told and "pool rows with it" in told and "here:" in told
    assert not set(told) & set("\x1b\x07\u202e") and "\\x1b[31m" in told
    code, told, _ = run("explain", out, "--contrast", "1", "0", *places)
    assert code == 0 and "A: row" in told
    for words, says in (
        ([], "give one of --row, --why-not, --contrast and --causal"), (["--row", "1", "--why-not", "2"], "give one of"),
        (["--row", "99"], "--row 99: the selection has rows 0 to"), (["--contrast", "1", "x"], "--contrast x: must be a whole number"),
        (["--row", "0", "--target", f"t={tmp_path / 'pool.jsonl'}"], "and the selection was made with t.jsonl at content:"),
    ):  # fmt: skip
        code, _, err = run("explain", out, *words, *places)
        assert code == 2 and says in err, err
    code, _, err = run("explain", out, "--row", "0")
    assert code == 2 and "model at content:" in err and "name its folder" in err
    record = json.loads((Path(out) / "selection.json").read_text())
    assert str(tmp_path) not in json.dumps(record)


def test_labels_are_told_as_made_by_a_machine(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    selection = made("mona", pool, target, extractor)
    first = selection.explain(0).parts[0]
    assert first.label is None
    sae = extractor.extraction.sae
    assert sae is not None and first.id is not None
    folder, below = Path(sae.location), next(i for i in range(60) if i not in selection.indices)
    Labels({first.id: Label(("two",), (), (), 0.9, 0.1, 0.2)}, {"sae": sae.key}).save(folder / "labels.parquet")
    try:
        found = selection.explain(0)
        assert found.parts[0].label is not None and "label (made by a machine, AUC 0.90): “two”" in str(found)
        assert extractor.identity("mona") == selection.provenance.extractor.signals["mona"]  # type: ignore[union-attr]
        Labels({first.id: Label((HOSTILE,), (), (), 0.9, 0.1, 0.2)}, {"sae": sae.key}).save(folder / "labels.parquet")
        for told in (selection.explain(0), selection.contrast(0, 1, top=999), selection.why_not(below, top=999)):
            assert "bell" in str(told) and not set(str(told)) & set("\x1b\x07\u202e\u202c"), told
    finally:
        (folder / "labels.parquet").unlink()


def test_a_link_where_the_sae_is_known_to_neuronpedia() -> None:
    from hf_neuronselect.core.sources import Source
    from hf_neuronselect.models.find_sae import feature_page

    page = "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/7"
    assert feature_page(Source("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "c", "x"), 7) == page
    assert not feature_page(Source("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_20", "c", "x"), 7)
    assert not feature_page(Source("layers.2", "content:1", "x"), 7)


def test_folders_are_left_as_they_are(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, store: FeatureStore, tmp_path: Path
) -> None:
    selection = made("mona", pool, target, extractor)
    shutil.copytree(store.folder, tmp_path / "before")
    selection.explain(0, features=store)
    before = {
        path.relative_to(tmp_path / "before"): path.read_bytes()
        for path in (tmp_path / "before").rglob("*")
        if path.is_file()
    }
    after = {path.relative_to(store.folder): path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    assert before == after


def test_notes_of_one_row_are_not_told_of_the_next(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    """An explainer tells many rows, as an app does; what holds for all of them is told of each."""
    selection = made("mona", pool, target, extractor)
    kept = selection.explainer()
    kept.evidence.note("only of the row before")
    first = kept.explain(0)
    assert set(kept.explain(1).notes) == set(selection.explain(1).notes)
    assert "only of the row before" not in first.notes
    assert set(kept.explain(0).notes) == set(first.notes) and any(
        "no labels of the SAE" in note for note in first.notes
    )
    assert set(kept.contrast(0, 1).notes) == set(selection.contrast(0, 1).notes)
