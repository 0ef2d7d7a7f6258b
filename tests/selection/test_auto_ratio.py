"""Ratio auto: each proxy against a slow reference and where its answer is known; what is refused; the record."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.core.configs import CompareConfig, SelectConfig
from hf_neuronselect.core.provenance import AutoRatio, Budget
from hf_neuronselect.pickers.best_first import BestFirst
from hf_neuronselect.pickers.vectors import Vectors
from hf_neuronselect.pipelines.recipe import control_config
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.selection.auto_ratio import (
    combined,
    effective_number,
    estimate_ratio,
    knee,
    mean_features,
    similarity,
)
from hf_neuronselect.selection.scores import PoolScores
from hf_neuronselect.signals.columns import RowBatch

quiet = pytest.mark.filterwarnings("ignore::hf_neuronselect.NeuronSelectWarning")
MONA = NeuronSelector("mona").method


# ----------------------------------------------------------------------------------------------- knee
@pytest.mark.parametrize("rate", [3.0, 10.0, 40.0])
def test_the_knee_of_an_exponential(rate: float) -> None:
    """Where the scaled curve's slope is -1: exp(-rate x) = (1 - exp(-rate)) / rate."""
    n = 20_001
    found, depth = knee(np.exp(-rate * np.arange(n) / (n - 1)))
    x = math.log(rate / -math.expm1(-rate)) / rate
    assert found / (n - 1) == pytest.approx(x, abs=2 / n)
    assert depth == pytest.approx(1 - x - (math.exp(-rate * x) - math.exp(-rate)) / -math.expm1(-rate), abs=1e-6)


@pytest.mark.parametrize("good", [1, 30, 250])
def test_the_knee_of_a_step_is_its_edge(good: int) -> None:
    found, depth = knee(np.repeat([5.0, -3.0], [good, 1000 - good]))
    assert found == good and depth == pytest.approx(1 - good / 999)


@pytest.mark.parametrize("total", [1000, 100_000])
def test_noise_has_a_knee_too(total: int) -> None:
    """Why the documentation says that a knee alone proves nothing: normal scores have one at 5 to 9 %, where papers cut."""
    found, depth = knee(np.sort(np.random.default_rng(0).normal(size=total))[::-1])
    assert 0.04 < found / total < 0.12 and 0.15 < depth < 0.3


scores_of_rows = st.lists(st.floats(-100, 100, allow_nan=False), min_size=2, max_size=40).filter(
    lambda values: max(values) - min(values) > 1e-3
)


@settings(deadline=None, max_examples=80)
@given(scores_of_rows, st.floats(0.01, 100), st.floats(-50, 50))
def test_the_knee_is_a_plain_loops_and_does_not_change_with_scale(values: list[float], by: float, to: float) -> None:
    scores = np.sort(np.asarray(values))[::-1]
    n, best, slow = len(scores), -math.inf, 0
    for i in range(n):
        line = 1 - i / (n - 1)
        below = line - (scores[i] - scores[-1]) / (scores[0] - scores[-1])
        if below > best + 1e-12:
            best, slow = below, i
    found, depth = knee(scores)
    assert depth == pytest.approx(best) and (found == slow or depth - best < 1e-9)
    assert knee(scores * by + to)[1] == pytest.approx(depth, abs=1e-9)


# ------------------------------------------------------------------------------------------- features
def vectors(dense: np.ndarray, sparse: bool) -> Vectors:
    """Vectors of these rows, as a scan collects them."""
    every, usable = np.arange(len(dense)), np.ones(len(dense), bool)
    if not sparse:
        return Vectors.of([RowBatch(every, usable, {"hidden": list(dense.astype(np.float32))})], "hidden")
    columns = {"mona_indices": [np.flatnonzero(row).tolist() for row in dense],
               "mona_values": [row[row != 0].tolist() for row in dense]}  # fmt: skip
    return Vectors.of([RowBatch(every, usable, columns)], "mona")


@pytest.mark.parametrize("sparse", [True, False])
def test_mean_features_are_those_of_a_dense_table(sparse: bool) -> None:
    draw = np.random.default_rng(0)
    table = draw.random((30, 9)) * (draw.random((30, 9)) < 0.5) if sparse else draw.normal(size=(30, 9))
    table = table.astype(np.float32).astype(np.float64)
    table[:, 8] += 0.1 * sparse
    order, counts = draw.permutation(30), [1, 4, 5, 29]
    used = table if sparse else table / np.linalg.norm(table, axis=1, keepdims=True)
    for count, mean in zip(counts, mean_features(vectors(table, sparse), order, counts), strict=True):
        np.testing.assert_allclose(mean, used[order[:count]].mean(axis=0), rtol=1e-6, atol=1e-7)


def test_similarity_and_effective_number_by_hand() -> None:
    assert similarity(np.asarray([1.0, 2.0]), np.asarray([2.0, 1.0, 1.0]), True) == pytest.approx((1 + 1) / (2 + 2 + 1))
    assert similarity(np.asarray([3.0, 4.0]), np.asarray([-4.0, 3.0]), False) == 0
    assert similarity(np.asarray([3.0, 4.0]), np.asarray([6.0, 8.0]), False) == pytest.approx(1)
    assert similarity(np.zeros(2), np.zeros(2), True) == similarity(np.zeros(2), np.ones(2), False) == 0
    assert effective_number(np.asarray([0.0, 2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_number(np.asarray([-0.5, 0.25, 0.25])) == pytest.approx(2**1.5)
    assert effective_number(np.zeros(4)) == 0


def test_the_rule_is_the_median_on_a_log_scale() -> None:
    assert combined([0.01, 0.5, 0.07]) == 0.07
    assert combined([0.01, 0.25]) == 0.05  # of two, the geometric mean
    assert combined([0.0123456]) == 0.0123


# --------------------------------------------------------------------------------------- the estimate
def of_pool(scores: np.ndarray, vectors: Vectors | None = None, left_out: int = 0) -> PoolScores:
    n = len(scores)
    excluded = np.zeros(n, np.int8)
    excluded[:left_out] = 3
    no = np.zeros(n, bool)
    pool = Dataset.from_dict({"text": [""] * n})
    return PoolScores(pool, {"t": scores}, np.ones(n), no, excluded, "quota", None, BestFirst(), vectors)


def planted(good: int, total: int) -> tuple[np.ndarray, Vectors]:
    """Rows of the target's one feature, then of others; their scores."""
    table = np.zeros((total, 12))
    table[:good, 0] = 1.0
    table[np.arange(good, total), 1 + np.arange(total - good) % 11] = 1.0
    return np.where(np.arange(total) < good, 0.9, 0.1), vectors(table, True)


def test_planted_rows_are_found_by_every_proxy() -> None:
    scores, of_rows = planted(100, 1000)
    found = estimate_ratio(of_pool(scores, of_rows), MONA, {"prototype": np.asarray([1.0])}, ("mona",))
    assert found.estimates["knee"] == 0.1
    assert found.estimates["coverage"] == 0.02  # the smallest share of 20 rows: all shares up to 10 % are equally near
    assert found.shares[0] == 0.02 and found.shares[-1] == 1.0
    curve = dict(zip(found.shares, found.curves["coverage"], strict=True))
    assert curve[0.1] == 1 and curve[0.2] == pytest.approx(0.5 / 1.5)  # sum of minima 0.5, of maxima 1 + 0.5
    numbers = dict(zip(found.shares, found.curves["features"], strict=True))
    assert numbers[0.1] == 1 and numbers[1.0] == pytest.approx(
        math.exp(-0.1 * math.log(0.1) - 0.9 * math.log(0.9 / 11)), rel=1e-3
    )
    assert found.estimates["features"] == 0.02  # the exemplars have one feature
    assert found.ratio == combined(list(found.estimates.values())) == 0.02 and not found.absent
    # as many as 100 good rows have with 40 others: not yet at 10 %, but at 15 %
    mean = np.asarray([100, *[40 / 11] * 11]) / 140
    other = estimate_ratio(of_pool(scores, of_rows), MONA, {"prototype": mean}, ("mona",))
    assert other.estimates["features"] == 0.15
    many = estimate_ratio(of_pool(scores, of_rows), MONA, {"prototype": np.ones(20)}, ("mona",))
    assert many.absent["features"] == "no share of the pool has as many features as the exemplars"


@pytest.mark.parametrize("method", ["mona", "hidden"])
@pytest.mark.parametrize("seed", range(4))
def test_coverage_and_features_are_those_of_a_slow_loop(method: str, seed: int) -> None:
    """Rows that have one of six wanted features each, the first ones the same few, and then rows of other features."""
    draw, total, sparse = np.random.default_rng(seed), 400, method == "mona"
    table = np.abs(draw.normal(size=(total, 14))) * 0.05
    wanted = np.sort(draw.integers(0, 6, 120))
    table[np.arange(120), wanted] += 1.0
    table[np.arange(120, total), draw.integers(6, 14, 280)] += 1.0
    table = table.astype(np.float32).astype(np.float64)
    exemplars = np.concatenate([np.ones(6), np.full(8, 0.02)]) / 6
    scores = np.linspace(3, 0, total) ** 2
    found = estimate_ratio(
        of_pool(scores, vectors(table, sparse)), NeuronSelector(method).method, {"prototype": exemplars},
        ("mona" if sparse else "hidden",),
    )  # fmt: skip

    near, many = [], []
    for share in found.shares:
        rows = [row if sparse else row / math.sqrt(sum(x * x for x in row)) for row in table[: round(share * total)]]
        mean = [sum(row[f] for row in rows) / len(rows) for f in range(14)]
        if sparse:
            near.append(sum(map(min, mean, exemplars)) / sum(map(max, mean, exemplars)))
        else:
            dot = sum(a * b for a, b in zip(mean, exemplars, strict=True))
            near.append(dot / math.sqrt(sum(a * a for a in mean) * sum(b * b for b in exemplars)))
        many.append(math.exp(-sum(x / sum(mean) * math.log(x / sum(mean)) for x in mean)))
    enough = math.exp(-sum(x / sum(exemplars) * math.log(x / sum(exemplars)) for x in exemplars))
    np.testing.assert_allclose(found.curves["coverage"], near, rtol=1e-5)
    np.testing.assert_allclose(found.curves["features"], many, rtol=1e-5)
    best = max(near) - near[-1]
    covered = next(s for s, one in zip(found.shares, near, strict=True) if one - near[-1] >= 0.95 * best)
    assert found.estimates["coverage"] == covered and 0.05 < covered < 0.5
    assert (
        found.estimates["features"]
        == next(s for s, one in zip(found.shares, many, strict=True) if one >= enough)
        > 0.05
    )


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 1000), st.randoms(use_true_random=False))
def test_it_does_not_change_with_scale_or_the_order_of_rows(by: float, random: object) -> None:
    draw = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    scores = np.concatenate([draw.normal(9, 0.3, 40), draw.normal(0, 1, 260)])
    once = estimate_ratio(of_pool(scores), MONA, {})
    moved = draw.permutation(300)
    again = estimate_ratio(of_pool(scores[moved] * by), MONA, {})
    assert again.ratio == once.ratio and again.estimates == once.estimates


def test_shares_are_of_all_rows_read() -> None:
    scores, _ = planted(60, 200)
    whole = estimate_ratio(of_pool(scores), MONA, {})
    assert whole.estimates == {"knee": 0.3}
    fewer = estimate_ratio(of_pool(scores, left_out=20), MONA, {})  # 20 of the good rows cannot be selected
    assert fewer.estimates == {"knee": 0.2} and fewer.shares[-1] == 1.0
    assert whole.absent == dict.fromkeys(("coverage", "features"), "mona keeps no mean features of the exemplars")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.full(200, 0.5), r"ratio='auto': all rows have the same score \(0.5\): none is better than another"),
        (np.arange(99.0), "needs 100 rows that can be selected, and there are 99; give a number, or a larger pool"),
        (
            np.arange(200.0),
            "no ratio can be told: the scores fall evenly: .* keeps no mean features of the exemplars; give",
        ),
    ],
)
def test_scores_that_tell_nothing_are_refused(scores: np.ndarray, message: str) -> None:
    with pytest.raises(NeuronSelectError, match=message):
        estimate_ratio(of_pool(scores), MONA, {})


def test_ties_are_cut_between_two_levels() -> None:
    """Marks of a judge: the knee is where a level ends, never inside one."""
    scores = np.repeat([5.0, 4.5, 1.0], [30, 50, 420])
    assert estimate_ratio(of_pool(scores), MONA, {}).estimates == {"knee": 80 / 500}


# ------------------------------------------------------------------------------------ selecting with it
@pytest.fixture(scope="module")
def many() -> Dataset:
    return rows(160)


@quiet
@pytest.mark.parametrize("method", ["mona", "polysemantic", "hidden", "nait"])
def test_a_selection_by_auto(
    method: str, many: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    selector = NeuronSelector(method).fit({"t": target}, extractor=extractor)
    selection = selector.select(many, ratio="auto")
    made = selection.provenance
    assert made.auto is not None and made.budget == Budget(ratio=made.auto.ratio)
    assert selection.indices.tolist() == selector.select(many, ratio=made.auto.ratio).indices.tolist()
    known = {"knee", "coverage", "features"}
    assert set(made.auto.estimates) | set(made.auto.absent) == known
    assert all(len(curve) == len(made.auto.shares) for curve in made.auto.curves.values())
    if method == "nait":
        assert made.auto.absent["coverage"] == "nait keeps no mean features of the exemplars"
    selection.save_pretrained(tmp_path / "made")
    read = Selection.from_pretrained(tmp_path / "made").provenance
    assert read.auto == made.auto and json.loads((tmp_path / "made" / "selection.json").read_text())["auto"]["shares"]
    card, page = ((tmp_path / "made" / name).read_text() for name in ("README.md", "report.html"))
    assert f"| ratio | {made.auto.line} |" in card and f"--ratio {made.auto.ratio}" in card and made.auto.line in page
    assert selection.rethreshold(k=3).provenance.auto is None
    with pytest.raises(NeuronSelectError, match="ratio='auto': must be a number; select alone estimates a ratio"):
        selection.rethreshold(ratio="auto")  # type: ignore[arg-type]


def test_vectors_of_another_signal_are_not_compared_with_the_exemplars() -> None:
    scores, of_rows = planted(100, 1000)
    found = estimate_ratio(of_pool(scores, of_rows), MONA, {"prototype": np.asarray([1.0])}, ("hidden",))
    assert set(found.estimates) == {"knee"} and found.absent["coverage"] == "the picker compares rows by hidden"


@quiet
def test_what_auto_cannot_do_is_refused(many: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    for method in ("random", "longest", "full"):
        with pytest.raises(NeuronSelectError, match=f"ratio='auto': scores of {method} do not say how good a row is"):
            NeuronSelector(method).select(many, ratio="auto", extractor=extractor)
    two = NeuronSelector("mona").fit({"t": target, "u": target}, extractor=extractor)
    with pytest.raises(
        NeuronSelectError, match="estimates the ratio of one target, and there are 2; select for each alone"
    ):
        two.select(many, ratio="auto")
    one = NeuronSelector("mona").fit({"t": target}, extractor=extractor)
    with pytest.raises(NeuronSelectError, match=r"needs the scores of the whole pool: load it as a Dataset"):
        one.select(many.to_iterable_dataset(), ratio="auto")
    with pytest.raises(
        NeuronSelectError, match=r"give exactly one of ratio, k, threshold, max_tokens \(got ratio, k\)"
    ):
        one.select(many, ratio="auto", k=3)


@quiet
def test_the_command_takes_auto(many: Dataset, target: Dataset, tiny_folder: Path, tmp_path: Path) -> None:
    many.to_json(tmp_path / "pool.jsonl")
    target.to_json(tmp_path / "t.jsonl")
    given = {"pool": str(tmp_path / "pool.jsonl"), "target": (f"t={tmp_path / 't.jsonl'}",), "ratio": "auto",
             "model": str(tiny_folder / "model"), "sae": str(tiny_folder / "sae")}  # fmt: skip
    said: list[str] = []
    config = SelectConfig.from_mapping({**given, "out": tmp_path / "out"})
    auto = select(config, say=said.append).provenance.auto
    assert auto is not None and f"ratio {auto.line}" in said
    assert (
        control_config(config, "random", tmp_path, 7).k == 7
        and control_config(config, "random", tmp_path, 7).ratio is None
    )
    with pytest.raises(NeuronSelectError, match="scores of random do not say"):
        select(SelectConfig.from_mapping({**given, "method": "random", "out": tmp_path / "other"}))
    with pytest.raises(
        NeuronSelectError, match=r"exactly one of ratio, k, threshold, max_tokens \(got ratio, threshold\)"
    ):
        SelectConfig.from_mapping({**given, "threshold": 1, "out": tmp_path / "other"})
    with pytest.raises(NeuronSelectError, match="ratio='most': must be a number, or auto"):
        SelectConfig.from_mapping({**given, "ratio": "most", "out": tmp_path / "other"})
    with pytest.raises(NeuronSelectError, match="ratio='auto': must be a number"):
        CompareConfig(pool="p", target=("t",), ratio="auto", out=tmp_path)  # type: ignore[arg-type]


def test_the_line_names_ratio_and_proxies() -> None:
    assert (
        AutoRatio(ratio=0.07, estimates={"knee": 0.07, "coverage": 0.01}).line
        == "0.07, estimated by knee 0.07, coverage 0.01"
    )
