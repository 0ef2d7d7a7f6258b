"""What a picker is, and the registry of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import check_names, options_of
from ..core.registry import Registry
from .vectors import Vectors


@dataclass(frozen=True)
class Picker(ABC):
    """Orders the rows of a pool for one target.

    A picker with options is a frozen dataclass whose fields are made by :func:`~hf_neuronselect.core.options.opt`.

    Class attributes:
        name: what users call it. paper: where it comes from.
        each: whether it reads a score for each exemplar; otherwise a row has one score.
        vectors: whether it compares rows with each other, by the vectors of a signal.
        libraries: packages of the extra ``rivals`` that it needs.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    each: ClassVar[bool] = False
    vectors: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            object.__setattr__(self, option.name, option.read(getattr(self, option.name)))

    def __str__(self) -> str:
        """As :func:`picker_of` reads it, with every option that has a value."""
        given = {name: getattr(self, name) for name in options_of(type(self))}
        inside = ",".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return f"{self.name}({inside})" if inside else self.name

    def check(self) -> None:
        """Refuse what cannot run here. Called before any row is read.

        Raises:
            NeuronSelectError: a package is missing.
        """
        if missing := [name for name in self.libraries if find_spec(name) is None]:
            raise NeuronSelectError(
                f"needs {', '.join(missing)}: pip install 'hf-neuronselect[rivals]'", option="picker", value=self.name
            )

    def signal(self, own: str) -> str:
        """The signal whose vectors it compares; "" if it compares none.

        Args:
            own: the method's.
        """
        return (getattr(self, "by", None) or own) if self.vectors else ""

    @abstractmethod
    def order(
        self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
    ) -> np.ndarray:
        """The order in which rows are taken.

        Args:
            scores: float64 ``[N]``, or ``[N, exemplars]``; higher is better. valid: bool ``[N]``, rows that may be taken.
            wanted: number of rows that will be taken, if known; later rows may simply follow their scores.
            vectors: of the rows, for pickers that compare rows.

        Returns:
            int64, every valid row once.
        """


PICKERS: Registry[type[Picker]] = Registry("picker", "picker")
register_picker = PICKERS.add


def picker_of(text: str) -> Picker:
    """A picker as users write it: ``round-robin``, ``knn(neighbours=50)``.

    Raises:
        NeuronSelectError: not of that form, an unknown picker, or an option that it does not have or that cannot have
            this value.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise NeuronSelectError("must be a name, or name(option=value,...)", option="picker", value=text)
    cls = PICKERS[match[1]]
    pairs = [part.partition("=") for part in (match[2] or "").split(",") if part.strip()]
    options = {name.strip(): value.strip() for name, _, value in pairs}
    check_names(cls, options, f"option of picker {cls.name!r}", "picker")
    return cls(**options)


def best_first(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Valid rows by their scores ``[N]``, best first, ties to the smaller row: int64."""
    rows = np.flatnonzero(valid)
    return rows[np.lexsort((rows, -scores[rows]))]


def row_scores(scores: np.ndarray) -> np.ndarray:
    """One score a row: of several exemplars' the best."""
    return scores if scores.ndim == 1 else scores.max(axis=1)


def table_of(scores: np.ndarray) -> np.ndarray:
    """Scores as ``[N, exemplars]``."""
    return scores[:, None] if scores.ndim == 1 else scores


def then(first: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Rows in an order, behind them those of another that are not among them."""
    return np.concatenate([first, rest[~np.isin(rest, first)]]).astype(np.int64)
