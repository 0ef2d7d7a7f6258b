"""One selection, checked before anything is computed; several on one pool share its pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from ..core.configs import CAPABILITY, KeepOptions, PickOptions, TargetOptions
from ..core.errors import NeuronSelectError
from ..core.options import RowOptions
from ..methods import Method
from ..methods.base import Target
from ..rows.formats import row_format
from ..rows.load import Rows
from ..selection.avoid import check_avoided
from ..selection.library import load_capability
from ..selection.marks import Marks
from ..selection.reader import own_columns
from ..selection.selection import Selection
from ..selection.selector import NeuronSelector
from ..selection.sweep import Sweep
from ..signals.base import Signal, signals_of
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore, write_store
from .methods import Chosen
from .parts import Say, named_specs, quiet


@dataclass
class Job:
    """A method, the pool it selects from and the targets it selects for.

    Attributes:
        targets: exemplars by name. capability: a fitted selector used instead of exemplars.
        avoided: exemplars of targets whose score is taken off, times ``avoid_weight``.
        store: has the pool's signals. extractor: computes those that are missing.
        marks: the pool's leaks and duplicates, if several jobs share them. sweep: the pool's scores, likewise.
        samples: targets fitted on resampled exemplars.
    """

    chosen: Chosen
    rows: Rows
    targets: Mapping[str, Rows]
    capability: NeuronSelector | None = None
    store: FeatureStore | None = None
    extractor: NeuronFeatureExtractor | None = None
    marks: Marks | None = None
    avoided: Mapping[str, Rows] = field(default_factory=dict)
    avoid_weight: float = 1.0
    sweep: Sweep | None = None
    samples: list[Target] = field(default_factory=list)
    selector: NeuronSelector = field(init=False)
    fitted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.capability is None and self.chosen.method.needs_target and not self.targets:
            raise NeuronSelectError(
                f"method {self.chosen.method.name} needs exemplars, 10 to 100 rows that show the task: --target NAME=rows",
                option="target",
            )
        if self.capability is not None and self.chosen.method.needs_target:
            self.selector, self.fitted = self.capability, True
        else:
            self.selector = self.chosen.selector()
        if self.capability is not None:  # a control leaves out the same rows
            self.selector.leakage, self.selector.capability = self.capability.leakage, self.capability.capability

    def again(self, chosen: Chosen) -> Job:
        """The same job by the method with another seed; what it prepared for the pool is found."""
        made = Job(
            chosen, self.rows, self.targets, store=self.store, marks=self.marks, avoided=self.avoided,
            avoid_weight=self.avoid_weight,
        )  # fmt: skip
        assert self.extractor is not None
        made.prepare(self.extractor)
        return made

    def prepare(self, extractor: NeuronFeatureExtractor) -> None:
        """Do the method's work on the pool, and keep an extractor of the signals that it then reads."""
        if not self.fitted:  # a saved capability was fitted on what was prepared
            self.chosen = self.chosen.prepared(self.rows, extractor)
            self.selector.method = self.chosen.method
        self.extractor = extractor.with_features(self.chosen.signals)

    def fit(self) -> NeuronSelector:
        """Fit the targets, once."""
        self.selector.extractor = self.extractor
        if self.targets and not self.fitted:
            self.selector.fit(
                {name: rows.data for name, rows in self.targets.items()},
                avoid={name: rows.data for name, rows in self.avoided.items()},
                avoid_weight=self.avoid_weight,
                extractor=self.extractor,
                sources={name: rows.source for name, rows in {**self.targets, **self.avoided}.items()},
            )
            self.fitted = True
        return self.selector

    def select(self, options: KeepOptions) -> Selection:
        """Fit, score and pick."""
        several = options if isinstance(options, PickOptions) else PickOptions()
        selector = self.fit()
        return selector.select(
            self.rows.data,
            ratio=options.ratio,
            k=options.k,
            threshold=options.threshold,
            max_tokens=options.max_tokens,
            aggregate=several.aggregate,
            weights=several.weight or None,
            exclude=options.exclude,
            spread=options.spread,
            features=self.store,
            source=self.rows.source,
            marks=self.marks,
            sweep=self.sweep,
        )


def open_capability(specs: Mapping[str, str]) -> NeuronSelector | None:
    """The saved capability among target specs.

    Raises:
        NeuronSelectError: it is given beside other targets, or cannot be loaded.
    """
    found = [spec for spec in specs.values() if spec.startswith(CAPABILITY)]
    if found and len(specs) > 1:
        raise NeuronSelectError("a capability is used alone; give no other --target", option="target", value=found[0])
    return load_capability(found[0].removeprefix(CAPABILITY)) if found else None


def avoided_specs(options: TargetOptions, method: Method) -> dict[str, str]:
    """Rows of the targets to avoid, by name.

    Raises:
        NeuronSelectError: targets that cannot be avoided, or beside a saved capability.
    """
    targets, avoided = named_specs(options.target, "target"), named_specs(options.avoid, "avoid")
    for spec in avoided.values():
        if spec.startswith(CAPABILITY):
            raise NeuronSelectError("is fitted already, by itself; give the rows to avoid", option="avoid", value=spec)
    check_avoided(method, targets, avoided, options.avoid_weight)
    if avoided and any(spec.startswith(CAPABILITY) for spec in targets.values()):
        raise NeuronSelectError(
            "the target is a capability, which brings what it avoids: fit it with --avoid (neuronselect fit)",
            option="avoid", value=next(iter(avoided)),
        )  # fmt: skip
    return avoided


def check_pick(options: PickOptions, targets: Sequence[str], streaming: bool) -> None:
    """Refuse budgets and weights that these targets, or a stream, cannot have.

    Raises:
        NeuronSelectError: options that do not go together.
    """
    names = ", ".join(targets)
    if len(targets) > 1:
        if options.threshold is not None:
            raise NeuronSelectError(f"unclear with {len(targets)} targets, whose scores have different scales; use k, "
                                    "ratio or max_tokens", option="threshold", value=options.threshold)  # fmt: skip
        if streaming and options.aggregate not in ("quota", "round_robin"):
            raise NeuronSelectError("ranks of a whole stream are not kept; use quota or round_robin",
                                    option="aggregate", value=options.aggregate)  # fmt: skip
    if streaming and options.max_tokens is not None:
        raise NeuronSelectError("a stream needs k or threshold", option="max_tokens", value=options.max_tokens)
    weighted = options.aggregate == "weighted" and len(targets) > 1
    if weighted or options.weight:
        if set(options.weight) != set(targets):
            raise NeuronSelectError(f"needs one weight for each of {names}: --weight NAME=NUMBER", option="weight",
                                    value=", ".join(options.weight) or None)  # fmt: skip
        if min(options.weight.values()) < 0 or sum(options.weight.values()) <= 0:
            raise NeuronSelectError("weights are at least 0, and one of them is above 0", option="weight")


def check_rows(rows: Iterable[Rows], options: RowOptions) -> None:
    """Refuse rows whose columns are of no known format.

    Raises:
        NeuronSelectError: columns are missing.
    """
    for part in rows:
        if part.data.column_names:
            row_format(part.data.column_names, options.row_format, options.columns, part.about["id"])


def as_read(held_out: Dataset, options: RowOptions) -> Dataset:
    """Held-out rows under the names of their format's own columns: read as the pool is, where they have its columns.

    Raises:
        NeuronSelectError: columns are missing.
    """
    names = own_columns(held_out.column_names)
    renames = options.columns if set(options.columns.values()) <= set(names) else None
    try:
        fmt = row_format(names, options.row_format, renames, "the held-out data")
    except NeuronSelectError:
        fmt = row_format(names, "auto", renames, "the held-out data")
    if not options.columns and options.row_format == "auto":
        return held_out
    return held_out.select_columns(fmt.used).rename_columns(
        {theirs: ours for ours, theirs in fmt.columns if ours != theirs}
    )


def share_pass(
    jobs: Sequence[Job], folder: Path, *, least: int = 2, num_workers: int | None = 1, say: Say = quiet
) -> None:
    """Compute the signals of several jobs in one pass over their pool, into a store that all of them read.

    Jobs that have a store or read a stream stay as they are. Nothing is computed for fewer than ``least`` jobs, nor where no
    job needs a signal. Smaller signals of a method are computed only where the store has not the whole ones.

    Args:
        jobs: of one pool and one extractor. folder: of the store; an unfinished one is finished.
        num_workers: processes that compute; None: one a GPU.
    """
    sharing = [job for job in jobs if job.store is None and isinstance(job.rows.data, Dataset)]
    extractor = sharing[0].extractor if sharing else None
    if len(sharing) < least or extractor is None or not any(job.chosen.signals for job in sharing):
        return
    signals: list[Signal] = []
    for job in sharing:
        whole = signals_of(job.chosen.method.signals)
        compared = job.chosen.compared
        # Smaller signals are of one target's exemplars, not of those drawn again; a picker that compares rows reads whole ones.
        small = not (job.samples or compared or _held(whole, extractor, folder))
        smaller = job.fit().compact_signals() if small else ()
        signals += [*(smaller or whole), *signals_of(compared)]
    rows = sharing[0].rows
    assert isinstance(rows.data, Dataset)
    shard_rows = min(4096, max(64, len(rows.data) // (16 * (num_workers or 1))))  # a kill costs each process one shard
    write_store(
        rows.data, extractor.with_features(signals), folder, pool_about=rows.about, shard_rows=shard_rows,
        num_workers=num_workers, say=say,
    )  # fmt: skip
    store = FeatureStore(folder)
    for job in sharing:
        job.store = store


def _held(signals: Sequence[Signal], extractor: NeuronFeatureExtractor, folder: Path) -> bool:
    """Whether a store has all shards of these signals, as this extractor makes them."""
    try:
        FeatureStore(folder).check({signal.name: extractor.identity(signal) for signal in signals})
    except NeuronSelectError:
        return False
    return True
