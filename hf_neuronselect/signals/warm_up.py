"""The rows of a warm-up, drawn from a pool and read as training reads them."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from ..core.errors import NeuronSelectError
from ..models.warm_up import Trainer, WarmUp
from ..rows.answers import left_out
from ..rows.encode import Sample
from ..rows.formats import read_row, row_format
from .extraction import Extraction
from .forward import place_of
from .gradient import answers_of

_READ = 256  # rows at a time


def trainer_of(pool: Dataset, extraction: Extraction, how: WarmUp, work: Path) -> Trainer:
    """A warm-up on a random share of a pool; rows without an answer are passed over.

    Args:
        work: folder in which its checkpoints are kept.

    Raises:
        NeuronSelectError: no row has an answer, or the model takes no LoRA.
    """
    options = extraction.options
    fmt = row_format(pool.column_names, options.row_format, options.columns)
    texts, order, wanted = pool.with_format(None).select_columns(fmt.used), how.draw(len(pool)), how.count(len(pool))
    samples: list[Sample] = []
    passed: list[Sample] = []
    for start in range(0, len(order), _READ):
        if len(samples) >= wanted:
            break
        for sample in answers_of(extraction, [read_row(texts[int(i)], fmt) for i in order[start : start + _READ]]):
            (passed if sample.skip else samples).append(sample)
    if not samples:
        raise NeuronSelectError(f"no row has an answer to train on ({left_out(passed)})", option="pool")
    return Trainer(how, samples[:wanted], extraction.spec, place_of(extraction, None), extraction.model_state(), work)
