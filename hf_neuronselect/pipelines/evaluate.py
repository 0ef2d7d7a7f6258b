"""Compare a base model and its adapters: loss on held-out answers, accuracy on tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from datasets import Dataset

from ..core.configs import EvaluateConfig, EvaluateOptions
from ..core.errors import NeuronSelectError
from ..core.folders import EVALUATION
from ..core.provenance import EvaluationRecord, EvaluationRow, SourceRecord
from ..core.sources import Source
from ..core.writing import reserve
from ..explain.report import text_table
from ..rows.formats import Conversation
from ..rows.load import load_rows
from ..training.evaluation import BASE, METRIC, evaluate_models, evaluation_table, write_evaluation
from ..training.models import base_source
from .parts import Say, named_specs, quiet

if TYPE_CHECKING:
    from ..training.harness import HarnessResults


def evaluate(config: EvaluateConfig, *, say: Say = quiet, note: Say = quiet) -> EvaluationRecord:
    """Evaluate a base model and its adapters into ``config.out``.

    Raises:
        NeuronSelectError: bad input, or an adapter of another base.
    """
    check_tasks(config)
    with reserve(config.out, EVALUATION):
        adapters = named_specs(config.adapter, "adapter")
        held_out = load_held_out(config)
        found = measure(base_source(config.model, config.revision), adapters, config, held_out)
        write_evaluation(config.out, found)
    for line in evaluation_text(found):
        say(line)
    say(f"-> {config.out / 'evaluation.json'}")
    return found


def check_tasks(options: EvaluateOptions) -> None:
    """Refuse tasks where lm-evaluation-harness is not installed.

    Raises:
        NeuronSelectError: it is not.
    """
    if options.tasks and find_spec("lm_eval") is None:
        raise NeuronSelectError("needs lm-evaluation-harness: pip install 'hf-neuronselect[lm-eval]'", option="tasks",
                                value=", ".join(options.tasks))  # fmt: skip


def load_held_out(options: EvaluateOptions) -> dict[str, Dataset]:
    """Held-out rows by name."""
    found = {}
    for name, spec in named_specs(options.data, "data").items():
        rows = load_rows(spec, option="data").data
        assert isinstance(rows, Dataset)
        found[name] = rows
    return found


def measure(
    base: Source,
    adapters: Mapping[str, str],
    options: EvaluateOptions,
    held_out: Mapping[str, Dataset],
    *,
    trained: Sequence[Sequence[Conversation]] = (),
    chat_template: str | None = None,
) -> EvaluationRecord:
    """Losses on held-out rows, then tasks.

    Args:
        trained: rows the adapters were trained on; evaluation rows found there are taken out.
    """
    found = EvaluationRecord(base=SourceRecord.of(base))
    if held_out:
        rows = evaluate_models(
            base,
            adapters,
            held_out,
            trained=trained,
            chat_template=chat_template,
            max_rows=options.max_rows,
            max_length=options.max_length,
            dtype=options.dtype,
            device=options.device,
        )
        found = replace(found, rows=tuple(rows))
    if options.tasks:
        results = _run_harness(base, adapters, options)
        rows = [
            EvaluationRow(model=row.model, data=row.task, metric=row.metric, value=row.value, rows=row.samples)
            for row in results.rows
        ]
        found = replace(found, rows=(*found.rows, *rows), tasks=results.to_dict(), tasks_table=results.table())
    return found


def _run_harness(base: Source, adapters: Mapping[str, str], options: EvaluateOptions) -> HarnessResults:
    from ..training.harness import run_tasks  # lm-eval is an extra

    return run_tasks(
        base.location,
        {BASE: None, **adapters},
        options.tasks,
        revision=base.revision,
        # An adapter's tokenizer has a chat template, which a base model may lack.
        tokenizer=next(iter(adapters.values()), None),
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        apply_chat_template=options.apply_chat_template,
        dtype=options.dtype,
        device=options.device,
    )


def evaluation_text(found: EvaluationRecord) -> list[str]:
    """Lines that show an evaluation: losses, then tasks as papers print them."""
    lines = []
    losses = [row for row in found.rows if row.metric == METRIC]
    if losses:
        lines = [
            "",
            text_table(*evaluation_table(losses)),
            f"({METRIC}: nats a token of held-out answers, lower is better)",
        ]
    return lines if found.tasks_table is None else [*lines, "", found.tasks_table]
