"""Intervals from resampled values, against scipy-free slow forms and known cases."""

from __future__ import annotations

import numpy as np
import pytest

from hf_neuronselect.core.intervals import Interval, auc_of, balanced_accuracy_of, difference_of, mean_of


def test_means_have_the_width_of_their_standard_error() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=400)
    found = mean_of(values)
    assert found.value == pytest.approx(values.mean())
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert mean_of(values) == found, "the same values, the same interval"


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    hits = [(found := mean_of(draw.normal(size=60))).low < 0 < found.high for _ in range(300)]  # type: ignore[operator]
    assert 0.9 <= np.mean(hits) <= 0.98


def test_aucs_are_counted_pair_by_pair() -> None:
    high, low = [3, 5, 5, 9, 2], [1, 5, 4, 2]
    slow = sum((h > one) + 0.5 * (h == one) for h in high for one in low) / 20
    found = auc_of(high, low)
    assert found.value == pytest.approx(slow) and found.low < slow < found.high  # type: ignore[operator]
    assert auc_of([2, 3], [0, 1]) == Interval(1.0, 1.0, 1.0)
    assert auc_of([1, 1], [1, 1]).value == 0.5


def test_differences_are_of_two_samples() -> None:
    draw = np.random.default_rng(1)
    one, other = draw.normal(1, 1, 200), draw.normal(0, 1, 100)
    found = difference_of(one, other)
    assert found.value == pytest.approx(one.mean() - other.mean())
    width = 1.96 * np.sqrt(one.var() / 200 + other.var() / 100)
    assert (found.high - found.low) / 2 == pytest.approx(width, rel=0.1)  # type: ignore[operator]


@pytest.mark.parametrize(("values", "told"), [([], ""), ([2.0], "2.00"), ([2.0, 2.0], "2.00 (2.00 to 2.00)")])
def test_few_values(values: list[float], told: str) -> None:
    assert mean_of(values).told() == told
    assert difference_of(values, [1.0]).value is None and auc_of([1.0], values).value is None


def test_balanced_accuracies_hold_the_truth_and_have_a_width() -> None:
    draw, held = np.random.default_rng(3), 0
    for _ in range(200):
        found = balanced_accuracy_of(draw.random(10) < 0.8, draw.random(12) < 0.3)
        assert found.low is not None and found.high is not None and found.low <= (found.value or 0) <= found.high
        held += found.low <= 0.75 <= found.high
    assert held >= 180  # 95 % of 200, less 4 standard deviations
    assert balanced_accuracy_of([True, True, False, True], [False, True]).value == (0.75 + 0.5) / 2
    sure = balanced_accuracy_of([True] * 10, [False] * 10)
    assert sure.told() == "1.00 (0.84 to 1.00)", "ten of ten twice is not certainty"
    always_yes = balanced_accuracy_of([True] * 10, [True] * 10)
    assert always_yes.value == 0.5 and always_yes.high is not None and always_yes.high > 0.5
    assert balanced_accuracy_of([], [True]).value is None
