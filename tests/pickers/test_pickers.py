"""Pickers against slow references in float64, and in selections: each exemplar's scores, records, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_extractor, rows
from typer.testing import CliRunner

from hf_neuronselect import NeuronSelectError, NeuronSelector
from hf_neuronselect.cli.app import app
from hf_neuronselect.methods import make_method
from hf_neuronselect.methods.each import EachExemplar
from hf_neuronselect.pickers import PICKERS, Picker, picker_of
from hf_neuronselect.pickers.vectors import Vectors
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.extractor import NeuronFeatureExtractor

N, M = 24, 5
EACH = sorted(name for name in PICKERS.names() if PICKERS[name].each)


def batch(name: str, vectors: np.ndarray, *, sparse: bool = False) -> RowBatch:
    index, usable = np.arange(len(vectors)), np.ones(len(vectors), bool)
    if not sparse:
        return RowBatch(index, usable, {name: list(vectors.astype(np.float32))})
    columns = {f"{name}_indices": [np.flatnonzero(v).astype(np.int32) for v in vectors],
               f"{name}_values": [v[v != 0].astype(np.float32) for v in vectors]}  # fmt: skip
    return RowBatch(index, usable, columns)


@pytest.fixture(params=range(4))
def table(request: pytest.FixtureRequest) -> np.ndarray:
    """Scores ``[N, M]``, some of them equal."""
    found = np.random.default_rng(request.param).normal(size=(N, M))
    return found.round(1) if request.param % 2 else found


@pytest.fixture
def valid() -> np.ndarray:
    found = np.ones(N, bool)
    found[[3, 17]] = False
    return found


def ranked(scores: np.ndarray, valid: np.ndarray) -> list[int]:
    return sorted(np.flatnonzero(valid).tolist(), key=lambda i: (-scores[i], i))


def test_global_max_is_one_choice_after_the_other(table: np.ndarray, valid: np.ndarray) -> None:
    left, taken = set(np.flatnonzero(valid).tolist()), []
    while left:
        best = min((-table[i, j], i) for i in left for j in range(M))[1]
        left.remove(best)
        taken.append(best)
    assert picker_of("global-max").order(table, valid).tolist() == taken


@pytest.mark.parametrize("lose", [False, True])
def test_round_robin(table: np.ndarray, valid: np.ndarray, lose: bool) -> None:
    left = [ranked(table[:, j], valid) for j in range(M)]
    taken: list[int] = []
    while len(taken) < valid.sum():
        for own in left:
            while own:
                row = own.pop(0)
                if row not in taken:
                    taken.append(row)
                    break
                if lose:
                    break
    picker = picker_of(f"round-robin(taken={'lose' if lose else 'skip'})")
    assert picker.order(table, valid).tolist() == taken


def test_knn(table: np.ndarray, valid: np.ndarray) -> None:
    share = dict.fromkeys(range(N), 0)
    for j in range(M):
        for row in ranked(table[:, j], valid)[:4]:
            share[row] += 1
    wanted = sorted(np.flatnonzero(valid).tolist(), key=lambda i: (-share[i], -table[i].max(), i))
    assert picker_of("knn(neighbours=4)").order(table, valid).tolist() == wanted
    # more neighbours than rows: all have the same share
    assert picker_of("knn").order(table, valid).tolist() == ranked(table.max(axis=1), valid)


@pytest.mark.parametrize("sparse", [False, True])
def test_kde_gives_crowds_one_place(table: np.ndarray, valid: np.ndarray, sparse: bool) -> None:
    draw = np.random.default_rng(7)
    vectors = np.maximum(draw.normal(size=(N, 6)), 0) + 0.01
    vectors[:8] = vectors[0] * draw.uniform(0.5, 2, size=(8, 1))  # a crowd
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = [ranked(table[:, j], valid)[:6] for j in range(M)]
    everyone = sorted({row for own in nearest for row in own})
    density = {i: sum(max(0.0, 1 - (2 - 2 * unit[i] @ unit[k]) / 0.8**2) for k in everyone) for i in everyone}
    share = dict.fromkeys(range(N), 0.0)
    for own in nearest:
        total = sum(1 / density[i] for i in own)
        for i in own:
            share[i] += 1 / density[i] / total
    picker: Any = picker_of("kde(neighbours=6,width=0.8)")
    order = picker.order(table, valid, None, Vectors.of([batch("v", vectors, sparse=sparse)], "v")).tolist()
    assert sorted(order) == np.flatnonzero(valid).tolist()
    got = [share[i] for i in order]
    assert all(a >= b - 1e-5 for a, b in zip(got, got[1:], strict=False)) and got[0] > 0


def test_transport_is_the_fixed_point_of_its_equations(table: np.ndarray, valid: np.ndarray) -> None:
    pytest.importorskip("ot")
    blur, relax, part = 0.1, 0.3, table[valid]
    cost = (part.max() - part) / (part.max() - part.min())
    a, b = np.full(len(part), 1 / len(part)), np.full(M, 1 / M)
    kernel, u, v = np.exp(-cost / blur) * a[:, None] * b[None, :], np.ones(len(part)), np.ones(M)
    for _ in range(20_000):
        u = (a / (kernel @ v)) ** (relax / (relax + blur))
        v = b / (kernel.T @ u)
    mass = (u[:, None] * kernel * v[None, :]).sum(axis=1)
    order = picker_of(f"transport(blur={blur},relax={relax})").order(table, valid)
    assert sorted(order.tolist()) == np.flatnonzero(valid).tolist()
    place = {int(row): i for i, row in enumerate(np.flatnonzero(valid))}
    got = [mass[place[int(row)]] for row in order]
    assert all(x >= y - 1e-6 for x, y in zip(got, got[1:], strict=False))
    few = picker_of("transport(candidates=4)").order(table, valid).tolist()
    assert sorted(few[:4]) == sorted(ranked(table.max(axis=1), valid)[:4])
    assert few[4:] == ranked(table.max(axis=1), valid)[4:]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("wanted", [None, 5])
def test_diverse_passes_over_rows_near_to_one_that_is_taken(sparse: bool, wanted: int | None) -> None:
    draw = np.random.default_rng(1)
    vectors = np.maximum(draw.normal(size=(400, 3)), 0) + 0.01
    scores, valid = draw.normal(size=400), draw.random(400) < 0.9
    unit, taken = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), []
    for i in ranked(scores, valid):
        if all(unit[i] @ unit[k] <= 0.99 for k in taken):
            taken.append(i)
    found = picker_of("diverse(cosine=0.99)").order(
        scores, valid, wanted, Vectors.of([batch("v", vectors[:150], sparse=sparse),
                                           batch("v", vectors[150:], sparse=sparse)], "v")
    ).tolist()  # fmt: skip
    sure = len(taken) if wanted is None else wanted
    assert found[:sure] == taken[:sure] and 5 < len(taken) < 300
    assert sorted(found) == np.flatnonzero(valid).tolist()
    if wanted is None:
        assert found[sure:] == [i for i in ranked(scores, valid) if i not in taken]


def test_cover_takes_rows_with_a_new_feature() -> None:
    draw = np.random.default_rng(2)
    vectors = np.maximum(draw.normal(size=(60, 8)) - 0.5, 0)
    vectors[5] = 0
    scores, valid = draw.normal(size=60), draw.random(60) < 0.9
    valid[5] = True
    bar = np.quantile(vectors[valid][vectors[valid] > 0].astype(np.float32), 0.5)
    left, taken = ranked(scores, valid), []
    while True:
        covered: set[int] = set()
        for i in list(left):
            own = set(np.flatnonzero(vectors[i].astype(np.float32) > bar).tolist())
            if own - covered:
                covered |= own
                taken.append(i)
                left.remove(i)
        if not covered:
            break
    picker, of_rows = picker_of("cover(strong=0.5)"), Vectors.of([batch("v", vectors, sparse=True)], "v")
    assert picker.order(scores, valid, None, of_rows).tolist() == taken + left
    with pytest.raises(NeuronSelectError, match="by=mona"):
        picker.order(scores, valid, None, Vectors.of([batch("v", vectors)], "v"))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), name=st.sampled_from(PICKERS.names()))
def test_every_valid_row_is_ordered_once(seed: int, name: str) -> None:
    if name == "transport":
        pytest.importorskip("ot")
    draw = np.random.default_rng(seed)
    vectors = Vectors.of([batch("v", np.maximum(draw.normal(size=(9, 4)), 0), sparse=True)], "v")
    scores, valid = draw.normal(size=(9, 3)).round(1), draw.random(9) < 0.7
    valid[0] = True
    order = picker_of(name).order(scores, valid, None, vectors)
    assert order.dtype == np.int64 and sorted(order.tolist()) == np.flatnonzero(valid).tolist()


# --------------------------------------------------------------------------------- each exemplar
@pytest.mark.parametrize("method", ["mona", "hidden", "rds-plus", "nag", "mona(centre=pool)"])
def test_each_exemplar_scores_as_one_fitted_alone(method: str) -> None:
    name, _, option = method.rstrip(")").partition("(")
    one = make_method(name, dict([option.split("=")]) if option else {})
    signal, draw = one.signals[0], np.random.default_rng(0)
    if signal == "strongest_neurons":
        pool, exemplars = (RowBatch(np.arange(n), np.ones(n, bool), {signal: list(draw.integers(0, 9, size=(n, 4)).astype(np.int32))})
                           for n in (12, 3))  # fmt: skip
    else:
        pool, exemplars = (
            batch(signal, np.maximum(draw.normal(size=(n, 6)), 0), sparse=signal == "mona") for n in (12, 3)
        )
    each = EachExemplar(one)
    targets = {"a": each.fit(exemplars), "b": each.fit(exemplars.take(np.asarray([1])))}
    alone = {str(i): one.fit(exemplars.take(np.asarray([i]))) for i in range(3)}
    fitted: Any = targets
    if each.observes:
        states = each.start(), one.start()  # type: ignore[attr-defined]
        each.observe(states[0], pool)
        one.observe(states[1], pool)  # type: ignore[attr-defined]
        fitted, alone = each.finish(states[0], targets), dict(one.finish(states[1], alone))  # type: ignore[attr-defined]
    found, wanted = each.scorer(fitted)(pool), one.scorer(alone)(pool)
    np.testing.assert_array_equal(found["a"], np.stack([wanted[str(i)] for i in range(3)], axis=1))
    np.testing.assert_array_equal(found["b"][:, 0], wanted["1"])


@pytest.fixture(scope="module")
def extractor(tiny_folder: Path) -> NeuronFeatureExtractor:
    return make_extractor(tiny_folder)


@pytest.mark.parametrize("picker", [*EACH, "diverse(cosine=0.5)", "cover(by=mona)", "kde(by=hidden)"])
def test_a_selection_by_any_picker_is_recorded_and_made_again(
    picker: str, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    if picker == "transport":
        pytest.importorskip("ot")
    pool, target = rows(40, 1), rows(5, 2)
    selector = NeuronSelector("mona", picker=picker).fit({"t": target}, extractor=extractor)
    selection = selector.select(pool, k=6)
    assert len(selection) == 6
    recorded = selection.provenance.method
    assert recorded is not None and recorded.picker == str(picker_of(picker))
    selector.save_pretrained(tmp_path / "capability")
    again = NeuronSelector.from_pretrained(tmp_path / "capability")
    assert str(again.picker) == str(picker_of(picker))
    assert again.select(pool, k=6, extractor=extractor).indices.tolist() == selection.indices.tolist()
    if PICKERS[picker_of(picker).name].each:
        table = selection.scores.column("score").to_numpy()
        mean = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=6)
        assert not np.allclose(table, mean.scores.column("score").to_numpy())


def test_the_methods_own_picker_is_not_recorded(extractor: NeuronFeatureExtractor) -> None:
    pool, target = rows(20, 1), rows(3, 2)
    named = NeuronSelector("mona", picker="best-first").fit({"t": target}, extractor=extractor).select(pool, k=3)
    assert named.provenance.method is not None and named.provenance.method.picker is None


def test_several_targets_are_picked_for_one_after_the_other(extractor: NeuronFeatureExtractor) -> None:
    pool = rows(40, 1)
    targets = {"a": rows(4, 2), "b": rows(3, 3)}
    selector = NeuronSelector("mona", picker="round-robin").fit(targets, extractor=extractor)
    both = selector.select(pool, k=8).indices.tolist()
    for name, target in targets.items():
        alone = NeuronSelector("mona", picker="round-robin").fit({name: target}, extractor=extractor)
        assert set(alone.select(pool, k=4).indices.tolist()) <= set(both)


@pytest.mark.parametrize(
    ("picker", "words"),
    [
        ("nearest", "unknown picker"),
        ("knn(", r"must be a name, or name\(option=value"),
        ("knn(k=3)", "option of picker 'knn'"),
        ("knn(neighbours=0)", "at least 1"),
        ("kde(width=0)", "must be above 0"),
        ("diverse(cosine=1)", r"must lie in \[-1, 1\)"),
        ("cover(strong=1)", r"must lie in \[0, 1\)"),
        ("transport(blur=0)", "must be above 0"),
    ],
)
def test_a_picker_that_cannot_be_is_refused(picker: str, words: str) -> None:
    with pytest.raises(NeuronSelectError, match=words):
        picker_of(picker).check()


def test_what_does_not_go_together_is_refused(
    extractor: NeuronFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NeuronSelectError, match="lets exemplars choose, and random has none"):
        NeuronSelector("random", picker="knn")
    with pytest.raises(NeuronSelectError, match=r"has none: name another signal, e.g. diverse\(by=hidden\)"):
        NeuronSelector("bm25", picker="diverse").fit({"t": rows(3)})
    with pytest.raises(NeuronSelectError, match="compares rows by vectors, and answer_loss has none"):
        NeuronSelector("mona", picker="diverse(by=answer_loss)").fit({"t": rows(3)}, extractor=extractor)
    with pytest.raises(NeuronSelectError, match="order that needs the whole pool"):
        NeuronSelector("mona", picker="knn").fit({"t": rows(3)}, extractor=extractor).select(
            rows(9).to_iterable_dataset(), k=2
        )
    monkeypatch.setattr("hf_neuronselect.pickers.base.find_spec", lambda name: None)
    with pytest.raises(NeuronSelectError, match=r"needs ot: pip install 'hf-neuronselect\[rivals\]'"):
        NeuronSelector("mona", picker="transport").fit({"t": rows(3)}, extractor=extractor)


def test_vectors_of_rows_that_have_none(extractor: NeuronFeatureExtractor) -> None:
    """An empty row has no vector, and is not picked."""
    pool = Dataset.from_list([*rows(12, 4).remove_columns(["source", "id"]), {"messages": []}])
    found = NeuronSelector("longest", picker="diverse(by=hidden)").select(pool, ratio=1.0, extractor=extractor)
    assert sorted(found.indices.tolist()) == list(range(12))


def test_on_the_command_line(tmp_path: Path, tiny_folder: Path) -> None:
    pool, target = tmp_path / "pool.jsonl", tmp_path / "target.jsonl"
    rows(30, 1).to_json(pool)
    rows(4, 2).to_json(target)
    words = ["--pool", str(pool), "--target", f"t={target}", "--k", "4", "--model", str(tiny_folder / "model"),
             "--sae", str(tiny_folder / "sae")]  # fmt: skip
    run = CliRunner().invoke(app, ["select", *words, "--picker", "knn(neighbours=2)", "--out", str(tmp_path / "one")])
    assert run.exit_code == 0, run.output
    assert "--picker 'knn(neighbours=2)'" in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    run = CliRunner().invoke(
        app, ["compare", *words, "--methods", "mona,random", "--picker", "round-robin,knn(neighbours=2)",
              "--out", str(tmp_path / "grid")],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    table = (tmp_path / "grid" / "compare.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",t,")[0].strip('"') for line in table[1:]] == [
        "mona + round-robin(taken=skip)", "mona + knn(neighbours=2)", "random",
    ]  # fmt: skip


def test_a_picker_of_ones_own() -> None:
    from hf_neuronselect.pickers import register_picker
    from hf_neuronselect.pickers.base import best_first

    @register_picker
    class WorstFirst(Picker):
        name = "worst-first"

        def order(
            self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
        ) -> np.ndarray:
            return best_first(scores, valid)[::-1]

    try:
        pool = Dataset.from_dict({"text": ["a", "aa", "aaa"]})
        assert (
            NeuronSelector("random", picker="worst-first").select(pool, k=3).indices.tolist()
            == (NeuronSelector("random").select(pool, k=3).indices.tolist()[::-1])
        )
    finally:
        PICKERS.remove("worst-first")
