"""Classes by name: signals and methods."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from .errors import NeuronSelectError, unknown

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes by their ``name`` attribute.

    Args:
        kind: what errors call an entry (``method``). option: the option that names one.
    """

    def __init__(self, kind: str, option: str) -> None:
        self.kind, self.option = kind, option
        self._known: dict[str, T] = {}

    def add(self, cls: Any) -> Any:
        """Register a class under its name; a class decorator.

        Raises:
            NeuronSelectError: the name is taken.
        """
        if self._known.setdefault(cls.name, cls) is not cls:
            raise NeuronSelectError(
                f"a {self.kind} of this name is registered already", option=self.option, value=cls.name
            )
        return cls

    def remove(self, name: str) -> None:
        """Unregister a class."""
        del self._known[name]

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self._known)

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            raise unknown(self.kind, name, self._known, self.option)
        return self._known[name]
