"""What ``explain`` says adds up to the score, for every method, against sums written from the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_methods import dense_batch, sparse_batch

from hf_neuronselect.methods import METHODS, PoolMethod, make_method
from hf_neuronselect.methods.base import Method, Target
from hf_neuronselect.methods.each import EachExemplar
from hf_neuronselect.signals.columns import RowBatch

draw = np.random.default_rng(0)
SPARSE = draw.random((4, 12)) * (draw.random((4, 12)) > 0.4)
EXEMPLARS = draw.random((3, 12)) * (draw.random((3, 12)) > 0.4)
BLOCKS, BLOCK_EXEMPLARS = draw.normal(size=(4, 3, 5)), draw.normal(size=(3, 3, 5)) + 1
VECTORS, VECTOR_EXEMPLARS = draw.normal(size=(4, 6)), draw.normal(size=(3, 6))
TEXTS = ["Ann has 3 apples and 4 pears", "def add(x, y): return x + y", "the cat sat on the mat", "apples apples 3"]
TEXT_EXEMPLARS = ["How many apples has Ann?", "3 + 4 apples", "sat"]


def texts(words: list[str]) -> RowBatch:
    return RowBatch(np.arange(len(words)), np.ones(len(words), bool), {"words": words})


def finished(method: Method, exemplars: RowBatch, pool: RowBatch) -> Target:
    fitted = {"t": method.fit(exemplars)}
    if isinstance(method, PoolMethod) and method.observes:
        state = method.start()
        method.observe(state, pool)
        while method.again(state):
            method.observe(state, pool)
        return method.finish(state, fitted)["t"]
    return fitted["t"]


CASES: list[tuple[str, dict[str, Any], RowBatch, RowBatch]] = [
    ("nait", {}, dense_batch("nait", BLOCKS), dense_batch("nait", BLOCK_EXEMPLARS)),
    ("nait", {"normalize": True}, dense_batch("nait", BLOCKS), dense_batch("nait", BLOCK_EXEMPLARS)),
    (
        "nait-contrast", {},
        RowBatch(np.arange(4), np.ones(4, bool), {"content_mean": list(BLOCKS), "answer_mean": list(BLOCKS[::-1])}),
        RowBatch(np.arange(3), np.ones(3, bool), {"answer_mean": list(BLOCK_EXEMPLARS)}),
    ),
    ("hidden", {}, dense_batch("hidden", VECTORS), dense_batch("hidden", VECTOR_EXEMPLARS)),
    ("hidden", {"centre": "pool"}, dense_batch("hidden", VECTORS), dense_batch("hidden", VECTOR_EXEMPLARS)),
    ("rds-plus", {}, dense_batch("rds_plus", VECTORS), dense_batch("rds_plus", VECTOR_EXEMPLARS)),
    ("encoder", {}, dense_batch("embedding", VECTORS), dense_batch("embedding", VECTOR_EXEMPLARS)),
    (
        "nag", {}, dense_batch("strongest_neurons", np.stack([np.sort(draw.permutation(30)[:9]) for _ in range(4)])),
        dense_batch("strongest_neurons", np.stack([np.sort(draw.permutation(30)[:9]) for _ in range(3)])),
    ),
    ("bm25", {}, texts(TEXTS), texts(TEXT_EXEMPLARS)),
    ("bm25", {"queries": "max"}, texts(TEXTS), texts(TEXT_EXEMPLARS)),
    ("dsir", {"gumbel": False}, texts(TEXTS), texts(TEXT_EXEMPLARS)),
    ("zip-fit", {}, texts(TEXTS), texts(TEXT_EXEMPLARS)),
]  # fmt: skip


@pytest.mark.parametrize("with_exemplars", [False, True])
@pytest.mark.parametrize(("name", "options", "pool", "exemplars"), CASES, ids=lambda one: str(one)[:30])
def test_the_parts_add_up_to_the_score(
    name: str, options: dict[str, Any], pool: RowBatch, exemplars: RowBatch, with_exemplars: bool
) -> None:
    method = make_method(name, options)
    if not METHODS[name].tells_exemplars and with_exemplars:
        pytest.skip("says the same")
    target = finished(method, exemplars, pool)
    scores = method.scorer({"t": target})(pool)["t"]
    for i in range(len(pool)):
        why = method.explain(pool.take(np.asarray([i])), target, exemplars if with_exemplars else None)
        if why.unit:
            assert why.total == pytest.approx(float(scores[i]), rel=1e-5, abs=1e-9)
            assert (np.diff(why.amounts) <= 0).all() and (why.amounts != 0).all()
            assert len(why.ids) == len(why.amounts) and all(len(fact) == len(why.ids) for fact in why.facts.values())
        else:
            assert METHODS[name].tells_exemplars and "where the exemplars are given" in why.says


@pytest.mark.parametrize("name", ["mona", "polysemantic"])
@pytest.mark.parametrize("metric", ["jaccard", "cosine", "euclidean"])
def test_shares_of_units_sum_to_the_numerator(name: str, metric: str) -> None:
    method = make_method(name, {"metric": metric})
    target = method.fit(sparse_batch(EXEMPLARS, name))
    proto = EXEMPLARS.mean(axis=0)
    for row in SPARSE:
        batch = sparse_batch(row[None], name)
        why = method.explain(batch, target, None)
        score = float(method.score(batch, target)[0])
        if metric == "euclidean":
            assert not why.unit and "no parts" in why.says
            continue
        terms = {i: min(row[i], proto[i]) if metric == "jaccard" else row[i] * proto[i] for i in range(12)}
        assert why.total == pytest.approx(sum(terms.values()), rel=1e-6)
        assert dict(zip(why.ids.tolist(), why.amounts.tolist(), strict=True)) == pytest.approx(
            {i: value for i, value in terms.items() if value}, rel=1e-6
        )
        assert why.shares.sum() == pytest.approx(1) and why.signal == name
        below = np.maximum(row, proto).sum() if metric == "jaccard" else np.linalg.norm(row) * np.linalg.norm(proto)
        assert score == pytest.approx(why.total / below, rel=1e-6) and f"{score:.4f}" in why.says


def test_a_row_that_shares_nothing_has_no_parts() -> None:
    mona = make_method("mona", {})
    target = mona.fit(sparse_batch(np.asarray([[1.0, 0.0]])))
    for row in ([0.0, 2.0], [0.0, 0.0]):
        why = mona.explain(sparse_batch(np.asarray([row])), target, None)
        assert len(why.ids) == 0 and why.total == 0 and len(why.shares) == 0


def test_the_nearest_of_several_exemplars_explains() -> None:
    each = EachExemplar(make_method("mona", {}))
    target, row = each.fit(sparse_batch(EXEMPLARS)), sparse_batch(SPARSE[:1])
    scores = each.scorer({"t": target})(row)["t"][0]
    best = int(scores.argmax())
    why = each.explain(row, target, None)
    assert why.says.startswith(f"exemplar {best} of 3 is nearest; {scores[best]:.4f} = ")
    assert why.total == pytest.approx(np.minimum(SPARSE[0], EXEMPLARS[best]).sum(), rel=1e-6)
    near = EachExemplar(make_method("rds-plus", {}))
    target, row = near.fit(dense_batch("rds_plus", VECTOR_EXEMPLARS)), dense_batch("rds_plus", VECTORS[:1])
    why = near.explain(row, target, None)
    np.testing.assert_allclose(np.sort(near.scorer({"t": target})(row)["t"][0])[::-1], why.amounts)


def test_every_method_says_something() -> None:
    for name in METHODS.names():
        cls = METHODS[name]
        if cls.__module__.startswith("hf_neuronselect."):
            assert cls.explain is not Method.explain, name


@pytest.mark.parametrize("name", ["less", "gist"])
def test_gradients_are_told_by_exemplar(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpoints that were never trained: the parts are the formula's."""
    from types import SimpleNamespace

    method = make_method(name, {})
    signals = tuple(SimpleNamespace(name=f"g{i}", norm="norm") for i in range(2 if name == "less" else 1))
    cls = type(method)
    monkeypatch.setattr(cls, "signals", signals)
    monkeypatch.setattr(cls, "exemplar_signals", signals)
    monkeypatch.setattr(cls, "checkpoints", tuple(SimpleNamespace(rate=rate) for rate in (1.0, 3.0)[: len(signals)]))
    few = np.random.default_rng(1)
    columns = {one.name: list(few.normal(size=(3, 6))) for one in signals} | {"norm": few.random(3) + 1}
    exemplars = RowBatch(np.arange(3), np.ones(3, bool), columns)
    row = RowBatch(np.arange(1), np.ones(1, bool), {one.name: list(few.normal(size=(1, 6))) for one in signals})
    target = method.fit(exemplars)
    score = float(method.score(row, target)[0])
    found = method.explain(row, target, exemplars)
    assert found.unit == "exemplar" and found.total == pytest.approx(score, rel=1e-9)
    alone = method.explain(row, target, None)
    assert alone.total == pytest.approx(score) if name == "less" else "where the exemplars are given" in alone.says


def test_baselines_say_what_counts() -> None:
    row = RowBatch(np.asarray([7]), np.ones(1, bool), {"n_tokens": np.asarray([12])})
    assert "has 12 tokens" in make_method("longest", {}).explain(row, {}, None).says
    assert "few count" in make_method("shortest", {}).explain(row, {}, None).says
    drawn = make_method("random", {"seed": 3})
    assert f"{drawn.score(row, {})[0]:.4f} was drawn from seed 3" in drawn.explain(row, {}, None).says
    losses = RowBatch(np.asarray([0]), np.ones(1, bool), {"answer_loss": [1.0], "answer_alone_loss": [2.0]})
    assert make_method("ifd", {}).explain(losses, {}, None).says.startswith("0.5000; the answer's loss is 1.0000")
    losses.columns["answer_loss"][0] = 3.0  # type: ignore[index]
    assert make_method("ifd", {}).explain(losses, {}, None).says.startswith("none: above 1")
