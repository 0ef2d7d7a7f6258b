"""What a method is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import check_names, options_of
from ..core.provenance import Budget, SourceRecord
from ..core.registry import Registry
from ..pickers.base import Picker
from ..signals.columns import RowBatch
from .why import Why

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..signals.base import Signal
    from ..signals.extraction import Extraction
    from ..signals.extractor import NeuronFeatureExtractor

Target: TypeAlias = Mapping[str, np.ndarray]
"""What a method keeps of a target's exemplars: a few named arrays, saved as safetensors."""

Scorer: TypeAlias = Callable[[RowBatch], dict[str, np.ndarray]]
"""A batch's scores by target: float64 ``[n]`` each, or ``[n, exemplars]``."""


@dataclass(frozen=True)
class Method(ABC):
    """Scores rows against a target; higher is always better.

    A method with options is a frozen dataclass whose fields are made by :func:`~hf_neuronselect.core.options.opt`.
    Its stages, in order: :meth:`prepare`, :meth:`fit` on a target's exemplars, and :meth:`scorer` (or :meth:`score`). A :class:`PoolMethod` also sees the whole pool before it scores.

    Class attributes:
        name: what users call it. paper: where it comes from.
        signals: signals a row needs to be scored, by name.
        exemplar_signals: those that exemplars need (default: the same).
        needs_target: False for methods that look at the pool alone.
        default_budget: what the paper keeps. default_picker: in which order it takes them. counts_kept: whether its share is of the rows that have a score, not of all.
        libraries: packages of the extra ``rivals`` that it needs.
        source_option: the option that names rows or a selection; ``NAME:VALUE`` in the place of a name sets it.
        not_saved: why what :meth:`fit` keeps is never saved, as words after "it"; "" where it is.
        scores_by_row: whether it scores rows that it has observed by their numbers alone, so that no signal is read again.
        judges_others: whether it can score rows that are not in the pool it has observed.
        costly: whether it trains a model, or lets one answer again and again: ``compare --methods all`` leaves it out.
        grades: whether a score says how good a row is; False of controls, whose scores are draws, places or lengths.
        fits_once: whether a fit is too dear for comparisons to repeat it on resampled exemplars.
        prototype: which array of a target is its vector, or its vectors ``[blocks, width]``: cosines between targets are of them.
        tells_exemplars: whether :meth:`explain` has more to say where the exemplars are at hand.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    signals: ClassVar[tuple[str, ...]] = ()
    exemplar_signals: ClassVar[tuple[str, ...] | None] = None
    needs_target: ClassVar[bool] = True
    default_budget: ClassVar[Budget] = Budget(ratio=0.05)
    default_picker: ClassVar[str] = "best-first"
    counts_kept: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()
    source_option: ClassVar[str] = ""
    not_saved: ClassVar[str] = ""
    scores_by_row: ClassVar[bool] = False
    judges_others: ClassVar[bool] = True
    costly: ClassVar[bool] = False
    grades: ClassVar[bool] = True
    fits_once: ClassVar[bool] = False
    prototype: ClassVar[str] = ""
    tells_exemplars: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            object.__setattr__(self, option.name, option.read(getattr(self, option.name)))

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    def sources(self) -> dict[str, SourceRecord]:
        """What options name: option -> where the rows, or the selection, came from. Records have no local path."""
        return {}

    def check(self) -> None:
        """Refuse what cannot run here. Called before any row is read.

        Raises:
            NeuronSelectError: a package is missing, or a file that an option names.
        """
        if missing := [name for name in self.libraries if find_spec(name) is None]:
            raise NeuronSelectError(
                f"needs {', '.join(missing)}: pip install 'hf-neuronselect[rivals]'", option="method", value=self.name
            )

    def prepare(self, pool: Dataset | IterableDataset, extractor: NeuronFeatureExtractor | None, work: Path) -> Self:
        """Work on the pool before rows are read, e.g. training a regressor; returns the method that goes on.

        Called before a fit by commands and ``NeuronSelector.prepare``, and whenever a pool is scored. Its signals may be others afterwards.

        Args:
            extractor: the model that selects, and how it reads rows.
            work: folder that stays, of this pool's content and shared by all methods: results are kept there, under names that tell the options they depend on, and not done again.

        Raises:
            NeuronSelectError: it needs an extractor, or a pool that is no stream.
        """
        return self

    def further_signals(self, exemplars: RowBatch) -> tuple[Signal, ...]:
        """Signals that :meth:`fit` needs besides, which depend on all exemplars: :attr:`exemplar_signals` are there.

        They are computed before the fit; exemplars without one are left out.
        """
        return ()

    def fit(self, exemplars: RowBatch) -> Target:
        """What to keep of a target's exemplars (all of them usable, at least one)."""
        return {}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        """One score a row, float64 ``[n]`` (all rows usable), or one per exemplar, ``[n, exemplars]``; NaN: none.

        A row's score must not depend on the other rows of the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither score nor scorer")

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        """A function that scores batch after batch against all targets, as :meth:`score` does against one.

        Called once for a pool: what is the same for all batches is computed here.
        """
        return lambda rows: {name: self.score(rows, target) for name, target in targets.items()}

    def drawn(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores with what chance adds to them, by the option ``seed``; float64 ``[n]`` or ``[n, exemplars]``.

        What :meth:`scorer` returns does not depend on the seed then, so that another draw needs no other scores.

        Args:
            rows: numbers of the rows, int64 ``[n]``, by which chance is keyed.
        """
        return scores

    def forecast(self, rows: int, targets: Mapping[str, Target]) -> str:
        """How long scoring so many rows takes, in a sentence; "" where it is not worth saying."""
        return ""

    def compact_signals(self, targets: Sequence[Target]) -> tuple[Signal, ...]:
        """Smaller signals that are enough to score these targets, in place of :attr:`signals`; () if there are none."""
        return ()

    def stand_in(self, extraction: Extraction) -> str:
        """The model that runs in the place of the one in :attr:`paper`; "" where it is that one, or any will do.

        Comparisons show it beside the method's name and leave the method out of ranks and advice.
        """
        return ""

    @property
    def observes(self) -> bool:
        """Whether it sees the whole pool before it scores."""
        return False

    def doubts(self, rows: RowBatch, target: Target) -> list[str]:
        """Why these scores should not be believed, a sentence each that ends with what to do.

        Args:
            rows: some of the pool's, spread over it, with their signals.
        """
        return []

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Why one row has its score.

        Args:
            row: a single usable row, with its number in the pool. target: as :meth:`scorer` gets it.
            exemplars: those the target was fitted on, where they are at hand.
        """
        return Why(f"{self.name} gives no parts of its score")


class PoolMethod(Method):
    """A method whose scores depend on the whole pool: it observes every row before any is scored."""

    @property
    def observes(self) -> bool:
        return True

    @abstractmethod
    def start(self) -> Any:
        """An empty state."""

    @abstractmethod
    def observe(self, state: Any, rows: RowBatch) -> None:
        """Add rows of the pool (all usable) to the state."""

    def again(self, state: Any) -> bool:
        """Called when all rows were observed: whether to observe them once more."""
        return False

    @abstractmethod
    def finish(self, state: Any, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """The targets as :meth:`scorer` then gets them, with what was learned from the pool."""


METHODS: Registry[type[Method]] = Registry("method", "method")
register_method = METHODS.add


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method with its options.

    Raises:
        NeuronSelectError: unknown method, an option it does not have, or a value the option cannot have.
    """
    cls = METHODS[name]
    check_names(cls, options, f"option of method {name!r}", "method_option")
    return cls(**options)


def signals_needed(method: Method) -> tuple[str, ...]:
    """Signals of the rows and of the exemplars."""
    return tuple(dict.fromkeys([*method.signals, *exemplar_signals(method)]))


def exemplar_signals(method: Method) -> tuple[str, ...]:
    """Signals of the exemplars: none for a method without a target, which only leaves them out of pools."""
    if not method.needs_target:
        return ()
    return tuple(method.signals if method.exemplar_signals is None else method.exemplar_signals)


def vector_signal(method: Method, picker: Picker) -> tuple[str, ...]:
    """The signal whose vectors a picker compares: its own choice, else the method's; () if it compares none.

    Raises:
        NeuronSelectError: the method reads no vectors, and the picker names none.
    """
    if not picker.vectors:
        return ()
    own = next((signal for signal in method.signals if isinstance(signal, str)), "")
    if not (name := picker.signal(own)):
        raise NeuronSelectError(
            f"compares rows by vectors, and {method.name} reads none: name a signal, e.g. {picker.name}(by=hidden)",
            option="picker", value=str(picker),
        )  # fmt: skip
    return (name,)


def check_scores(method: Method, scores: np.ndarray, rows: int) -> np.ndarray:
    """Scores as float64.

    Raises:
        NeuronSelectError: not one score, or one list of scores, a row.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim not in (1, 2) or len(found) != rows:
        raise NeuronSelectError(
            f"returned scores of shape {found.shape} for {rows} rows; [n] or [n, exemplars] is needed",
            option="method", value=method.name,
        )  # fmt: skip
    return found
