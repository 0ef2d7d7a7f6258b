"""Methods of a comparison that did not run, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..core.errors import NeuronSelectError


class Failures:
    """Reasons by method, or by method and target."""

    def __init__(self) -> None:
        self.causes: dict[tuple[str, ...], NeuronSelectError] = {}

    @contextmanager
    def noted(self, *key: str) -> Iterator[None]:
        """What is refused in the ``with`` block is kept as the reason."""
        try:
            yield
        except NeuronSelectError as cause:
            self.causes[key] = cause

    def check(self, some: Collection[object]) -> None:
        """Raise the first reason if nothing is left.

        Raises:
            NeuronSelectError: nothing is.
        """
        if not some and self.causes:
            raise next(iter(self.causes.values()))

    def reason(self, method: str, target: str) -> str:
        """In one line; "" if it ran."""
        cause = self.causes.get((method,)) or self.causes.get((method, target))
        return "" if cause is None else " ".join(str(cause).split())
