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
        name: what signals name it by. has_model: whether it runs a model over tokens. model_option: the option that
            names this model.
    """

    name: ClassVar[str]
    has_model: ClassVar[bool] = True
    model_option: ClassVar[str] = "model"

    def __init__(self, extraction: Extraction) -> None:
        self.extraction = extraction

    @classmethod
    def pin(cls, extraction: Extraction, signals: Sequence[Signal], token: str | bool | None) -> Extraction:
        """The extraction with what these signals need besides the model and its SAE, e.g. an encoder, pinned.

        Raises:
            NeuronSelectError: it cannot be had.
        """
        return extraction

    @classmethod
    @abstractmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        """What moves the numbers of all its signals, in JSON's own types."""

    def open(self) -> None:  # noqa: B027 (nothing by default)
        """Load what :meth:`read` needs, unless it is there. It may run in a thread, too."""

    @abstractmethod
    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> Any:
        """The half of the work that needs no weights and may run in a thread: rows to tokens."""

    def tokens(self, given: Any) -> int:
        """Tokens of rows that were read, which its model runs over."""
        parts = given.values() if isinstance(given, Mapping) else [given]
        return sum(len(sample.input_ids) for part in parts for sample in part if not sample.skip)

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:  # noqa: B027 (nothing to load by default)
        """Load the weights that these signals need, unless they are there."""

    def bill(self) -> tuple[int, float]:
        """Requests of an API, and US dollars, since this was last called."""
        return 0, 0.0

    @abstractmethod
    def compute(self, given: Any, signals: Sequence[Signal], rank: int | None = None) -> Computed:
        """The signals of rows that :meth:`read` has read, in one pass.

        Args:
            rank: shard index; picks the GPU ``cuda:{rank % count}``.
        """


ENGINES: Registry[type[Engine]] = Registry("engine", "features")
register_engine = ENGINES.add
