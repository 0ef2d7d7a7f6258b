"""Items made ahead in a thread come in the same order, never more than one ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from tiny import rows

from hf_neuronselect import NeuronFeatureExtractor
from hf_neuronselect.core.prefetch import ahead
from hf_neuronselect.rows.formats import read_row, row_format, rows_of
from hf_neuronselect.signals.base import BOOKKEEPING


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_order_is_kept(n: int) -> None:
    assert list(ahead(range(n), str)) == [str(i) for i in range(n)]


def test_one_is_made_while_one_is_used_and_no_more() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(i: int) -> int:
        made.append(i)
        if i == 1:
            second.set()
        return i

    found = ahead(range(9), make)
    assert next(found) == 0
    assert second.wait(10), "the next item is made while the first is in use"
    assert made == [0, 1]
    found.close()
    assert made == [0, 1]


def test_it_runs_in_another_thread() -> None:
    assert set(ahead(range(3), lambda _: threading.get_ident())) != {threading.get_ident()}


def test_an_error_is_raised_at_its_place() -> None:
    def numbers() -> Iterator[int]:
        yield from (4, 2, 0)

    seen = []
    with pytest.raises(ZeroDivisionError):
        for value in ahead(numbers(), lambda i: 8 // i):
            seen.append(value)
    assert seen == [2, 4]


def test_halves_of_extract_are_extract(extractor: NeuronFeatureExtractor) -> None:
    data = rows(12)
    fmt = row_format(data.column_names)
    conversations = [read_row(row, fmt) for row in rows_of(data[:])]
    whole = extractor.extract(conversations)
    halves = ahead([conversations[:5], conversations[5:]], extractor.prepare)
    parts = [extractor.compute(prepared).columns for prepared in halves]
    assert whole.keys() - parts[0].keys() == set(BOOKKEEPING)
    for name in parts[0]:
        column, again = whole[name], [value for part in parts for value in part[name]]
        for one, other in zip(column, again, strict=True):
            if isinstance(one, np.ndarray):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # another batch rounds differently
            else:
                assert one == other


def test_it_ends_at_once_without_waiting() -> None:
    """A worker that fails must not wait for the number that its parent sends after the failed one."""
    never = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        never.wait(60)

    found = ahead(numbers(), str, wait=False)
    assert next(found) == "1"
    started = time.monotonic()
    found.close()
    assert time.monotonic() - started < 30
    never.set()
