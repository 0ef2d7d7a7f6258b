"""One step of work done ahead in a thread, while the caller is busy with the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], make: Callable[[T], U]) -> Iterator[U]:
    """``map(make, items)`` in order, each made in a thread while the one before it is in use.

    It helps where ``make`` lets the interpreter go, as tokenizers and Arrow do. At most one finished item waits, so
    memory stays that of two. What ``make`` or ``items`` raise is raised here, at its place in the order.
    """
    source = iter(items)

    def step() -> list[U]:
        for item in source:
            return [make(item)]
        return []

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = thread.submit(step)
        while made := waiting.result():
            waiting = thread.submit(step)
            yield made[0]
