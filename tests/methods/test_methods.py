"""Scores against the goldens and against slow float64 references written from the papers' formulas."""

from __future__ import annotations

import inspect
import textwrap

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GOLDENS, ROOT

from hf_neuronselect import Method, NeuronSelectError, NeuronSelector, NeuronSelectWarning, methods, register_method
from hf_neuronselect.methods import METHODS, PoolMethod, make_method
from hf_neuronselect.methods.base import exemplar_signals
from hf_neuronselect.methods.each import EachExemplar
from hf_neuronselect.pickers import picker_of
from hf_neuronselect.pickers.vectors import Vectors
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.kernels import widen


def sparse_batch(table: np.ndarray, column: str = "mona", arrow: bool = False) -> RowBatch:
    """Rows of a dense table as the sparse columns of a batch."""
    indices = [np.flatnonzero(row).astype(np.int32) for row in table]
    values = [row[i] for row, i in zip(table, indices, strict=True)]
    columns: dict = {f"{column}_indices": indices, f"{column}_values": values}
    if arrow:
        columns = {name: pa.array([v.tolist() for v in col]) for name, col in columns.items()}
    n = len(table)
    return RowBatch(np.arange(n), np.ones(n, bool), columns)


def dense_batch(column: str, table: np.ndarray) -> RowBatch:
    n = len(table)
    return RowBatch(np.arange(n), np.ones(n, bool), {column: list(table)})


def jaccard_reference(z: np.ndarray, target: np.ndarray) -> float:
    top = sum(min(float(a), float(b)) for a, b in zip(z, target, strict=True))
    bottom = sum(max(float(a), float(b)) for a, b in zip(z, target, strict=True))
    return top / bottom if bottom else 0.0


@pytest.mark.parametrize("arrow", [False, True])
def test_mona_golden(arrow: bool) -> None:
    golden = GOLDENS["mona"]
    samples = np.asarray([np.mean(tokens, axis=0) for tokens in golden["sample_token_features"]])
    exemplars = np.asarray([np.mean(tokens, axis=0) for tokens in golden["target_token_features"]])
    np.testing.assert_allclose(samples, golden["sample_embeddings"], atol=1e-12)
    mona = make_method("mona", {})
    fitted = mona.fit(sparse_batch(exemplars, arrow=arrow))
    np.testing.assert_allclose(np.pad(fitted["prototype"], (0, 1))[:4], golden["prototype"], atol=1e-12)
    np.testing.assert_allclose(mona.score(sparse_batch(samples, arrow=arrow), fitted), golden["jaccard"], rtol=1e-12)


def test_nait_golden() -> None:
    golden = GOLDENS["nait"]
    nait = make_method("nait", {"direction": "pca"})
    fitted = nait.fit(dense_batch("nait", np.asarray(golden["exemplar_drifts"])))
    np.testing.assert_allclose(fitted["directions"], golden["directions"], atol=1e-9)
    scores = nait.score(dense_batch("nait", np.asarray(golden["candidate_drifts"])), fitted)
    np.testing.assert_allclose(scores, golden["scores"], atol=1e-9)


vectors = st.lists(st.floats(0, 50, width=32).map(lambda x: x if x > 1e-3 else 0.0), min_size=5, max_size=5)


@settings(deadline=None, max_examples=80)
@given(st.lists(vectors, min_size=1, max_size=4), vectors)
def test_jaccard_properties(samples: list[list[float]], target: list[float]) -> None:
    """In [0, 1], symmetric, J(0, 0) = 0, 1 iff equal and nonzero, scale-free together; equal to the slow sum."""
    mona = make_method("mona", {})
    table, proto = np.asarray(samples), np.asarray(target)
    fitted = mona.fit(sparse_batch(proto[None]))
    scores = mona.score(sparse_batch(table), fitted)
    for row, score in zip(table, scores, strict=True):
        assert -1e-12 <= score <= 1 + 1e-12
        assert score == pytest.approx(jaccard_reference(row, proto), rel=1e-9, abs=1e-12)
        turned = mona.score(sparse_batch(proto[None]), mona.fit(sparse_batch(row[None])))[0]
        assert score == pytest.approx(turned, rel=1e-9, abs=1e-12)
        if np.array_equal(row, proto):
            assert score == pytest.approx(1.0 if row.any() else 0.0)
        elif row.any() or proto.any():
            assert score < 1 or np.allclose(row, proto, rtol=1e-6)
        doubled = mona.score(sparse_batch(2 * row[None]), mona.fit(sparse_batch(2 * proto[None])))[0]
        assert doubled == pytest.approx(score, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_other_metrics(metric: str) -> None:
    draw = np.random.default_rng(0)
    table = draw.random((7, 20)) * (draw.random((7, 20)) > 0.5)
    proto = table[:3].mean(axis=0)
    method = make_method("mona", {"metric": metric})
    scores = method.score(sparse_batch(table), method.fit(sparse_batch(table[:3])))
    for row, score in zip(table, scores, strict=True):
        cosine = row @ proto / np.sqrt((row @ row) * (proto @ proto))
        expected = cosine if metric == "cosine" else -np.sqrt(((row - proto) ** 2).sum())
        assert score == pytest.approx(expected, rel=1e-9)


def nait_reference(drifts: np.ndarray, candidates: np.ndarray, direction: str) -> np.ndarray:
    """By the eigenvectors of the covariance matrix, or of the second moments, instead of an SVD of the samples."""
    total = np.zeros(len(candidates))
    for block in range(drifts.shape[1]):
        d = drifts[:, block].astype(np.float64)
        mean = d.mean(axis=0)
        values, axes = np.linalg.eigh(np.cov((d - mean).T) if direction == "pca" else d.T @ d)
        v = axes[:, np.argmax(values)]
        v = -v if mean @ v < 0 else v
        total += candidates[:, block].astype(np.float64) @ v
    return total


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["svd", "pca"]))
def test_nait_reference(seed: int, normalize: bool, direction: str) -> None:
    draw = np.random.default_rng(seed)
    # One strong direction a block, so that the first component is well determined.
    axis = draw.normal(size=(3, 6))
    drifts = (draw.normal(size=(9, 3, 1)) * 3 + 1) * axis + 0.1 * draw.normal(size=(9, 3, 6))
    candidates = draw.normal(size=(5, 3, 6))
    nait = make_method("nait", {"normalize": normalize, "direction": direction})
    scores = nait.score(dense_batch("nait", candidates), nait.fit(dense_batch("nait", drifts)))
    if normalize:
        drifts = drifts / np.linalg.norm(drifts, axis=2, keepdims=True)
        candidates = candidates / np.linalg.norm(candidates, axis=2, keepdims=True)
    np.testing.assert_allclose(scores, nait_reference(drifts, candidates, direction), rtol=1e-7, atol=1e-8)


def test_nait_sign_and_centring_matter() -> None:
    """Directions point along the mean drift; those of the two readings differ."""
    draw = np.random.default_rng(3)
    drifts = draw.normal(size=(8, 2, 5)) + 2.0
    means, found = drifts.mean(axis=0), {}
    for direction in ("svd", "pca"):
        fitted = make_method("nait", {"direction": direction}).fit(dense_batch("nait", drifts))
        assert ((means * fitted["directions"]).sum(axis=1) >= 0).all()
        np.testing.assert_allclose(np.linalg.norm(fitted["directions"], axis=1), 1)
        found[direction] = fitted["directions"]
    assert np.abs((found["svd"] * found["pca"]).sum(axis=1)).max() < 0.95


def test_nait_refuses_too_little() -> None:
    nait = make_method("nait", {})
    with pytest.raises(NeuronSelectError, match="at least 2 exemplars"):
        nait.fit(dense_batch("nait", np.ones((1, 2, 3))))
    with pytest.raises(NeuronSelectError, match="identical"):
        nait.fit(dense_batch("nait", np.ones((4, 2, 3))))


def test_nait_warns_of_a_flat_spectrum() -> None:
    square = np.asarray([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])[:, None] + 0.01
    with pytest.warns(NeuronSelectWarning, match="not well determined"):
        make_method("nait", {}).fit(dense_batch("nait", square))


def test_nait_readings_name_their_signals() -> None:
    ours, paper = make_method("nait", {}), make_method("nait", {"reading": "paper"})
    assert (ours.signals, paper.signals) == (("nait",), ("nait_template",))
    mixed = make_method("nait", {"reading": "paper", "ends": "answer", "candidate": "last"})
    assert mixed.signals == ("nait_last",) and exemplar_signals(mixed) == ("nait_answer",)
    # The paper's centred direction of drifts that share a large part is another one than ours.
    drifts = np.random.default_rng(0).normal(size=(9, 2, 5)) * np.asarray([1, 1, 1, 1, 0.1]) + [0, 0, 0, 0, 3.0]
    v = [
        m.fit(dense_batch(m.signals[0], drifts))["directions"]
        for m in (ours, make_method("nait", {"direction": "pca"}))
    ]
    assert (v[0][:, 4] > 0.9).all() and (np.abs(v[1][:, 4]) < 0.5).all()


def test_nait_warns_of_weak_signs() -> None:
    """The exemplars vary along one axis and their mean drift points along another: the sign is chance."""
    spread = np.linspace(-1, 1, 9)[:, None, None] * np.asarray([[50.0, 0.0]] * 3)
    drifts = spread + np.asarray([0.0, 1.0]) + 0.01
    with pytest.warns(NeuronSelectWarning, match="in 3 of 3 blocks the exemplars' mean drift is nearly orthogonal"):
        fitted = make_method("nait", {"reading": "paper"}).fit(dense_batch("nait_template", drifts))
    assert (fitted["sign_cosine"] < 0.1).all()


def contrast_reference(answers: np.ndarray, contents: np.ndarray, exemplars: np.ndarray) -> np.ndarray:
    """methods.md, row by row and block by block."""

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / np.linalg.norm(vector)

    total = np.zeros(len(contents))
    for block in range(answers.shape[1]):
        mean_r, mean_a = answers[:, block].mean(axis=0), contents[:, block].mean(axis=0)
        of_pool = np.mean([unit(r - mean_r) for r in answers[:, block]], axis=0)
        v = unit(np.mean([unit(r - mean_r) for r in exemplars[:, block]], axis=0) - of_pool)
        total += [unit(a - mean_a) @ v for a in contents[:, block]]
    return total


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_nait_contrast_reference(batch: int) -> None:
    draw = np.random.default_rng(1)
    answers, contents, exemplars = (draw.normal(size=(n, 3, 6)) + 1 for n in (40, 40, 5))
    contrast = make_method("nait-contrast", {})
    assert isinstance(contrast, PoolMethod)
    fitted = {"t": contrast.fit(dense_batch("answer_mean", exemplars))}
    pool = RowBatch(np.arange(40), np.ones(40, bool), {"answer_mean": list(answers), "content_mean": list(contents)})
    state, passes = contrast.start(), 0
    while True:
        for start in range(0, 40, batch):
            contrast.observe(state, pool.take(np.arange(start, min(start + batch, 40))))
        passes += 1
        if not contrast.again(state):
            break
    target = contrast.finish(state, fitted)["t"]
    scores = contrast.score(pool, target)
    targets = {
        "t": target,
        "u": target | {"directions": target["directions"][::-1]},
        "v": target | {"mean": answers.mean(0)},
    }
    for name, found in contrast.scorer(targets)(pool).items():
        np.testing.assert_array_equal(found, contrast.score(pool, targets[name]))
        assert name == "t" or not np.allclose(found, scores)
    assert passes == 2
    np.testing.assert_allclose(scores, contrast_reference(answers, contents, exemplars.astype(np.float32)), rtol=1e-6)


def test_hidden_against_the_pool() -> None:
    draw = np.random.default_rng(0)
    vectors, exemplars = draw.normal(size=(6, 4)) + 3, draw.normal(size=(3, 4)) + 3
    hidden = make_method("hidden", {"centre": "pool"})
    assert isinstance(hidden, PoolMethod) and hidden.observes and not make_method("hidden", {}).observes
    state = hidden.start()
    hidden.observe(state, dense_batch("hidden", vectors[:2]))
    hidden.observe(state, dense_batch("hidden", vectors[2:]))
    fitted = hidden.finish(state, {"t": hidden.fit(dense_batch("hidden", exemplars))})["t"]
    scores = hidden.score(dense_batch("hidden", vectors), fitted)
    centre = vectors.mean(axis=0)
    proto = exemplars.mean(axis=0) - centre
    expected = [(v - centre) @ proto / np.linalg.norm(v - centre) / np.linalg.norm(proto) for v in vectors]
    np.testing.assert_allclose(scores, expected, rtol=1e-9)


def test_mona_against_the_pool() -> None:
    """Of each latent counts what lies above the pool's mean: the slow way, latent by latent."""
    draw = np.random.default_rng(0)
    pool, exemplars = (draw.random((n, 7)) * (draw.random((n, 7)) > 0.4) for n in (6, 3))
    exemplars[:, 5:] = 0  # the pool has latents that no exemplar has ...
    pool[:, 0] = 0  # ... and the other way round
    mona = make_method("mona", {"centre": "pool"})
    assert isinstance(mona, PoolMethod) and mona.observes and not make_method("mona", {}).observes
    state = mona.start()
    for part in (pool[:1], pool[1:]):
        mona.observe(state, sparse_batch(part))
    fitted = mona.finish(state, {"t": mona.fit(sparse_batch(exemplars))})["t"]
    scores = mona.score(sparse_batch(pool), fitted)
    centre = pool.astype(np.float32).mean(axis=0, dtype=np.float64)
    proto = np.maximum(exemplars.astype(np.float32).mean(axis=0, dtype=np.float64) - centre, 0)
    expected = []
    for row in pool:
        over = np.maximum(row - centre, 0)
        expected.append(np.minimum(over, proto).sum() / np.maximum(over, proto).sum())
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    why = mona.explain(sparse_batch(pool[:1]), fitted, None)
    over = np.maximum(pool[0].astype(np.float32) - centre, 0)
    assert why.total == pytest.approx(np.minimum(over, proto).sum(), rel=1e-6)


def test_rds_plus_lets_exemplars_take_turns() -> None:
    draw = np.random.default_rng(0)
    vectors, exemplars = draw.normal(size=(9, 4)), draw.normal(size=(3, 4))
    expected = [[v @ e / np.linalg.norm(v) / np.linalg.norm(e) for e in exemplars] for v in vectors]
    method = make_method("rds-plus", {})
    each = EachExemplar(method)
    scores = each.scorer({"t": each.fit(dense_batch("rds_plus", exemplars))})(dense_batch("rds_plus", vectors))["t"]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    target = method.fit(dense_batch("rds_plus", exemplars))
    mean = exemplars.mean(axis=0)
    of_mean = [v @ mean / np.linalg.norm(v) / np.linalg.norm(mean) for v in vectors]
    np.testing.assert_allclose(method.score(dense_batch("rds_plus", vectors), target), of_mean, rtol=1e-6)
    order = picker_of(method.default_picker).order(scores, np.ones(9, bool)).tolist()
    taken: list[int] = []
    for turn in range(9):
        column = [row[turn % 3] for row in expected]
        taken.append(max((i for i in range(9) if i not in taken), key=lambda i: column[i]))
    assert order == taken


def test_sae_diversity_counts_features_and_covers_them() -> None:
    table = np.asarray([[1.0, 0, 0, 0], [0.2, 3, 3, 0], [0, 3, 3, 0], [0, 0, 0, 2], [0, 0, 0, 0]])
    batch = sparse_batch(table)
    assert make_method("sae-diversity", {}).score(batch, {}).tolist() == [1, 3, 2, 1, 0]
    assert make_method("sae-diversity", {"strong": 0.5}).score(batch, {}).tolist() == [1, 2, 2, 1, 0]
    order = picker_of("cover(strong=0)").order(
        np.asarray([1.0, 3, 2, 1, 0]), np.ones(5, bool), None, Vectors.of([batch], "mona")
    )
    # above the quantile 0: all values but the smallest, 0.2 of row 1
    assert order.tolist() == [1, 0, 3, 2, 4]


def test_nag_counts_shared_neurons() -> None:
    def batch(lists: list[list[int]]) -> RowBatch:
        return RowBatch(
            np.arange(len(lists)),
            np.ones(len(lists), bool),
            {"strongest_neurons": [np.asarray(x, np.int32) for x in lists]},
        )

    nag = make_method("nag", {})
    target = nag.fit(batch([[1, 5, 9], [1, 5, 8], [1, 6, 8]]))
    scores = nag.score(batch([[1, 5, 8], [2, 6, 9], [0, 3, 4], [1, 5, 100]]), target)
    np.testing.assert_allclose(scores, [(1 + 2 / 3 + 2 / 3) / 3, (1 / 3 + 1 / 3) / 3, 0, (1 + 2 / 3) / 3])


def test_hidden_is_cosine() -> None:
    draw = np.random.default_rng(0)
    vectors, exemplars = draw.normal(size=(6, 4)), draw.normal(size=(3, 4))
    hidden = make_method("hidden", {})
    scores = hidden.score(dense_batch("hidden", vectors), hidden.fit(dense_batch("hidden", exemplars)))
    proto = exemplars.mean(axis=0)
    expected = [v @ proto / np.linalg.norm(v) / np.linalg.norm(proto) for v in vectors]
    np.testing.assert_allclose(scores, expected, rtol=1e-9)


def test_routing_is_jaccard() -> None:
    draw = np.random.default_rng(0)
    weights, exemplars = draw.random((4, 6)), draw.random((2, 6))
    routing = make_method("routing", {})
    scores = routing.score(dense_batch("routing", weights), routing.fit(dense_batch("routing", exemplars)))
    np.testing.assert_allclose(scores, [jaccard_reference(w, exemplars.mean(axis=0)) for w in weights], rtol=1e-9)


def test_random_is_keyed_by_seed_and_row() -> None:
    def score(index: list[int], seed: int) -> np.ndarray:
        n = len(index)
        batch = RowBatch(np.asarray(index), np.ones(n, bool), {})
        return make_method("random", {"seed": seed}).score(batch, {})

    whole = score(list(range(1000)), 0)
    np.testing.assert_array_equal(score([7, 3], 0), whole[[7, 3]])
    assert len(np.unique(whole)) == 1000 and 0 <= whole.min() and whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(whole, score(list(range(1000)), 1))[0, 1]) < 0.1


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit-equal whatever batch it stands in."""
    draw = np.random.default_rng(0)
    table = (draw.random((40, 30)) * (draw.random((40, 30)) > 0.6)).astype(np.float16)
    mona = make_method("mona", {})
    fitted = mona.fit(sparse_batch(table[:5]))
    whole = mona.score(sparse_batch(table), fitted)
    parts = np.concatenate([mona.score(sparse_batch(table[i : i + 3]), fitted) for i in range(0, 40, 3)])
    np.testing.assert_array_equal(whole, parts)


def test_unknown_names_give_the_near_ones() -> None:
    with pytest.raises(NeuronSelectError, match="did you mean mona"):
        make_method("mone", {})
    with pytest.raises(NeuronSelectError, match="did you mean metric"):
        make_method("mona", {"metrik": "cosine"})
    with pytest.raises(NeuronSelectError, match="jaccard, cosine"):
        make_method("mona", {"metric": "dot"})


def documented() -> str:
    """The example of a new method, as the package's documentation prints it."""
    return textwrap.dedent(str(inspect.getdoc(methods)).split("::", 1)[1]).strip()


def test_the_documented_method_runs_as_printed() -> None:
    """At most five lines, in the docstring and in docs/extend.md alike; nothing else is touched to add a method."""
    assert len(documented().splitlines()) <= 5
    assert f"```python\n{documented()}\n```" in (ROOT / "docs" / "extend.md").read_text()
    exec(documented(), {"np": np, "Method": Method, "register_method": register_method})  # noqa: S102
    try:
        pool = Dataset.from_dict({"text": ["no", "yes!!", "well!"]})
        selection = NeuronSelector("shouting").select(pool, k=2)
        assert selection.indices.tolist() == [1, 2]
        assert selection.dataset["neuron_score"] == [2.0, 1.0]
        with pytest.raises(NeuronSelectError, match="registered already"):
            register_method(type("Other", (Method,), {"name": "shouting"}))
    finally:
        METHODS.remove("shouting")


def test_every_float16_is_widened_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(widen(halves), halves.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(widen(halves)), np.signbit(halves))
    assert len(widen(halves[:0])) == 0


@pytest.mark.parametrize("metric", ["jaccard", "cosine", "euclidean"])
def test_several_targets_in_one_sweep(metric: str) -> None:
    """Bit-equal to each target by itself, also where a row has latents that no prototype knows."""
    draw = np.random.default_rng(0)
    table = (draw.random((50, 40)) * (draw.random((50, 40)) > 0.6)).astype(np.float32)
    mona = make_method("mona", {"metric": metric})
    targets = {f"t{i}": mona.fit(sparse_batch(table[i : i + 4, : 20 + 4 * i])) for i in range(5)}
    together = mona.scorer(targets)(sparse_batch(table))
    assert list(together) == list(targets)
    for name, target in targets.items():
        np.testing.assert_array_equal(together[name], mona.score(sparse_batch(table), target))


def test_values_that_are_not_finite_score_nan() -> None:
    table = np.asarray([[1.0, 2.0], [np.nan, 2.0], [np.inf, 2.0], [0.0, 0.0]], dtype=np.float16)
    mona = make_method("mona", {})
    scores = mona.score(sparse_batch(table), mona.fit(sparse_batch(table[:1])))
    np.testing.assert_array_equal(scores, [1.0, np.nan, np.nan, 0.0])
