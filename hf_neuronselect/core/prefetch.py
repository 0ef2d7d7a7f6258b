"""Prepare the next item in a thread while the caller uses the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], make: Callable[[T], U], *, wait: bool = True) -> Iterator[U]:
    """``map(make, items)`` in order; a thread makes each result while the caller uses the one before it.

    It helps where ``make`` releases the interpreter's lock, as tokenizers and Arrow do. At most two results are in memory.
    Errors of ``make`` and ``items`` are raised here, in order.

    Args:
        wait: on an early close, wait for the item that is being made. False where the next of ``items`` may take long,
            as from another process.
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
