"""Loss of a base model and its adapters on held-out answers, in one table."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.folders import EVALUATION
from ..core.progress import track
from ..core.provenance import EvaluationRecord, EvaluationRow, plain
from ..core.seals import encode, read
from ..core.sources import Source
from ..core.writing import put
from ..models.loss import AnswerLoss, answer_losses
from ..rows.formats import Conversation
from ..rows.leakage import Leakage, normalised
from ..rows.load import conversations_of
from .figures import results_figure
from .models import adapted, adapter_source, check_base, load_for_evaluation, load_tokenizer

logger = logging.getLogger(__name__)

BASE = "base"
METRIC = "target_loss"
EVALUATION_RECORD = "evaluation.json"


def without_trained(data: Dataset, trained: Sequence[Dataset | Sequence[Conversation]]) -> tuple[Dataset, int]:
    """Leave out evaluation rows whose text or question occurs in the training rows.

    Returns:
        The other rows, and how many were left out.
    """
    learnt = [conversation for rows in trained for conversation in conversations_of(rows)]
    found = conversations_of(data)
    seen, asked = Leakage.of(learnt), Leakage.of(found)
    # Conversely: training rows that contain an evaluation question inside a longer text.
    holding = [normalised(row.content()) for row in learnt if asked.find(row)]

    def occurs(row: Conversation) -> bool:
        questions = Leakage.of([row]).texts
        return seen.find(row) or any(question in text for text in holding for question in questions)

    keep = [i for i, row in enumerate(found) if not occurs(row)]
    return data.select(keep), len(data) - len(keep)


def evaluate_models(
    base: Source,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Dataset],
    *,
    trained: Sequence[Dataset | Sequence[Conversation]] = (),
    max_length: int = 2048,
    max_rows: int | None = None,
    chat_template: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    token: str | bool | None = None,
    measure: Callable[[str, Any, Any, Sequence[Conversation]], Mapping[str, float]] | None = None,
    untouched: dict[tuple[str, ...], AnswerLoss] | None = None,
    by_row: dict[tuple[str, str], AnswerLoss] | None = None,
) -> list[EvaluationRow]:
    """Measure the loss of a base model and its adapters on held-out answers, in nats a token.

    Args:
        adapters: name -> folder or Hub id. data: name -> held-out rows of any format.
        trained: rows the adapters were trained on; evaluation rows that occur there are left out, for all models.
        max_rows: use only the first rows of each data set.
        chat_template: the one the adapters were trained with, if not the base's own.
        measure: gets a model's name, the model, its tokenizer and rows, and returns further numbers by metric.
        untouched: what earlier calls with the same base and options measured of it, by the rows; more is added.
        by_row: gets the losses of single rows, by model and data.

    Returns:
        One row a model and data set.

    Raises:
        NeuronSelectError: an adapter of another base, rows without answers, nothing left to evaluate on.
    """
    sources: dict[str, Source | None] = {BASE: None}
    for name, adapter in adapters.items():
        found_adapter = adapter_source(str(adapter), token)
        check_base(found_adapter, name, base, token)
        sources[name] = found_adapter
    cleaned: dict[str, tuple[list[Conversation], int]] = {}
    for name, rows in data.items():
        kept, taken = without_trained(rows, trained) if trained else (rows, 0)
        if taken:
            warnings.warn(
                f"data {name}: {taken} of {len(rows)} rows are left out, since the training rows hold them; "
                "give other held-out rows if too few are left",
                NeuronSelectWarning, stacklevel=2,
            )  # fmt: skip
        if not len(kept):
            raise NeuronSelectError(
                "every row is among the training rows; give other held-out rows", option="data", value=name
            )
        cleaned[name] = conversations_of(kept.select(range(min(max_rows or len(kept), len(kept))))), taken
    model = load_for_evaluation(base, dtype, device, token)
    tokenizer = load_tokenizer(base, token)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    found: list[EvaluationRow] = []
    for name, source in sources.items():
        with adapted(model, source, name, token) as tuned:
            for what, (rows, taken) in cleaned.items():
                known = untouched if untouched is not None and name == BASE else {}
                loss = known.get(key := tuple(row.exact() for row in rows))
                if loss is None:
                    with track(f"{name} on {what}", len(rows)) as progress:
                        loss = answer_losses(tuned, tokenizer, rows, max_length=max_length)
                        progress.done(len(rows))
                    known[key] = loss
                if by_row is not None:
                    by_row[name, what] = loss
                more = measure(name, tuned, tokenizer, rows) if measure is not None else {}
                found += (EvaluationRow(model=name, data=what, metric=key, value=value) for key, value in more.items())
                found.append(
                    EvaluationRow(
                        model=name,
                        data=what,
                        metric=METRIC,
                        value=round(loss.mean, 6),
                        rows=int((loss.tokens > 0).sum()),
                        answer_tokens=int(loss.tokens.sum()),
                        taken_out=taken,
                    )
                )
                logger.info("%s on %s: %.4f", name, what, loss.mean)
    return found


def evaluation_table(rows: Sequence[EvaluationRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One line a model, one column a data set and metric: ``(header, lines)``."""
    columns = list(dict.fromkeys((row.data, row.metric) for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    value = {(row.model, row.data, row.metric): row.value for row in rows}
    lines = [
        (model, *(f"{value[model, *column]:.4f}" if (model, *column) in value else "" for column in columns))
        for model in models
    ]
    return ("model", *(f"{data} {metric}" for data, metric in columns)), lines


def write_evaluation(folder: Path, record: EvaluationRecord) -> None:
    """Write ``evaluation.json`` and a picture of the losses, ``evaluation.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    if losses := [plain(row) for row in record.rows if row.metric == METRIC]:
        put(folder / "evaluation.png", results_figure(losses))
    put(folder / EVALUATION_RECORD, encode(record))


def read_evaluation(folder: Path) -> EvaluationRecord:
    """Read ``evaluation.json`` of a folder."""
    return read(folder / EVALUATION_RECORD, EvaluationRecord, what=EVALUATION.what, again=EVALUATION.again, option="out",
                value=folder.name)  # fmt: skip
