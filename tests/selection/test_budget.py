"""Budgets, ties and several targets against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.pickers.base import best_first
from hf_neuronselect.selection.budget import Budget, percentiles, pick

few_scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0]), min_size=1, max_size=30)


def one(
    scores: list[float], budget: Budget, valid: list[bool] | None = None, n_tokens: list[int] | None = None
) -> list[int]:
    n = len(scores)
    ok = np.ones(n, bool) if valid is None else np.asarray(valid)
    lengths = np.ones(n, np.int64) if n_tokens is None else np.asarray(n_tokens)
    return pick({"t": np.asarray(scores)}, ok, lengths, budget).indices.tolist()


@settings(deadline=None, max_examples=60)
@given(few_scores, st.integers(1, 40), st.data())
def test_k_takes_the_best_and_ties_go_to_the_smaller_row(scores: list[float], k: int, data: st.DataObject) -> None:
    valid = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    expected = sorted((i for i in range(len(scores)) if valid[i]), key=lambda i: (-scores[i], i))[:k]
    assert one(scores, Budget(k=k), valid) == expected


@pytest.mark.parametrize(("ratio", "total", "rows"), [(0.05, 4000, 200), (0.05, 10, 1), (0.05, 30, 2), (0.05, 29, 1),
                                                      (1.0, 7, 7), (0.001, 3, 1), (0.5, 5, 3)])  # fmt: skip
def test_ratio_rounds_half_up_of_all_rows_read(ratio: float, total: int, rows: int) -> None:
    assert Budget(ratio=ratio).rows(total) == rows == max(1, math.floor(ratio * total + 0.5))
    assert len(one([0.0] * total, Budget(ratio=ratio))) == rows


def test_ratio_counts_excluded_rows_but_takes_valid_ones() -> None:
    assert one([9, 8, 7, 6], Budget(ratio=0.5), [False, True, False, True]) == [1, 3]


def test_threshold_is_inclusive_and_max_tokens_stops_at_the_first_that_does_not_fit() -> None:
    assert one([0.2, 0.5, 0.7], Budget(threshold=0.5)) == [2, 1]
    assert one([3, 2, 1], Budget(max_tokens=10), n_tokens=[5, 6, 1]) == [0]
    assert one([3, 2, 1], Budget(max_tokens=11), n_tokens=[5, 6, 1]) == [0, 1]
    assert one([3.0], Budget(max_tokens=1), n_tokens=[5]) == []


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one"),
        ({"k": 1, "ratio": 0.5}, "exactly one"),
        ({"ratio": 0.0}, "0.05 keeps 5 %"),
        ({"ratio": 1.5}, r"\(0, 1\]"),
        ({"ratio": float("nan")}, "finite"),
        ({"threshold": float("inf")}, "finite"),
        ({"k": 0}, "at least 1"),
        ({"max_tokens": -3}, "at least 1"),
    ],
)
def test_bad_budgets(budget: dict, message: str) -> None:
    with pytest.raises(NeuronSelectError, match=message):
        Budget(**budget)


A = np.asarray([9.0, 8, 7, 6, 5, 4])
B = np.asarray([90.0, 1, 2, 3, 40, 50])
TWO, OK, ONES = {"a": A, "b": B}, np.ones(6, bool), np.ones(6, np.int64)


def test_quota_gives_each_target_its_best_then_refills() -> None:
    # a takes 0, 1 (first target one more of 3), b takes 0: the union lacks one, a's turn: row 2.
    assert pick(TWO, OK, ONES, Budget(k=3)).indices.tolist() == [0, 1, 2]
    # a: 0, 1; b: 0, 5; union 0, 1, 5; refill begins with a: row 2.
    assert pick(TWO, OK, ONES, Budget(k=4)).indices.tolist() == [0, 1, 5, 2]


def test_round_robin_skips_what_is_taken() -> None:
    assert pick(TWO, OK, ONES, Budget(k=4), aggregate="round_robin").indices.tolist() == [0, 5, 1, 4]
    by_tokens = pick(TWO, OK, ONES * 2, Budget(max_tokens=7), aggregate="round_robin")
    assert by_tokens.indices.tolist() == [0, 5, 1]


def test_rank_aggregates_do_not_see_the_scale_of_scores() -> None:
    for aggregate in ("mean", "max"):
        once = pick(TWO, OK, ONES, Budget(k=6), aggregate=aggregate).indices
        scaled = pick({"a": A * 1000, "b": B}, OK, ONES, Budget(k=6), aggregate=aggregate).indices
        np.testing.assert_array_equal(once, scaled)
    mean = pick(TWO, OK, ONES, Budget(k=6), aggregate="mean")
    expected = sum(percentiles(best_first(scores, OK), len(OK)) for scores in (A, B)) / 2
    np.testing.assert_allclose(mean.score, expected)
    only_b = pick(TWO, OK, ONES, Budget(k=2), aggregate="weighted", weights={"a": 0, "b": 2})
    assert only_b.indices.tolist() == [0, 5]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 25),
    st.integers(1, 3),
    st.integers(1, 30),
    st.integers(0, 999),
    st.sampled_from(["quota", "round_robin"]),
)
def test_several_targets_fill_the_budget_without_repeats(n: int, t: int, k: int, seed: int, aggregate: str) -> None:
    draw = np.random.default_rng(seed)
    scores = {f"t{i}": draw.integers(0, 4, n).astype(float) for i in range(t)}
    valid = draw.random(n) > 0.3
    picked = pick(scores, valid, np.ones(n, np.int64), Budget(k=k), aggregate=aggregate).indices
    assert len(set(picked.tolist())) == len(picked) == min(k, int(valid.sum()))
    assert valid[picked].all()
    for i, values in enumerate(scores.values()):
        share = min(k, int(valid.sum())) // t + (i < min(k, int(valid.sum())) % t)
        best = sorted(np.flatnonzero(valid), key=lambda j, values=values: (-values[j], j))[:share]
        if aggregate == "quota":
            assert set(best) <= set(picked.tolist())


def test_weights_and_thresholds_of_several_targets_are_checked() -> None:
    with pytest.raises(NeuronSelectError, match="needs a weight"):
        pick(TWO, OK, ONES, Budget(k=2), aggregate="weighted", weights={"a": 1})
    with pytest.raises(NeuronSelectError, match="different scales"):
        pick(TWO, OK, ONES, Budget(threshold=0.5))
    with pytest.raises(NeuronSelectError, match="must be one of quota"):
        pick(TWO, OK, ONES, Budget(k=2), aggregate="median")
