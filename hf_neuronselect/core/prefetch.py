"""One step of work done ahead in a thread, while the caller is busy with the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], make: Callable[[T], U], *, wait: bool = True) -> Iterator[U]:
    """``map(make, items)`` in order, each made in a thread while the one before it is in use.

    It helps where ``make`` lets the interpreter go, as tokenizers and Arrow do. At most one finished item waits, so
    memory stays that of two. What ``make`` or ``items`` raise is raised here, at its place in the order.

    Args:
        wait: when it is closed before its end, for the item that is being made. False where ``items`` may be long in
            coming, as from another process.
    """
    source = iter(items)

    def step() -> list[U]:
        for item in source:
            return [make(item)]
        return []

    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting = thread.submit(step)
        while made := waiting.result():
            waiting = thread.submit(step)
            yield made[0]
    finally:
        thread.shutdown(wait, cancel_futures=True)
