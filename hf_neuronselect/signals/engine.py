"""What an engine is: it computes any set of its signals in one pass over rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.registry import Registry
from ..rows.formats import Conversation
from .base import Signal
from .extraction import Extraction


@dataclass(frozen=True)
class Computed:
    """Signals of some rows.

    Attributes:
        columns: column -> one value a row, numpy or a list of numpy rows.
        skips: signal -> why each row has none of it, ``""`` where it has.
    """

    columns: dict[str, Any]
    skips: dict[str, list[str]]

    def __or__(self, other: Computed) -> Computed:
        return Computed(self.columns | other.columns, self.skips | other.skips)


class Engine(ABC):
    """Computes signals of one kind: from text, one forward pass, answer losses, ...

    Args:
        extraction: the resolved options.

    Class attributes:
        name: what signals name it by. has_model: whether it runs a model over tokens.
    """

    name: ClassVar[str]
    has_model: ClassVar[bool] = True

    def __init__(self, extraction: Extraction) -> None:
        self.extraction = extraction

    @classmethod
    @abstractmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        """What moves the numbers of all its signals, in JSON's own types."""

    @abstractmethod
    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> Any:
        """The half of the work that needs no weights and may run in a thread: rows to tokens."""

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:  # noqa: B027 (nothing to load by default)
        """Load the weights that these signals need, unless they are there."""

    @abstractmethod
    def compute(self, given: Any, signals: Sequence[Signal], rank: int | None = None) -> Computed:
        """The signals of rows that :meth:`read` has read, in one pass.

        Args:
            rank: shard index; picks the GPU ``cuda:{rank % count}``.
        """


ENGINES: Registry[type[Engine]] = Registry("engine", "features")
register_engine = ENGINES.add
