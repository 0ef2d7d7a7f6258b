"""Several methods side by side: one pass over the pool, the same picks as one at a time, a table that adds up."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer
from datasets import Dataset
from tiny import rows

from hf_neuronselect import (
    NeuronFeatureExtractor,
    NeuronSelectError,
    NeuronSelector,
    NeuronSelectWarning,
    Selection,
)
from hf_neuronselect.cli.compare import _run
from hf_neuronselect.core.configs import CompareConfig, ExtractConfig, SelectConfig
from hf_neuronselect.core.progress import LiveTable
from hf_neuronselect.methods import dsir
from hf_neuronselect.methods.bm25 import Bm25
from hf_neuronselect.methods.dsir import Dsir
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.comparison import Comparison, Line, slug
from hf_neuronselect.pipelines.extract import extract
from hf_neuronselect.pipelines.job import Job
from hf_neuronselect.pipelines.methods import methods_of
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.rows.formats import read_row, row_format
from hf_neuronselect.rows.leakage import Leakage

METHODS = "mona,nait,nait(normalize=true,direction=mean),random,longest"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    rows(60).to_json(folder / "pool.jsonl")
    rows(6, seed=1).to_json(folder / "a.jsonl")
    rows(5, seed=2).to_json(folder / "b.jsonl")
    return {
        "pool": str(folder / "pool.jsonl"),
        "target": (f"a={folder / 'a.jsonl'}", f"b={folder / 'b.jsonl'}"),
        "model": str(tiny_folder / "model"),
        "sae": str(tiny_folder / "sae"),
    }


def formats_of(data: Dataset) -> list[Any]:
    return [read_row(row, row_format(["messages"])) for row in data]


class Pass:
    """Counts the rows that each pass over rows reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        before = NeuronFeatureExtractor.compute

        def compute(extractor: NeuronFeatureExtractor, prepared: Any, *rest: Any, **more: Any) -> Any:
            self.seen.append(len(prepared))
            return before(extractor, prepared, *rest, **more)

        monkeypatch.setattr(NeuronFeatureExtractor, "compute", compute)


def compared(options: dict[str, Any], out: Path, **more: Any) -> Comparison:
    return compare(CompareConfig(**(options | {"methods": METHODS, "k": 8, "out": out} | more)))


def test_the_same_picks_as_one_at_a_time(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Pass(monkeypatch)
    said: list[str] = []
    related = {"a": "s1", "b": "s0, s2"}
    config = CompareConfig(**options, methods=METHODS, k=8, related=related, draws=3, out=tmp_path / "out")
    found = compare(config, say=said.append)
    assert sorted(counted.seen) == [5, 6, 16, 60], "the pool once (16 rows to tell its size), exemplars once"
    monkeypatch.undo()
    sources = np.asarray(rows(60)["source"])
    table = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert len(table) == len(found.lines) == 10
    for line in table:
        label, target = line["method"], line["target"]
        saved = Selection.from_pretrained(tmp_path / "out" / slug(label) / target)
        (chosen,) = methods_of(label, 0)
        alone = select(SelectConfig(**(options | {
            "target": [one for one in options["target"] if one.startswith(f"{target}=")], "method": chosen.method.name,
            "method_option": chosen.method.options, "k": 8, "out": tmp_path / f"{slug(label)}-{target}",
        })))  # fmt: skip
        assert saved.indices.tolist() == alone.indices.tolist()
        # Projections are float32, vectors are not: the shared pass projects where one method has directions.
        for name in (name for name in alone.scores.column_names if name.startswith("score")):
            np.testing.assert_allclose(saved.scores[name].to_numpy(), alone.scores[name].to_numpy(), rtol=1e-5)
        right = np.isin(sources, related[target].replace(" ", "").split(","))
        assert float(line["base_rate"]) == right.mean() and int(line["rows"]) == 8
        if chosen.draws:
            assert line["draws"] == "3" and float(line["low"]) <= float(line["precision"]) <= float(line["high"])
        else:
            assert line["draws"] == "1" and not line["high"]
            assert float(line["precision"]) == right[alone.indices].mean()
            assert float(line["recall"]) == right[alone.indices].sum() / right.sum()
            assert found.sources[label, target] == {
                name: (sources[alone.indices] == name).mean() for name in found.sources[label, target]
            }
    first = {line["target"]: float(line["overlap"]) for line in table if line["method"] == "mona"}
    assert first == {"a": 1.0, "b": 1.0}
    text = "\n".join(said)
    shown = (tmp_path / "out" / "compare.md").read_text()
    assert "random (mean of 3 draws)" in text and "nait(normalize=true,direction=mean)" in text
    assert shown.count("| a | 8 |") == 5 and "| (the pool) | a |" in shown and "| mean rank |" in shown
    arrow = pq.read_table(tmp_path / "out" / "compare.parquet").to_pylist()
    for of_arrow, of_csv in zip(arrow, table, strict=True):
        for name, value in of_arrow.items():
            assert ("" if value is None else str(value)) == of_csv[name], name
    overlaps = list(csv.DictReader((tmp_path / "out" / "overlap.csv").open()))
    assert len(overlaps) == 2 * 5 * 5
    for line in overlaps:
        one, other = (
            set(found.selections[line[name], line["target"]].indices.tolist()) for name in ("method", "other")
        )
        assert float(line["overlap"]) == len(one & other) / len(one | other)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Ranks by precision" in page and "://" not in page and str(tmp_path) not in page


def test_processes_share_the_pass_and_pick_the_same(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(150).to_json(tmp_path / "pool.jsonl")
    given = options | {"pool": str(tmp_path / "pool.jsonl"), "methods": "mona,nait-contrast"}
    alone = compared(given, tmp_path / "one")
    counted = Pass(monkeypatch)
    found = compared(given, tmp_path / "two", num_workers=2)
    assert sorted(counted.seen) == [5, 6], "the pool is read by the processes, exemplars are not"
    for label, target in alone.selections:
        one, two = alone.selections[label, target], found.selections[label, target]
        assert one.indices.tolist() == two.indices.tolist() and one.scores.column_names == two.scores.column_names
        for name in (name for name in one.scores.column_names if name.startswith("score")):
            np.testing.assert_allclose(two.scores[name].to_numpy(), one.scores[name].to_numpy(), rtol=1e-5)
    assert found.lines[0].tokens_per_second and found.lines[0].pass_seconds


def test_what_a_picker_compares_rows_by_is_in_the_shared_pass(options: dict[str, Any], tmp_path: Path) -> None:
    model = options["model"]
    deita = f"deita(quality_scorer={model},complexity_scorer={model})"
    name = "deita(quality_scorer=model,complexity_scorer=model)"
    for methods, picker in ((f"mona,{deita}", None), ("mona,nait", "diverse(cosine=0.5,by=hidden)")):
        found = compared(options, tmp_path / methods[:6], methods=methods, picker=picker)
        assert [line.reason for line in found.lines] == [""] * 4
        assert {line.method for line in found.lines} <= {
            "mona",
            name,
            *(f"{one} + {picker}" for one in ("mona", "nait")),
        }
        for chosen in methods_of(methods, 0, picker):
            alone = select(SelectConfig(**(options | {
                "target": options["target"][:1], "method": chosen.method.name, "method_option": chosen.method.options,
                "picker": chosen.picker, "k": 8, "out": tmp_path / f"{methods[:6]}-{chosen.method.name}",
            })))  # fmt: skip
            assert found.selections[chosen.label, "a"].indices.tolist() == alone.indices.tolist()


def test_intervals_are_of_fits_on_exemplars_drawn_again(options: dict[str, Any], tmp_path: Path) -> None:
    related, sources = {"a": "s1"}, np.asarray(rows(60)["source"])
    found = compared(
        options, tmp_path / "out", methods="mona,hidden(centre=pool),longest", related=related, resamples=4
    )
    extractor, exemplars = found.extractor, rows(6, seed=1)
    draw = np.random.default_rng(0)
    again = [exemplars.select(draw.integers(0, 6, 6)) for _ in range(4)]
    for label, own in (("mona", {}), ("hidden(centre=pool)", {"centre": "pool"})):
        wanted = []
        for some in again:
            selector = NeuronSelector(label.partition("(")[0], **own).fit({"a": some}, extractor=extractor)
            selector.leakage = Leakage.of(formats_of(exemplars))
            wanted.append((sources[selector.select(rows(60), k=8).indices] == "s1").mean())
        assert found.samples[label, "a"].tolist() == wanted and len(set(wanted)) > 1
        (line,) = (one for one in found.lines if (one.method, one.target) == (label, "a"))
        assert [line.low, line.high] == np.percentile(wanted, [5, 95]).tolist()
    between = {f"{one.low:.2f}–{one.high:.2f}" for one in found.lines if one.low is not None}
    assert between
    for shown in (found.table(), *((tmp_path / "out" / f"compare.{kind}").read_text() for kind in ("md", "html"))):
        assert "5–95 %" in shown and all(text in shown for text in between)
    for line in pq.read_table(tmp_path / "out" / "compare.parquet").to_pylist():
        assert (line["low"] is not None) == (line["target"] == "a" and line["method"] != "longest")
    assert all(job.sweep is None for job in found.jobs.values()), "scores of one method at a time are in memory"
    assert len(found.samples["longest", "a"]) == 0  # it has no exemplars
    assert ("mona", "b") not in found.samples  # nothing is right for b


def test_a_pool_is_scored_once_for_all_targets_draws_and_resamples(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every pick is the one that a selection alone makes."""
    observed: list[tuple[str, int]] = []
    for kind in (Bm25, Dsir):
        before = kind.observe
        monkeypatch.setattr(kind, "observe", lambda method, state, rows, before=before: (
            observed.append((method.name, len(rows))), before(method, state, rows)))  # fmt: skip
    scored: list[int] = []
    hashes = dsir.hashed
    monkeypatch.setattr(dsir, "hashed", lambda texts: scored.append(len(texts)) or hashes(texts))
    related = {"a": "s1", "b": "s0,s2"}
    config = CompareConfig(**options, methods="bm25,dsir", k=8, draws=3, resamples=3, related=related,
                           out=tmp_path / "out")  # fmt: skip
    found = compare(config)
    assert observed == [("bm25", 60), ("dsir", 60)]
    assert scored.count(60) == 2, "observed and scored once, for two targets and three seeds"
    monkeypatch.undo()
    pool, sources = rows(60), np.asarray(rows(60)["source"])
    targets = {"a": rows(6, seed=1), "b": rows(5, seed=2)}
    for name, exemplars in targets.items():
        right = np.isin(sources, related[name].split(","))
        for seed in range(3):
            alone = NeuronSelector("dsir", seed=seed).fit({name: exemplars}).select(pool, k=8)
            assert found.samples["dsir", name][seed] == right[alone.indices].mean()
            if seed == 0:
                assert found.selections["dsir", name].indices.tolist() == alone.indices.tolist()
        wanted = NeuronSelector("bm25").fit({name: exemplars}).select(pool, k=8)
        assert found.selections["bm25", name].indices.tolist() == wanted.indices.tolist()
        draw = np.random.default_rng(0)
        for i in range(3):
            again = NeuronSelector("bm25").fit(
                {name: exemplars.select(draw.integers(0, len(exemplars), len(exemplars)))}
            )
            again.leakage = Leakage.of(formats_of(exemplars))
            assert found.samples["bm25", name][i] == right[again.select(pool, k=8).indices].mean()


@pytest.mark.parametrize(
    "method", ["nait", "nait-contrast", "rds-plus", "bm25 + global-max", "ifd", "hidden + diverse(cosine=0.5)"]
)
def test_targets_scored_together_are_those_scored_alone(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Also with projections in the place of vectors, observed pools, scores for each exemplar and pickers that compare rows."""
    name, _, picker = method.partition(" + ")
    found = compared(
        options, tmp_path / "out", methods=f"{name},longest", picker=picker or None, related={"a": "s1"}, resamples=2
    )
    assert not found.failed
    extractor = found.extractor
    for target, exemplars in (("a", rows(6, seed=1)), ("b", rows(5, seed=2))):
        selector = NeuronSelector(name, picker=picker or None)
        alone = selector.fit({target: exemplars}, extractor=extractor.with_features(selector.signals)).select(
            rows(60), k=8
        )
        made = found.selections[method, target]
        assert made.indices.tolist() == alone.indices.tolist()
        assert made.provenance.counts == alone.provenance.counts
        assert made.provenance.targets[target].doubts == alone.provenance.targets[target].doubts
    assert len(found.samples[method, "a"]) == (0 if name == "ifd" else 2)


def test_exemplars_are_read_for_methods_with_a_target_alone(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method without one needs nothing of them but their texts, to leave them out: here, no model runs over them."""
    seen: list[tuple[int, set[str]]] = []
    before = NeuronFeatureExtractor.compute

    def compute(extractor: NeuronFeatureExtractor, prepared: Any, *rest: Any, **more: Any) -> Any:
        seen.append((len(prepared), {signal.name for signal in extractor.computed}))
        return before(extractor, prepared, *rest, **more)

    monkeypatch.setattr(NeuronFeatureExtractor, "compute", compute)
    compared(options, tmp_path / "out", methods="hidden,ifd")
    losses = {"answer_loss", "answer_alone_loss"}
    assert {rows for rows, signals in seen if signals & losses} == {16, 60}
    assert {rows for rows, signals in seen if "hidden" in signals} == {5, 6, 16, 60}


def test_ranks() -> None:
    def line(method: str, target: str, precision: float | None, **more: Any) -> Line:
        return Line(method, target, precision=precision, **more)

    found = Comparison(None, None)  # type: ignore[arg-type]
    for target, values in (("a", (0.9, 0.5, 0.5)), ("b", (0.2, 0.8, 0.1))):
        found.lines += [line(name, target, value) for name, value in zip("xyz", values, strict=True)]
        found.lines += [line("s", target, 1.0, stand_in="other"), line("f", target, None, reason="no")]
    assert [(one.method, one.mean) for one in found.ranks()] == [("x", 1.5), ("y", (2.5 + 1) / 2), ("z", (2.5 + 3) / 2)]
    assert all(one.low <= one.mean <= one.high for one in found.ranks())
    assert found.ranks() == found.ranks()
    found.samples["x", "a"] = np.asarray([0.9, 0.0])  # two fits disagree: the interval is wider
    assert max(one.high for one in found.ranks() if one.method == "x") == 3


def test_a_selection_no_better_than_random_is_said_in_words() -> None:
    found = Comparison(None, None)  # type: ignore[arg-type]
    found.lines = [
        Line("x", "a", precision=0.1, base_rate=0.1, seconds=0.0),
        Line("y", "a", precision=0.3, base_rate=0.1, seconds=0.0),
        Line("random", "a", precision=0.1, low=0.05, high=0.2, draws=20, base_rate=0.1, seconds=0.0),
    ]
    found.lines += [replace(line, target="b", precision=0.15) for line in found.lines if line.method != "random"]
    found.lines += [replace(found.lines[2], target="b", high=0.3)]
    assert found.warnings(["a"]) == [
        "x is no better than random rows for a (0.10; random up to 0.20): do not use it there"
    ]
    assert found.warnings(["a", "b"])[0] == (
        "x is no better than random rows for a (0.10; random up to 0.20), b (0.15; random up to 0.30): do not use it there"
    )
    assert found.warnings(["a"])[0] in found.table("a")
    assert found.warnings(["c"]) == []


def test_columns_that_say_nothing_are_left_out() -> None:
    found = Comparison(None, None)  # type: ignore[arg-type]
    found.lines = [
        Line("x", "a", rows=3, picked_tokens=5.0, seconds=1.0),
        Line("y", "b", rows=3, precision=0.5, seconds=1.0),
    ]
    assert found.shown("a")[0] == ["method", "target", "rows", "tokens", "seconds"]
    header, cells = found.shown("a", "b")
    assert header == ["method", "target", "rows", "precision", "tokens", "seconds"]
    assert cells[1] == ("x", "a", "3", "", "5", "1.00")


def test_full_keeps_every_row(options: dict[str, Any], tmp_path: Path) -> None:
    found = compared(options, tmp_path / "out", methods="full,longest", k=8)
    assert {(line.method, line.rows) for line in found.lines} == {("full", 60), ("longest", 8)}
    again = compared(options, tmp_path / "out", methods="full,longest", k=8)
    assert [line.rows for line in again.lines] == [line.rows for line in found.lines]


def test_again_into_the_same_folder_and_from_a_store(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compared(options, tmp_path / "out", features=tmp_path / "store", methods="mona,hidden")
    counted = Pass(monkeypatch)
    again = compared(options, tmp_path / "out", features=tmp_path / "store", methods="mona,hidden")
    assert counted.seen == [], "the pool's signals and the exemplars' are there"
    compared(options, tmp_path / "other", features=tmp_path / "store", methods="mona,hidden")
    assert sorted(counted.seen) == [5, 6], "a new folder has no exemplars yet"
    for key, selection in first.selections.items():
        assert again.selections[key].indices.tolist() == selection.indices.tolist()
    assert json.loads((tmp_path / "out/mona/a/selection.json").read_text())["pool"]["id"] == "pool.jsonl"
    assert not (tmp_path / "out" / "features").exists()
    made = first.lines[0]
    assert made.precision is None and made.base_rate is None and made.pool_tokens


def test_whole_signals_of_a_store_are_used_in_place_of_smaller_ones(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {name: options[name] for name in ("pool", "model", "sae")}
    extract(ExtractConfig(**read, method="nait,hidden", out=tmp_path / "store"))
    there = {path.name for path in (tmp_path / "store").iterdir()}
    counted = Pass(monkeypatch)
    found = compared(options, tmp_path / "out", features=tmp_path / "store", methods="nait,hidden")
    assert sorted(counted.seen) == [5, 6], "exemplars alone go through the model"
    assert {path.name for path in (tmp_path / "store").iterdir()} == there
    fresh = compared(options, tmp_path / "fresh", methods="nait,hidden")
    for key, selection in fresh.selections.items():
        assert found.selections[key].indices.tolist() == selection.indices.tolist()


def test_a_method_that_cannot_run_is_a_line_with_its_reason(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others go on; of one exemplar alone nait fails, of both targets routing, for this model has no experts."""
    folder = Path(options["pool"]).parent
    rows(1, seed=3).to_json(folder / "one.jsonl")
    targets = (options["target"][0], f"one={folder / 'one.jsonl'}")
    given = options | {"target": targets, "k": 8, "methods": "hidden,nait,routing", "out": tmp_path / "o"}
    assert _run(CompareConfig(**given)) == 3
    table = list(csv.DictReader((tmp_path / "o" / "compare.csv").open()))
    reasons = {(line["method"], line["target"]): line["reason"] for line in table}
    assert {key for key, reason in reasons.items() if not reason} == {("hidden", "a"), ("hidden", "one"), ("nait", "a")}
    assert "at least 2 exemplars" in reasons["nait", "one"]
    assert all("no mixture-of-experts" in reasons["routing", target] for target in ("a", "one"))
    for text in (capsys.readouterr().out, (tmp_path / "o" / "compare.md").read_text()):
        assert text.count("routing on one did not run: ") == 1 and "no mixture-of-experts" in text
    assert not (tmp_path / "o" / "routing").exists()
    assert len(Selection.from_pretrained(tmp_path / "o" / "nait" / "a")) == 8
    with pytest.raises(NeuronSelectError, match="no mixture-of-experts"):  # nothing else is left
        compared(options, tmp_path / "p", methods="routing")


def test_a_judge_that_refuses_leaves_the_other_methods(
    options: dict[str, Any], tmp_path: Path, server: ChatServer
) -> None:
    """It is asked in the pass over the pool for the first time, after all that can be checked before."""
    server.faults = [401] * 500
    judged = f"alpagasus(judge=some-judge,at={server.url},key=OPENAI_API_KEY)"
    given = options | {"methods": f"hidden,{judged},random", "out": tmp_path / "o", "k": 8}
    assert _run(CompareConfig(**given)) == 3
    table = list(csv.DictReader((tmp_path / "o" / "compare.csv").open()))
    assert {line["method"] for line in table if line["reason"]} == {judged}
    assert all("answered 401" in line["reason"] for line in table if line["method"] == judged)
    assert len(Selection.from_pretrained(tmp_path / "o" / "hidden" / "a")) == 8
    with pytest.raises(NeuronSelectError, match="answered 401"):  # nothing else is left
        compared(options, tmp_path / "p", methods=judged)


def test_one_method_and_one_target_fill_and_read_a_store(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"methods": "hidden", "target": options["target"][:1], "features": tmp_path / "store"}
    first = compared(options, tmp_path / "out", **given)
    counted = Pass(monkeypatch)
    again = compared(options, tmp_path / "other", **given)
    assert counted.seen == [6], "the exemplars alone"
    assert again.selections["hidden", "a"].indices.tolist() == first.selections["hidden", "a"].indices.tolist()


def test_a_method_that_picks_nothing_is_last(options: dict[str, Any], tmp_path: Path) -> None:
    related = {"a": "s1", "b": "s0, s2"}
    found = compared(
        options,
        tmp_path / "out",
        methods="hidden,random",
        k=None,
        threshold=0.999999,
        related=related,
        draws=2,
        resamples=3,
    )
    rows_of = {(line.method, line.target): line.rows for line in found.lines}
    assert 0 in rows_of.values()
    for line in csv.DictReader((tmp_path / "out" / "compare.csv").open()):
        assert "nan" not in line.values()
        if line["rows"] == "0":
            assert float(line["precision"]) == 0 == float(line["recall"])
    empty = {method for (method, _), count in rows_of.items() if not count}
    assert all(one.mean > 1 for one in found.ranks() if one.method in empty)


def test_random_rows_are_drawn_again_where_rows_are_counted_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    """With another model a budget of tokens is another number of rows; they have no signals by which that is seen."""
    given = {"methods": "random,longest", "k": None, "max_tokens": 900, "target": options["target"][:1]}
    compared(options, tmp_path / "out", **given)
    other = options | {"max_length": 20}
    found = compared(other, tmp_path / "out", **given)
    fresh = compared(other, tmp_path / "fresh", **given)
    for key, selection in fresh.selections.items():
        assert found.selections[key].indices.tolist() == selection.indices.tolist()


def test_a_method_leaves_out_only_exemplars_it_cannot_read(options: dict[str, Any], tmp_path: Path) -> None:
    """An exemplar without an answer is none for a method that reads answers, and one for the method beside it."""
    given = rows(6, seed=1).to_list()
    given[2] = {**given[2], "messages": given[2]["messages"][:1]}
    Dataset.from_list(given).to_json(tmp_path / "t.jsonl")
    with pytest.warns(NeuronSelectWarning, match="1 of 6 exemplars are left out"):
        found = compared(
            options, tmp_path / "out", target=(f"t={tmp_path / 't.jsonl'}",), methods="hidden,nait-contrast"
        )
    used = {method: one.provenance.targets["t"].used for (method, _), one in found.selections.items()}
    assert used == {"hidden": 6, "nait-contrast": 5}


def test_exemplars_are_read_once_for_all_methods(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where methods leave out other exemplars; a method that is added reads no more than its own signals."""
    seen: list[tuple[int, set[str]]] = []
    before = NeuronFeatureExtractor.compute

    def compute(extractor: NeuronFeatureExtractor, prepared: Any, *rest: Any, **more: Any) -> Any:
        signals = {signal.name for signal in extractor.computed} - {"tokens", "words"}  # no model runs for these
        if len(prepared) in (5, 6) and signals:
            seen.append((len(prepared), signals))
        return before(extractor, prepared, *rest, **more)

    monkeypatch.setattr(NeuronFeatureExtractor, "compute", compute)
    methods = "mona,hidden,hidden(centre=pool),nait,nait-contrast,rds-plus,nag,bm25,zip-fit,random,longest"
    found = compared(options, tmp_path / "out", methods=methods)
    assert not found.failed
    every = {"mona", "hidden", "nait", "content_mean", "answer_mean", "rds_plus", "strongest_neurons"}
    assert [rows for rows, _ in seen] == [6, 5] and all(every <= signals for _, signals in seen)
    seen.clear()
    again = compared(options, tmp_path / "out", methods=f"{methods},polysemantic")
    assert [(rows, names - {"tokens"}) for rows, names in seen] == [(6, {"polysemantic"}), (5, {"polysemantic"})], (
        "the others are kept"
    )
    for key, selection in found.selections.items():
        assert again.selections[key].indices.tolist() == selection.indices.tolist()


def test_exemplars_with_columns_of_a_signals_name_are_read_by_each_method(
    options: dict[str, Any], tmp_path: Path
) -> None:
    given = rows(6, seed=1)
    given.add_column("hidden", ["ours"] * 6).to_json(tmp_path / "t.jsonl")
    given.to_json(tmp_path / "u.jsonl")
    picks = {}
    for name in ("t", "u"):
        target = (f"a={tmp_path / name}.jsonl",)
        found = compared(options, tmp_path / f"out-{name}", target=target, methods="mona,longest")
        picks[name] = {method: one.indices.tolist() for (method, _), one in found.selections.items()}
    assert picks["t"] == picks["u"]


def test_lines_fill_a_table_on_a_terminal_and_are_notes_elsewhere(options: dict[str, Any], tmp_path: Path) -> None:
    class Table(LiveTable):
        def show(self, lines: Sequence[str], near: int) -> None:
            shown.append((list(lines), near))

    shown: list[tuple[list[str], int]] = []
    notes: list[str] = []
    config = CompareConfig(**options, methods="mona,routing,longest", k=8, related={"a": "s1"}, out=tmp_path / "o")
    compare(config, note=notes.append, table=Table(io.StringIO()))
    assert not any("8 rows" in one for one in notes)
    names = [line.split()[:2] for line in shown[0][0][2:]]
    assert names == [[method, target] for method in ("mona", "routing", "longest") for target in "ab"]
    assert [near for _, near in shown] == [2, *range(2, 8)]
    filled = [[len(line.split()) > 2 for line in lines[2:]] for lines, _ in shown]
    assert filled == [[i < done for i in range(6)] for done in range(7)]
    last = shown[-1][0]
    assert last[0].split() == ["method", "target", "rows", "precision", "5–95", "%", "seconds"]
    assert last[2].split()[2] == "8" and "did not run" in last[4]
    compare(config, note=notes.append)
    assert [one.partition(":")[0] for one in notes[-6:]] == [
        "mona on a", "mona on b", "routing on a did not run", "routing on b did not run", "longest on a", "longest on b",
    ]  # fmt: skip


def test_all_methods() -> None:
    names = [one.label for one in methods_of("random(seed=3), all", 0)]
    assert names[0] == "random(seed=3)" and {"mona", "nait", "bm25", "encoder", "random"} <= set(names)
    assert not {"subset", "matched-random"} & set(names), "these need rows or a selection"
    assert not {"less", "gist", "igds", "mates"} & set(names), "these take hours"
    assert "gist" in [one.label for one in methods_of("all,gist", 0)]


def test_run_again_it_makes_only_what_is_missing(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two methods, it goes on there; other rows, options or exemplars are other selections."""
    made: list[tuple[str, str]] = []
    before = Job.select

    def select(job: Job, options: Any) -> Selection:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((job.chosen.label, next(iter(job.targets))))
        return before(job, options)

    monkeypatch.setattr(Job, "select", select)
    with pytest.raises(KeyboardInterrupt):
        compared(options, tmp_path / "out", methods="mona,hidden", k=8)
    assert made == [("mona", "a"), ("mona", "b")]
    assert len((tmp_path / "out" / "compare.csv").read_text().splitlines()) == 3, "what is done so far"

    def again(**more: Any) -> list[tuple[str, str]]:
        made.clear()
        counted = Pass(monkeypatch)
        found = compared(options | more.pop("options", {}), tmp_path / "out", **({"methods": "mona,hidden"} | more))
        assert len(found.lines) == len(list(csv.DictReader((tmp_path / "out" / "compare.csv").open())))
        assert 60 not in counted.seen or "nait" in more.get("methods", ""), "the pool's signals are there"
        return list(made)

    monkeypatch.setattr(
        Job, "select", lambda job, o: made.append((job.chosen.label, next(iter(job.targets)))) or before(job, o)
    )
    assert again() == [("hidden", "a"), ("hidden", "b")]
    assert again() == []
    assert again(methods="hidden,mona,nait") == [("nait", "a"), ("nait", "b")]
    assert again(k=9) == [("mona", "a"), ("mona", "b"), ("hidden", "a"), ("hidden", "b")]
    other = (options["target"][0], options["target"][1].replace("b.jsonl", "a.jsonl"))
    assert again(k=9, options={"target": other}) == [("mona", "b"), ("hidden", "b")]
    scores = tmp_path / "out" / "mona" / "a" / "scores.parquet"
    scores.write_bytes(scores.read_bytes()[:-9])
    assert again(k=9, options={"target": other}) == [("mona", "a")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": "mona,mono"}, "method='mono': unknown method; did you mean mona"),
        ({"methods": "mona,mona"}, "methods='mona': is named twice"),
        ({"methods": "all,mona"}, "methods='mona': is named twice"),
        ({"methods": "subset:me/a-b,subset:me-a/b"}, "methods='subset:me-a/b': has the same folder as 'subset:me/a-b'"),
        ({"methods": "mona,"}, "methods=.*: must be names"),
        ({"methods": "nait(direction=up)"}, "direction='up': must be one of svd, pca, mean"),
        ({"methods": "nait(way=up)"}, "unknown option of method 'nait'"),
        ({"target": ()}, "target: name at least one target|name at least one target"),
        ({"target": ("capability:x",)}, "belongs to one method"),
        ({"related": {"c": "s1"}}, "related='c': is no target; targets: a, b"),
        ({"related": {"a": "s1"}, "source_column": "origin"}, "source_column='origin': the pool has no such column"),
        ({"pool": "bundled:pols"}, "unknown bundled rows; did you mean bundled:pool"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    change: dict[str, Any], message: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NeuronFeatureExtractor, "from_options", lambda *a, **b: pytest.fail("a model was loaded"))
    with pytest.raises(NeuronSelectError, match=message):
        compared(options, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(NeuronSelectError, match="exists and is not a comparison's folder"):
        compared(options, tmp_path)


def test_names_of_methods(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b" / "a"):
        folder.mkdir(parents=True)
    found = methods_of(" mona , nait(normalize=true, direction=mean),random ", 5)
    assert [one.label for one in found] == ["mona", "nait(normalize=true,direction=mean)", "random"]
    assert found[1].method.options == {
        "reading": "content", "ends": None, "direction": "mean", "candidate": "drift", "normalize": True,
    }  # fmt: skip
    assert [one.method.options for one in found if one.draws] == [{"seed": 5}]
    twins = methods_of(f"deita(quality_scorer={tmp_path}/a),deita(quality_scorer={tmp_path}/b/a)", 0)
    assert [one.label for one in twins] == ["deita(quality_scorer=a)", f"deita(quality_scorer={tmp_path}/b/a)"]
    with pytest.raises(NeuronSelectError, match="is named twice"):
        methods_of("random(seed=7),random(seed= 7)", 5)
    one = f"deita(quality_scorer={tmp_path}/a)"
    with pytest.raises(NeuronSelectError, match="is named twice"):
        methods_of(f"{one},{one}", 0)
    assert methods_of("random(seed=7)", 5)[0].method.options == {"seed": 7}
    assert [slug(one.label) for one in found] == ["mona", "nait-normalize=true-direction=mean", "random"]


def test_what_targets_have_in_common_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = compared(options, out, methods="mona,random,full", k=20)
    picks = {(method, target): set(one.indices.tolist()) for (method, target), one in found.selections.items()}
    a, b = picks["mona", "a"], picks["mona", "b"]
    overlaps = {
        (one["method"], one["target"], one["other"]): one for one in csv.DictReader((out / "target_overlap.csv").open())
    }
    assert int(overlaps["mona", "a", "b"]["rows"]) == len(a & b) > 0 and int(overlaps["mona", "a", "a"]["rows"]) == 20
    assert float(overlaps["mona", "b", "a"]["overlap"]) == len(a & b) / len(a | b)
    cores = {one["method"]: one for one in csv.DictReader((out / "core.csv").open())}
    assert int(cores["mona"]["rows"]) == len(a & b) and float(cores["mona"]["share"]) == len(a & b) / len(a | b)
    p = 20 / 60
    assert float(cores["mona"]["by_chance"]) == pytest.approx(p * p / (1 - (1 - p) ** 2))
    assert set(cores) == {"mona"}, "random and full pick the same rows for every target"
    tokens = found.selections["mona", "a"].scores.column("n_tokens").to_numpy()
    assert float(cores["mona"]["tokens"]) == round(float(tokens[sorted(a & b)].mean()), 2)
    sets = {one["targets"]: int(one["rows"]) for one in csv.DictReader((out / "target_sets.csv").open()) if one["method"] == "mona"}  # fmt: skip
    assert sets == {"a": len(a - b), "b": len(b - a), "a+b": len(a & b)}
    rows_of = [one for one in pq.read_table(out / "picks.parquet").to_pylist() if one["method"] == "mona"]
    assert {one["row"] for one in rows_of if one["targets"] == 2} == a & b
    assert all(one["picked_for"] == [name for name, of in (("a", a), ("b", b)) if one["row"] in of] for one in rows_of)
    mix = found.row_sources[sorted(a & b)]
    share = max(np.mean(mix == name) for name in set(mix))
    (line,) = (one for one in (out / "compare.md").read_text().splitlines() if one.startswith("| mona | 2 |"))
    assert f"{share:.0%}" in line and "s0" in line
    compared(options, out, methods="mona,random,full", k=20, examples=False)
    assert "s0" not in (out / "compare.md").read_text() + (out / "compare.html").read_text()
    (line,) = (
        one for one in csv.DictReader((out / "cosines.csv").open()) if (one["target"], one["other"]) == ("a", "b")
    )
    of_a, of_b = (found.jobs["mona", name].fit().targets[name]["prototype"] for name in "ab")
    n = min(len(of_a), len(of_b))
    cosine = of_a[:n] @ of_b[:n] / np.linalg.norm(of_a) / np.linalg.norm(of_b)
    assert (line["method"], line["block"]) == ("mona", "0") and float(line["cosine"]) == pytest.approx(cosine)
    # with one target there is nothing in common, and no old file stays
    compared(options | {"target": options["target"][:1]}, out, methods="mona", k=20)
    assert not [
        name for name in ("core.csv", "picks.parquet", "target_sets.csv", "cosines.csv") if (out / name).exists()
    ]
