"""Training on every method's picks with the same budget, and what held-out answers then cost, beside rows that need no method."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..core.configs import CompareConfig
from ..core.errors import NeuronSelectError
from ..models.loss import AnswerLoss
from ..rows.formats import Conversation, RowFormat, row_format
from ..rows.identity import pool_digest
from ..rows.load import conversations_of
from ..selection.reader import own_columns
from ..selection.selection import Selection
from ..training.config import TrainConfig
from ..training.evaluation import BASE, evaluate_models
from ..training.evaluation import METRIC as LOSS
from ..training.models import base_source
from ..training.sft import train_adapter
from .accuracy import CHECKED, METRIC, MOST, NOT_CHECKED, ROWS, Accuracy
from .comparison import Comparison, slug
from .job import Job, as_read
from .methods import method_of
from .parts import Say, load_named, named_specs, quiet
from .steps import Steps
from .trained import RowLosses, Trained, Transfer, ends_of, resampled_changes

FOLDER = "trained"
STEPS = 50
CONTROLS = ("random", "longest")


def check_training(config: CompareConfig, targets: Mapping[str, object]) -> dict[str, Dataset]:
    """Held-out rows by target; nothing: no training is asked for.

    Raises:
        NeuronSelectError: rows of no target, a key or value that TRL refuses, or keys without rows.
    """
    specs = named_specs(config.held_out, "held_out")
    if config.train and not specs:
        raise NeuronSelectError("is for training on the picks: add --held-out NAME=ROWS", option="train",
                                value=next(iter(config.train)))  # fmt: skip
    for name in specs:
        if name not in targets:
            raise NeuronSelectError(f"is no target; targets: {', '.join(targets)}", option="held_out", value=name)
    if config.transfer and len(specs) < 2:
        raise NeuronSelectError("needs held-out rows of at least two targets: add --held-out NAME=ROWS", option="transfer",
                                value=", ".join(specs) or "none")  # fmt: skip
    if not specs:
        return {}
    _settings(config, 0)
    found = load_named(specs, "held_out", config.columns.values())
    return {name: as_read(rows.data, config) for name, rows in found.items() if isinstance(rows.data, Dataset)}


def _settings(config: CompareConfig, seed: int) -> TrainConfig:
    given = {"max_steps": STEPS, **config.train, "seed": seed, "model": config.model, "revision": config.revision}
    return TrainConfig.from_section({name: value for name, value in given.items() if value is not None})


def train_all(found: Comparison, config: CompareConfig, held_out: Mapping[str, Dataset], note: Say) -> None:
    """Train on all picks for each target with held-out rows; runs that were done before are not done again.

    Beside the methods: the untouched model, rows drawn at random, drawn like the first method's picks in length and share of
    answers, the longest rows, and those that the first method scores lowest.
    """
    base = base_source(config.model, config.revision, to_train=True)
    folder = config.out / FOLDER
    folder.mkdir(exist_ok=True)
    steps, accuracy = Steps(folder, note), Accuracy()
    untouched: dict[tuple[str, ...], AnswerLoss] = {}
    if config.transfer:
        rows = sum(map(len, held_out.values()))
        note(
            f"--transfer: after each training the loss on all {rows:,} held-out rows of {len(held_out)} targets, not on its own alone"
        )
    for target, rows in held_out.items():
        for seed in range(config.seed, config.seed + config.train_seeds):
            settings = _settings(config, seed)
            for arm, indices in _arms(found, config, target, seed, note if seed == config.seed else quiet):
                name = f"{arm} on {target}, seed {seed}"
                picked = found.pool.select(indices).flatten_indices()
                fmt = row_format(own_columns(picked.column_names), config.row_format, config.columns)

                others = {name: of for name, of in held_out.items() if name != target} if config.transfer else {}

                def work(
                    picked: Dataset = picked,
                    fmt: RowFormat = fmt,
                    settings: TrainConfig = settings,
                    held_out: dict[str, Dataset] = {target: rows},  # noqa: B006
                    others: dict[str, Dataset] = others,
                ) -> Any:
                    return _measured(
                        base,
                        conversations_of(picked, fmt),
                        settings,
                        held_out,
                        others,
                        folder / "adapter",
                        accuracy,
                        untouched,
                        config.dtype,
                    )

                inputs = [[one.name for one in fields(Trained)], settings.about(), config.dtype, pool_digest(picked),
                          pool_digest(rows), base.key, ROWS, MOST]  # fmt: skip
                if others:
                    inputs.append({name: pool_digest(of) for name, of in others.items()})
                if config.columns or config.row_format != "auto":
                    inputs.append([fmt.name, fmt.columns])
                steps.run(name, inputs, work)
                result = dict(steps.done[name].result)
                losses, by_row = result.pop("losses"), result.pop("by_row")
                for at in losses:
                    found.by_row[arm, target, at, seed] = run = RowLosses(*map(np.asarray, by_row[at]))
                    (loss, before), (low, high) = losses[at], ends_of(resampled_changes([run]))
                    if at == target:
                        found.trained.append(Trained(arm, target, seed, len(picked), loss, before, low, high, **result))
                    if others:
                        found.transfers.append(Transfer(arm, target, at, seed, loss, before, low, high))


def _measured(
    base: Any, talks: list[Conversation], settings: TrainConfig, held_out: dict[str, Dataset], others: dict[str, Dataset],
    adapter: Path, accuracy: Accuracy, untouched: dict[tuple[str, ...], AnswerLoss], dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Losses and accuracies before and after training on rows, and the losses at other targets; the adapter is not kept."""
    shutil.rmtree(adapter, ignore_errors=True)
    record = train_adapter(talks, adapter, settings)
    by_row: dict[tuple[str, str], AnswerLoss] = {}
    measured = partial(
        evaluate_models,
        base,
        {"run": adapter},
        trained=[talks],
        chat_template=settings.chat_template(),
        untouched=untouched,
        by_row=by_row,
        dtype=dtype,
    )
    found = measured(held_out, measure=accuracy)
    of = {(row.model, row.metric): row.value for row in found}
    more = measured(others) if others else []
    losses = {(row.data, row.model): row.value for row in [*found, *more] if row.metric == LOSS}
    shutil.rmtree(adapter)
    results = record.results
    return {
        "losses": {name: [losses[name, "run"], losses[name, BASE]] for name in [*held_out, *others]},
        "by_row": {name: _by_row(by_row[BASE, name], by_row["run", name]) for name in [*held_out, *others]},
        "answers": round(results["answer_tokens"] / results["tokens"], 4),
        "seconds": results["seconds"],
        "accuracy": of.get(("run", METRIC)),
        "accuracy_untouched": of.get((BASE, METRIC)),
        "checked": int(of.get(("run", CHECKED), 0)),
        "not_checked": "" if ("run", METRIC) in of else NOT_CHECKED,
    }


def _by_row(before: AnswerLoss, after: AnswerLoss) -> list[list[float]]:
    """Of rows with an answer: nats before and after, and answer tokens."""
    usable = before.tokens > 0
    return [before.nll[usable].tolist(), after.nll[usable].tolist(), before.tokens[usable].tolist()]


def _arms(
    found: Comparison, config: CompareConfig, target: str, seed: int, note: Say = quiet
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and rows of what is trained on."""
    picked = {method: one for (method, of), one in found.selections.items() if of == target}
    if not picked:
        note(f"no method ran for {target}: nothing is trained for it")
        return
    first = next(iter(picked))
    count = len(picked[first])
    for method, selection in picked.items():
        if method not in CONTROLS:
            yield method, selection.indices
    job = found.jobs[first, target]
    for name in CONTROLS:
        yield name, _like(job, name, {}, seed, count, config).indices
    like = str(config.out / slug(first) / target)
    name = f"matched-random ({first})"
    try:
        matched = _like(job, "matched-random", {"selection": like}, seed, count, config).indices
    except NeuronSelectError as cause:  # too few other rows
        note(f"{name} is not trained on for {target}: {cause}")
    else:
        yield name, matched
    scores = picked[first].scores
    free = np.asarray([not why for why in scores.column("excluded").to_pylist()])
    values = scores.column("score").to_numpy()
    rows = np.flatnonzero(free)
    yield f"lowest ({first})", rows[np.lexsort((rows, values[rows]))][:count]


def _like(job: Job, method: str, options: Mapping[str, Any], seed: int, count: int, config: CompareConfig) -> Selection:
    """A control's selection of as many rows, from the same pool without the same leaks."""
    assert job.extractor is not None
    chosen = method_of(method, options, seed)
    other = Job(chosen, job.rows, {}, extractor=job.extractor.with_features(chosen.signals), marks=job.marks)
    return other.select(replace(config, k=count, ratio=None, threshold=None, max_tokens=None))
