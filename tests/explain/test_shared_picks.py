"""What picks for several targets have in common, against counting by hand with sets."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_neuronselect.explain.shared_picks import SharedPicks

N = 12
picks_of = st.dictionaries(st.sampled_from("abcd"), st.sets(st.integers(0, N - 1)), min_size=1)


def shared(picks: dict[str, set[int]], total: int = N) -> SharedPicks:
    return SharedPicks.of(
        {name: np.asarray(sorted(rows, reverse=True), np.int64) for name, rows in picks.items()}, total
    )


@given(picks_of)
def test_counts_are_those_of_sets(picks: dict[str, set[int]]) -> None:
    found, every = shared(picks), set().union(*picks.values())
    assert found.rows.tolist() == sorted(every)
    assert found.served.tolist() == [sum(row in one for one in picks.values()) for row in sorted(every)]
    for (i, one), (k, other) in product(enumerate(picks.values()), repeat=2):
        assert found.common[i, k] == len(one & other)
        assert found.overlap[i, k] == (len(one & other) / len(one | other) if one | other else 0)
    for core in found.cores:
        rows = [row for row in sorted(every) if sum(row in one for one in picks.values()) >= core.least]
        assert core.rows.tolist() == rows and core.share == len(rows) / max(1, len(every))
    assert [core.least for core in found.cores] == list(range(2, len(picks) + 1))
    assert sum(count for _, count in found.sets) == len(every)
    for names, count in found.sets:
        assert count == sum({name for name in picks if row in picks[name]} == set(names) for row in every)


def test_the_share_by_chance_is_that_of_draws() -> None:
    sizes, total = {"a": 30, "b": 60, "c": 20}, 200
    draw, drawn = np.random.default_rng(0), []
    for _ in range(400):
        picks = {name: set(draw.choice(total, size, replace=False).tolist()) for name, size in sizes.items()}
        found = shared(picks, total)
        drawn.append([core.share for core in found.cores])
    expected = [core.by_chance for core in found.cores]
    assert np.mean(drawn, axis=0) == pytest.approx(expected, rel=0.03)
    assert expected[1] < expected[0] < 1


def test_one_target_and_no_pick() -> None:
    one = shared({"a": {3, 1}})
    assert one.cores == [] and one.sets == [(("a",), 2)] and one.overlap.tolist() == [[1.0]]
    none = shared({"a": set(), "b": set()})
    assert none.sets == [] and none.cores[0].share == none.cores[0].by_chance == 0 and not none.overlap.any()
    assert SharedPicks.of({}, 0).cores == SharedPicks.of({}, 0).sets == []


def test_sets_are_in_a_fixed_order() -> None:
    found = shared({"b": {1, 2, 3}, "a": {3, 4, 5}, "c": {5, 6}})
    assert found.sets == [(("b",), 2), (("a",), 1), (("c",), 1), (("b", "a"), 1), (("a", "c"), 1)]
