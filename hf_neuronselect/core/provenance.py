"""Records of how selections, capabilities and adapters were made: dataclasses here, JSON in their folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np

from .cost import Cost
from .errors import NeuronSelectError
from .options import NumberOptions
from .spread import Spread

FORMAT = 1
Scalar: TypeAlias = bool | int | float | str | None
Value: TypeAlias = Scalar | list[Scalar] | dict[str, Scalar]
Mapped = TypeVar("Mapped")


# ------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """Where rows, a model, an SAE or a capability came from; never a whole local path.

    Attributes:
        id: Hub id, ``bundled:NAME``, or the last part of a local path. name: entry of a feature library.
        commit: Hub commit hash, ``content:HASH`` of something local, ``state:HASH`` of a model in memory.
        config, split, rows: of a data set. fingerprint: the one ``datasets`` gives rows in memory.
        base: of an adapter, the model that it changes.
        license: as the source states it. restricted: ``private`` or ``gated``.
        derived_from: the whole data set that these rows were taken from.
    """

    id: str | None = None
    commit: str | None = None
    name: str | None = None
    config: str | None = None
    split: str | None = None
    license: str | None = None
    restricted: str | None = None
    fingerprint: str | None = None
    rows: int | None = None
    derived_from: SourceRecord | None = None
    base: SourceRecord | None = None

    @property
    def pins(self) -> tuple[str | None, ...]:
        """The commits that decide its content: its own and, of an adapter, its base's."""
        return (self.commit, *(self.base.pins if self.base else ()))

    @property
    def on_hub(self) -> bool:
        """Whether id and commit name a revision on the Hub."""
        return bool(self.id and self.commit) and ":" not in str(self.commit)

    @property
    def origin(self) -> SourceRecord:
        """The data set these rows were taken from; itself for a whole one."""
        return self.derived_from or self

    @classmethod
    def of(cls, source: Any) -> SourceRecord:
        """A pinned :class:`~hf_neuronselect.core.sources.Source`, without its location."""
        known = source.id if not source.commit.startswith("state:") else source.id.rsplit("/", 1)[-1]
        return cls(id=known, commit=source.commit, base=None if source.base is None else cls.of(source.base))


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """Exemplars of a target: how many were given and used, and where they came from.

    Attributes:
        hit: of a selection, the share of exemplars that score above the pool's top 5 % when they are not fitted on; None
            where it is not known. held_out: of a selection, what exemplars score when they are not fitted on, largest first;
            of more than 200, quantiles. doubts: what speaks against its scores, a sentence each.
    """

    exemplars: int = 0
    used: int = 0
    source: SourceRecord | None = None
    hit: float | None = None
    held_out: tuple[float, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Avoided:
    """Targets whose score is taken off the score of the wanted ones.

    Attributes:
        targets: by name, their exemplars. weight: how much of the score is taken off; both scores are in standard
            deviations of the pool.
    """

    targets: dict[str, TargetRecord]
    weight: float = 1.0


def aim(targets: Iterable[str], avoided: Avoided | None) -> str:
    """What rows are selected for, in words: ``gsm8k, avoiding mbpp (weight 1)``."""
    if avoided is None:
        return ", ".join(targets)
    return f"{', '.join(targets)}, avoiding {', '.join(avoided.targets)} (weight {avoided.weight:g})"


# --------------------------------------------------------------------------------- how it was computed
@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """A method by its name, the paper it comes from, and all its options.

    Attributes:
        sources: option -> where the rows or the selection that it names came from; ``options`` has the name alone.
        picker: in which order rows are taken; None: the method's own.
    """

    name: str
    paper: str | None = None
    options: dict[str, Value] = field(default_factory=dict)
    sources: dict[str, SourceRecord] = field(default_factory=dict)
    picker: str | None = None


BESIDE = {"encoder": "encoder_revision", "mntp_adapter": "mntp_revision"}
"""What some signals need besides model and SAE, as options and records name it, and the option of its revision."""


@dataclass(frozen=True, kw_only=True)
class ExtractionRecord:
    """How signals were computed.

    Attributes:
        model, sae, options: None where only the signals themselves were at hand. Options are resolved: a layer counts
            from 0, dtype is not ``auto``. encoder, mntp_adapter: None where no signal needs them.
        signals: signal -> its identity. doubts: what speaks against the SAE, a sentence each.
    """

    model: SourceRecord | None = None
    sae: SourceRecord | None = None
    encoder: SourceRecord | None = None
    mntp_adapter: SourceRecord | None = None
    options: NumberOptions | None = None
    signals: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    @property
    def beside(self) -> dict[str, SourceRecord]:
        """What was used of :data:`BESIDE`."""
        found = {name: getattr(self, name) for name in BESIDE}
        return {name: source for name, source in found.items() if source is not None}


@dataclass(frozen=True)
class Budget:
    """How many rows are kept: exactly one of the four.

    Attributes:
        ratio: in (0, 1]; ``max(1, floor(ratio * N + 0.5))`` of all N rows read.
        k: rows. threshold: rows scoring at least that. max_tokens: stops at the first row that does not fit.

    Raises:
        NeuronSelectError: none or several given, or a value out of range.
    """

    ratio: float | None = None
    k: int | None = None
    threshold: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) != 1:
            raise NeuronSelectError(
                f"give exactly one of ratio, k, threshold, max_tokens (got {', '.join(given) or 'none'})"
            )
        name, value = next(iter(given.items()))
        if isinstance(value, str):
            raise NeuronSelectError("must be a number; select alone estimates a ratio", option=name, value=value)
        if isinstance(value, float) and not math.isfinite(value):
            raise NeuronSelectError("must be a finite number", option=name, value=value)
        if name == "ratio" and not 0 < value <= 1:
            raise NeuronSelectError("must lie in (0, 1]; 0.05 keeps 5 %", option="ratio", value=value)
        if name in ("k", "max_tokens") and value < 1:
            raise NeuronSelectError("must be at least 1", option=name, value=value)

    def given(self) -> dict[str, float]:
        """The one number, by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def rows(self, total: int) -> int | None:
        """Rows to keep of ``total`` read; None where scores or lengths decide."""
        if self.ratio is not None:
            return max(1, math.floor(self.ratio * total + 0.5))
        return self.k


@dataclass(frozen=True, kw_only=True)
class ShortRun:
    """A training on the best rows of a pool, and the loss of held-out answers after it, in nats a token."""

    share: float
    rows: int
    steps: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class AutoRatio:
    """How ``ratio="auto"`` was resolved.

    Attributes:
        ratio: what is kept, in (0, 1].
        estimates: proxy -> the share it names. absent: proxy -> why it names none.
        shares: shares of the pool that were looked at, ascending. curves: proxy -> its value at each of them.
        runs: trainings that decided, in their order, if there were any. settings: TRL's keys that they had.
    """

    ratio: float
    estimates: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    runs: tuple[ShortRun, ...] = ()
    settings: dict[str, Value] | None = None

    @property
    def line(self) -> str:
        """In one line: the ratio and what names it."""
        named = ", ".join(f"{name} {share:g}" for name, share in self.estimates.items())
        if not self.runs:
            return f"{self.ratio:g}, estimated by {named}"
        last = [f"{run.loss:.3f} at {run.share:g}" for run in self.runs if run.steps == self.runs[-1].steps]
        return f"{self.ratio:g}, by the held-out loss of short trainings ({', '.join(last)}); scores alone: {named}"


# -------------------------------------------------------------------------------------- what came of it
@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows read, selected, cut off at ``max_length``, and left out by reason; ``reasons`` quotes the first errors."""

    rows: int
    selected: int
    truncated: int = 0
    empty: int = 0
    error: int = 0
    duplicate: int = 0
    leak: int = 0
    null: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def left_out(self) -> dict[str, int]:
        """Rows that could not be selected: reason -> how many, where there are any."""
        names = ("empty", "error", "duplicate", "leak", "null")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens a row; None where no tokenizer was used."""

    pool_mean: float | None = None
    selected_mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock time of a selection.

    Attributes:
        tokens_per_second: of this run's own passes; None where all signals came from a store or from columns.
        finished: UTC.
    """

    seconds: float
    tokens_per_second: int | None = None
    finished: str | None = None


# ------------------------------------------------------------------------------------------ whole records
@dataclass(frozen=True, kw_only=True)
class SelectionSummary:
    """What an adapter keeps of the selection it was trained on.

    Attributes:
        repo_id: where the selection was pushed to. files: its files and their checksums.
    """

    pool: SourceRecord
    method: MethodRecord | None = None
    targets: dict[str, TargetRecord] | None = None
    avoided: Avoided | None = None
    budget: Budget | None = None
    aggregate: str | None = None
    counts: Counts | None = None
    files: dict[str, str] | None = None
    repo_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """``selection.json``: from what, by what and how a selection was made.

    Attributes:
        aggregate, weights: of several targets. exclude: kinds of rows that were left out. spread: how picks
            were kept apart, if they were. auto: where the budget's ratio was estimated, how.
        capability: the saved one that scored the pool; of a method without targets, the one whose exemplars were left
            out. extractor: how the signals were computed.
        cost: of all passes, those read from a store included. files: checksums of the folder's other files.
    """

    format: int = FORMAT
    method: MethodRecord
    targets: dict[str, TargetRecord]
    avoided: Avoided | None = None
    budget: Budget
    auto: AutoRatio | None = None
    aggregate: str | None = None
    weights: dict[str, float] | None = None
    exclude: tuple[str, ...] = ()
    spread: Spread | None = None
    pool: SourceRecord
    capability: SourceRecord | None = None
    extractor: ExtractionRecord | None = None
    counts: Counts
    tokens: Lengths
    packages: dict[str, str]
    timing: Timing
    cost: Cost
    files: dict[str, str] | None = None

    @property
    def doubts(self) -> list[tuple[str, str]]:
        """What a reader must know before the rows are used: what it is of, and a sentence."""
        avoided = self.avoided.targets if self.avoided else {}
        of_targets = [(name, doubt) for name, target in {**self.targets, **avoided}.items() for doubt in target.doubts]
        return [("SAE", doubt) for doubt in (self.extractor.doubts if self.extractor else ())] + of_targets

    def summary(self, repo_id: str | None = None) -> SelectionSummary:
        """What is kept with an adapter; errors of single rows stay with the selection."""
        shared = {one.name: getattr(self, one.name) for one in fields(SelectionSummary) if one.name != "repo_id"}
        return SelectionSummary(**shared | {"counts": replace(self.counts, reasons=())}, repo_id=repo_id)


@dataclass(frozen=True, kw_only=True)
class CapabilityRecord:
    """``config.json`` of a capability: what was fitted, on which signals; ``files``: checksums of its other files."""

    format: int = FORMAT
    method: MethodRecord
    targets: dict[str, TargetRecord]
    avoided: Avoided | None = None
    extractor: ExtractionRecord = field(default_factory=ExtractionRecord)
    files: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class LibraryRecord:
    """``library.json``: the capabilities of a feature library, by name."""

    format: int = FORMAT
    capabilities: dict[str, CapabilityRecord]


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One number of one model on one data set.

    Attributes:
        rows: evaluated. answer_tokens: they hold. taken_out: rows left out because they were trained on.
    """

    model: str
    data: str
    metric: str
    value: float
    rows: int | None = None
    answer_tokens: int | None = None
    taken_out: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """``training.json`` of an adapter.

    Attributes:
        settings: as given in the recipe. hyperparameters: as the trainer used them.
        results: rows, tokens, answer tokens, steps, seconds. losses: step and training loss.
        files: checksums of the folder's other files.
    """

    format: int = FORMAT
    name: str
    base_model: SourceRecord
    selection: SelectionSummary | None = None
    settings: dict[str, Value] = field(default_factory=dict)
    hyperparameters: dict[str, Value] = field(default_factory=dict)
    results: dict[str, int | float] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    evaluation: tuple[EvaluationRow, ...] = ()
    packages: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """``evaluation.json``: numbers of a base model and its adapters.

    Attributes:
        tasks: results of lm-evaluation-harness as it gives them. tasks_table: the same as text.
    """

    base: SourceRecord
    rows: tuple[EvaluationRow, ...] = ()
    tasks: Any = None
    tasks_table: str | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The part of a selection's, a store's or an adapter's record that says whose rows it holds."""

    pool: SourceRecord | None = None
    selection: Origin | None = None


# ------------------------------------------------------------------------------------------ other types
def plain(value: Any) -> Any:
    """A record in JSON's own types; fields that are None are left out."""
    if is_dataclass(value):
        found = {one.name: getattr(value, one.name) for one in fields(value)}
        return {name: plain(one) for name, one in found.items() if one is not None}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, Scalar) else str(value)


def record_of(values: Mapping[str, Any], kind: type[Mapped]) -> Mapped:
    """A record from a mapping, as of a pool's description."""
    return msgspec.convert(dict(values), kind)
