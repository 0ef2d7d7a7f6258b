"""Compare methods on one pool and its targets, with one pass over the pool."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..core import bundled
from ..core.configs import CAPABILITY, CompareConfig
from ..core.errors import NeuronSelectError
from ..core.folders import COMPARISON, COMPARISON_EXEMPLARS, COMPARISON_STORE, SELECTION_RECORD
from ..core.progress import LiveTable
from ..core.provenance import ExtractionRecord
from ..core.spread import Spread
from ..core.writing import reserve
from ..methods import Method
from ..models.loading import forget
from ..rows.load import BUNDLED, Rows, load_rows
from ..selection.marks import mark_pool
from ..selection.record import mean_length
from ..selection.selection import Selection
from ..signals.extractor import NeuronFeatureExtractor
from .compare_files import write_comparison
from .compare_train import check_training, train_all
from .comparison import HIGH, LOW, Comparison, Line, jaccard, slug
from .exemplars import able, able_on_pool, read_exemplars, with_signals
from .failures import Failures
from .job import Job, check_rows, share_pass
from .live import Live
from .measures import RowFacts, shares_of
from .methods import Chosen, methods_of
from .parts import Say, extractor_of, load_named, named_specs, quiet
from .together import Together, budget_of, resampled


def compare(
    config: CompareConfig, *, say: Say = quiet, note: Say = quiet, table: LiveTable | None = None
) -> Comparison:
    """Compare methods; writes a selection folder for each method and target, and tables (``compare.csv``, ``.html``, ...).

    The pool's signals stay in the folder ``signals``, unless ``config.features`` names another store: run again, it computes
    what is missing, and makes only the selections that are not there or that would be others.

    Args:
        table: shows lines as they are done; without one, each is a note.

    Raises:
        NeuronSelectError: bad input; what can be known before the pool is read is refused before a model is loaded.
    """
    with reserve(config.out, COMPARISON):
        held_out = check_training(config, named_specs(config.target, "target"))
        found = compare_in(config.out / COMPARISON_STORE, config, note=note, keep=True, table=table)
        if held_out:
            forget()  # the models that scored are not those that are trained
            train_all(found, config, held_out, note)
            write_comparison(found, config.out)
    say(found.table())
    say(f"-> {config.out}")
    return found


def compare_in(
    work: Path, config: CompareConfig, *, note: Say = quiet, keep: bool = False, table: LiveTable | None = None
) -> Comparison:
    """Compare methods; writes nothing but the store, unless asked to.

    Args:
        work: folder for the shared store, unless ``config.features`` names one; the exemplars' stores are beside it. The
            result reads both.
        keep: write selections and tables to ``config.out`` as they are made, and take selections that are there already.
        table: as of :func:`compare`.

    Raises:
        NeuronSelectError: as :func:`compare`. A method that cannot run is a line with the reason, if another one can.
    """
    methods = methods_of(config.methods, config.seed, config.picker)
    _check_folders(methods)
    specs = named_specs(config.target, "target")
    if not specs:
        raise NeuronSelectError("name at least one target: --target NAME=rows", option="target")
    if fitted := [spec for spec in specs.values() if spec.startswith(CAPABILITY)]:
        raise NeuronSelectError("belongs to one method; name rows", option="target", value=fitted[0])
    related = _related(config, specs)
    rows = load_rows(config.pool, texts=config.columns.values())
    assert isinstance(rows.data, Dataset)
    if related and config.source_column not in rows.data.column_names:
        raise NeuronSelectError(f"the pool has no such column; it has {', '.join(rows.data.column_names)}",
                                option="source_column", value=config.source_column)  # fmt: skip
    targets = load_named(specs, "target", config.columns.values())
    check_rows([rows, *targets.values()], config)
    failures = Failures()
    ready: list[Chosen] = []
    for chosen in methods:
        with failures.noted(chosen.label):
            chosen.check()
            ready.append(chosen)
    failures.check(ready)
    ready = _prepared(ready, rows, config, note, failures)
    kept = work.parent / COMPARISON_EXEMPLARS
    try:
        extractor, stores = read_exemplars(ready, targets, kept, config, note)
    except NeuronSelectError:
        ready = able(ready, targets, config, failures)
        extractor, stores = read_exemplars(ready, targets, kept, config, quiet)
    found = Comparison(extractor, rows.data, stores, config=config, row_sources=_sources(rows.data, config))
    jobs = found.jobs
    for chosen in ready:
        for name, part in targets.items():
            with failures.noted(chosen.label, name):
                read = with_signals(part, chosen, extractor, stores.get(name))
                job = _job(chosen, rows, {name: read}, extractor)
                job.fit()
                if name in related and not (config.draws > 1 and chosen.draws):
                    job.samples = resampled(job, config)
                jobs[chosen.label, name] = job
    failures.check(jobs)
    live = Live([chosen.label for chosen in methods], list(targets), table, note)
    live.tell(found)
    started = time.perf_counter()
    _share_pass(jobs, config.features or work, config, failures, note)
    found.pass_seconds = time.perf_counter() - started
    found.store = next((job.store for job in jobs.values() if job.store is not None), None)
    if config.exclude:
        marks = mark_pool(rows.data, {name: job.selector.leakage for (_, name), job in jobs.items()}, config)
        for (_, name), job in jobs.items():
            job.marks = marks[name]
    if keep:
        write_comparison(found, config.out)
    facts = RowFacts(rows.data, config)
    sources = found.row_sources if related else None
    if sources is not None:
        found.sources["", ""] = shares_of(sources, np.arange(len(sources)))
    right = {name: np.isin(sources, of) for name, of in related.items()} if sources is not None else {}
    for chosen in methods:
        together = Together({name: jobs[chosen.label, name] for name in targets if (chosen.label, name) in jobs})
        for name in targets:
            line = Line(chosen.label, name)
            if name in together.jobs:
                with failures.noted(chosen.label, name):
                    folder = config.out / slug(chosen.label) / name if keep else None
                    picked = _picked(together, name, config, folder)
                    line = _measured(found, together, name, picked, right.get(name), facts, config)
                    if sources is not None:
                        found.sources[chosen.label, name] = shares_of(sources, picked.first.indices)
            line = replace(line, reason=failures.reason(chosen.label, name))
            found.add(line, list(targets))
            live.tell(found, line)
        together.forget()
        if keep:
            write_comparison(found, config.out)
    failures.check(found.selections)
    return found


def _check_folders(methods: list[Chosen]) -> None:
    """Refuse two methods whose selections would be in one folder.

    Raises:
        NeuronSelectError: their labels differ in signs that a folder's name does not have.
    """
    of: dict[str, str] = {}
    for label in (chosen.label for chosen in methods):
        if (other := of.setdefault(slug(label), label)) != label:
            raise NeuronSelectError(f"has the same folder as {other!r}; compare them with an --out each",
                                    option="methods", value=label)  # fmt: skip


def _share_pass(
    jobs: dict[tuple[str, str], Job], folder: Path, config: CompareConfig, failures: Failures, note: Say
) -> None:
    """One pass over the pool for all jobs. Those of a method that cannot read rows of the pool are left out, with the reason.

    Raises:
        NeuronSelectError: none can, or something else is wrong.
    """
    try:
        share_pass(list(jobs.values()), folder, least=1, num_workers=config.processes, say=note)
    except NeuronSelectError:
        one = {label: job for (label, _), job in jobs.items()}
        failing = set(one) - set(able_on_pool(one, failures))
        if not failing:
            raise
        for key in [key for key in jobs if key[0] in failing]:
            del jobs[key]
        failures.check(jobs)
        share_pass(list(jobs.values()), folder, least=1, num_workers=config.processes, say=note)


def _prepared(
    methods: Sequence[Chosen], rows: Rows, config: CompareConfig, note: Say, failures: Failures
) -> list[Chosen]:
    """The methods after their work on the pool.

    Raises:
        NeuronSelectError: there are none.
    """
    found = []
    for chosen in methods:
        with failures.noted(chosen.label):
            works = type(chosen.method).prepare is not Method.prepare
            found.append(chosen.prepared(rows, extractor_of(config, chosen.signals, note)) if works else chosen)
    failures.check(found)
    return found


def _job(chosen: Chosen, rows: Rows, targets: Mapping[str, Rows], extractor: NeuronFeatureExtractor) -> Job:
    return Job(chosen, rows, targets, extractor=extractor.with_features(chosen.signals))


@dataclass(frozen=True)
class Picked:
    """What a method picks for a target.

    Attributes:
        first: the selection. draws: its rows, and those of other seeds. seconds: scoring and picking of the first.
    """

    first: Selection
    draws: list[np.ndarray]
    seconds: float


def _picked(together: Together, name: str, config: CompareConfig, folder: Path | None) -> Picked:
    """The selection, kept in a folder or taken from there, and the rows of further draws."""
    job = together.jobs[name]
    if job.chosen.keeps_all:
        config = replace(config, ratio=None, k=None, threshold=None, max_tokens=None)
    first = None if folder is None else made_before(job, config, folder)
    if first is not None:
        seconds = first.provenance.timing.seconds
    else:
        job.sweep = together.sweep
        started = time.perf_counter()
        first = job.select(config)
        seconds = together.seconds + time.perf_counter() - started
        if folder is not None:
            first.save_pretrained(folder, reasons=False)  # many selections: their cards would cost minutes
    seeds = range(config.seed + 1, config.seed + (config.draws if job.chosen.draws else 1))
    draws = [first.indices, *(together.draw(name, seed, config) for seed in seeds)]
    return Picked(first, draws, seconds)


def made_before(job: Job, config: CompareConfig, folder: Path) -> Selection | None:
    """The selection in a folder, if the job would make the same: of these rows, exemplars, signals and options."""
    if not (folder / SELECTION_RECORD).is_file():
        return None
    try:
        selection = Selection.from_pretrained(folder)
    except NeuronSelectError:  # damaged: made again
        return None
    made, selector = selection.provenance, job.fit()
    budget = budget_of(job, config)
    sources = {name: rows.source for name, rows in job.targets.items()}
    same = (
        made.pool.commit is not None
        and made.pool.pins == job.rows.source.pins
        and all(source.commit is not None for source in sources.values())
        and {name: one.source and one.source.pins for name, one in made.targets.items()}
        == {name: source.pins for name, source in sources.items()}
        and made.method == selector.about().method
        and made.budget == budget
        and made.exclude == tuple(config.exclude)
        and (made.spread or Spread()) == (config.spread or Spread())
        and _read_alike(made.extractor, selector.extraction_of(job.extractor))
        and made.packages["hf-neuronselect"] == version("hf-neuronselect")
    )
    return selection if same else None


def _read_alike(made: ExtractionRecord | None, now: ExtractionRecord) -> bool:
    """Whether the same signals were read; where a method reads none, whether rows were read and counted alike."""
    if made is None or made.signals or now.signals:
        return (made.signals if made else {}) == now.signals
    return (made.model and made.model.pins, made.options) == (now.model and now.model.pins, now.options)


def _measured(
    found: Comparison, together: Together, target: str, picked: Picked, right: np.ndarray | None, facts: RowFacts,
    config: CompareConfig,
) -> Line:  # fmt: skip
    """The line of a method on a target; its selection and the samples of its precision go into the comparison.

    Args:
        right: bool ``[N]``, rows from related sources.
    """
    chosen, first, draws = together.jobs[target].chosen, picked.first, picked.draws
    found.selections[chosen.label, target] = first
    others = (one for (_, of), one in found.selections.items() if of == target)
    reference, texture = next(others), facts.of(first.indices)
    lengths = first.scores.column("n_tokens").to_numpy()  # float64 with NaN where a length is not known
    line = Line(
        method=chosen.label,
        target=target,
        rows=len(first),
        overlap=float(np.mean([jaccard(reference.indices, rows) for rows in draws])),
        picked_tokens=_mean([mean_length(lengths[rows][lengths[rows] >= 0]) for rows in draws]),
        pool_tokens=first.provenance.tokens.pool_mean,
        answers=texture.answers,
        pool_answers=facts.whole.answers,
        mtld=texture.mtld,
        pool_mtld=facts.whole.mtld,
        near_copies=texture.near_copies,
        seconds=picked.seconds,
        draws=len(draws),
        stand_in=chosen.method.stand_in(found.extractor.extraction),
        **_costs(first),
    )
    if right is None:
        return line
    shares = [_share(right, rows) for rows in draws]
    again = [_share(right, rows) for rows in together.resamples(target, config)]
    samples = shares if len(draws) > 1 else again
    found.samples[chosen.label, target] = np.asarray(samples)
    low, high = np.percentile(samples, [LOW, HIGH]).tolist() if len(samples) > 1 else (None, None)
    recall = float(np.mean([right[rows].sum() for rows in draws])) / max(1, int(right.sum()))
    return replace(
        line, precision=float(np.mean(shares)), low=low, high=high, recall=recall, base_rate=float(right.mean())
    )


def _share(right: np.ndarray, rows: np.ndarray) -> float:
    """The share of rows that are right; 0 where nothing was picked, which is no good selection."""
    return float(right[rows].mean()) if len(rows) else 0.0


def _costs(selection: Selection) -> dict[str, Any]:
    """What a selection cost, as a line has it."""
    cost = selection.provenance.cost
    passes = list(cost.passes.values())
    peaks = [one.peak_bytes for one in passes if one.peak_bytes is not None]
    requests, money = (
        [getattr(one, name) for one in passes if getattr(one, name) is not None] for name in ("requests", "money")
    )
    seconds = float(sum(one.total_seconds for one in passes))
    return {
        "fit_seconds": cost.fit_seconds,
        "score_seconds": cost.score_seconds,
        "pass_seconds": round(seconds, 3),
        "tokens_per_second": round(sum(one.tokens for one in passes) / seconds, 1) if seconds else None,
        "peak_bytes": max(peaks) if peaks else None,
        "requests": sum(requests) if requests else None,
        "money": sum(money) if money else None,
    }


def _related(config: CompareConfig, specs: Mapping[str, str]) -> dict[str, list[str]]:
    """Related sources by target; of bundled targets on the bundled pool they are known."""
    known = bundled.related_sources() if config.pool == f"{BUNDLED}pool" else {}
    found = {name: known[spec.removeprefix(BUNDLED)] for name, spec in specs.items()
             if spec.startswith(BUNDLED) and spec.removeprefix(BUNDLED) in known}  # fmt: skip
    for name, sources in config.related.items():
        if name not in specs:
            raise NeuronSelectError(f"is no target; targets: {', '.join(specs)}", option="related", value=name)
        found[name] = [source.strip() for source in sources.split(",")]
    return found


def _sources(pool: Dataset, config: CompareConfig) -> np.ndarray | None:
    """Source of each row, if the pool has that column."""
    if config.source_column not in pool.column_names:
        return None
    names: dict[str, str] = {}  # each name once in memory, however large the pool is
    return np.asarray([names.setdefault(str(one), str(one)) for one in pool[config.source_column]], dtype=object)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
