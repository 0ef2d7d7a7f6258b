"""``ratio auto`` by short trainings: on ever more of the same picks, of which the losers are stopped early."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from ..core.configs import SelectConfig
from ..core.errors import NeuronSelectError
from ..core.options import AUTO
from ..core.provenance import Budget, ShortRun, plain
from ..models.loss import answer_losses
from ..rows.formats import Conversation
from ..rows.load import conversations_of, load_rows
from ..selection.auto_ratio import LEAST
from ..selection.selection import Selection
from ..training.config import TrainConfig
from ..training.evaluation import without_trained
from ..training.models import adapted, adapter_source, base_source, load_for_evaluation, load_tokenizer
from ..training.sft import train_adapter
from .job import as_read
from .parts import Say

TRIED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
STEPS = 50
SHORT = 4  # the first trainings have one in so many steps
KEPT = 3  # one in so many of them goes on


def check_short_runs(config: SelectConfig) -> tuple[Dataset, TrainConfig]:
    """Held-out rows and settings of the trainings.

    Raises:
        NeuronSelectError: rows that cannot be read, or a key or value that TRL refuses.
    """
    given = {
        "max_steps": STEPS,
        **config.train,
        "seed": config.seed,
        "model": config.model,
        "revision": config.revision,
    }
    settings = TrainConfig.from_section({name: value for name, value in given.items() if value is not None})
    if int(settings.sft["max_steps"]) < 1:
        raise NeuronSelectError("max_steps of at least 1 is needed: all ratios are trained equally long", option="train",
                                value=settings.sft["max_steps"])  # fmt: skip
    assert config.held_out is not None
    rows = load_rows(config.held_out, option="held_out", texts=config.columns.values()).data
    assert isinstance(rows, Dataset)
    return as_read(rows, config), settings


def by_short_runs(selection: Selection, config: SelectConfig, note: Say) -> Selection:
    """The selection whose ratio has the smallest loss on held-out answers.

    Tried are the shares of :data:`TRIED` that are 20 rows or more, and the one estimated from scores. Each is trained for a
    quarter of the steps, the best third of them for all steps; equal losses go to the smaller share.

    Raises:
        NeuronSelectError: no held-out row is left that the pool does not hold.
    """
    made = selection.provenance
    assert made.auto is not None
    held_out, settings = check_short_runs(config)
    shares = [share for share in TRIED if (Budget(ratio=share).rows(made.counts.rows) or 0) >= LEAST]
    shares = sorted({*shares, made.auto.ratio})
    largest = selection.rethreshold(ratio=shares[-1])
    kept, _ = without_trained(held_out, [largest.conversations()])
    if not len(kept):
        raise NeuronSelectError("the pool holds every row; give other held-out rows", option="held_out",
                                value=config.held_out)  # fmt: skip
    trial = _Trial(config, settings, conversations_of(kept))
    runs: list[ShortRun] = []
    left, whole = shares, int(settings.sft["max_steps"])
    for steps in dict.fromkeys((max(1, whole // SHORT), whole)):
        losses = {}
        for share in left:
            rows = selection.rethreshold(ratio=share).conversations()
            losses[share] = trial.loss(rows, steps)
            runs.append(ShortRun(share=share, rows=len(rows), steps=steps, loss=losses[share]))
            note(f"ratio {share:g}, {steps} steps: held-out loss {losses[share]:.4f}")
        left = sorted(left, key=lambda share: (losses[share], share))[: math.ceil(len(left) / KEPT)]
    best = selection.rethreshold(ratio=left[0])
    auto = replace(made.auto, ratio=left[0], runs=tuple(runs), settings=plain(settings.about()))
    best.provenance = replace(best.provenance, auto=auto)
    return best


class _Trial:
    """Trains a LoRA adapter on rows and measures held-out answers; the base is loaded for measuring once."""

    def __init__(self, config: SelectConfig, settings: TrainConfig, held_out: list[Conversation]) -> None:
        base = base_source(config.model, config.revision, to_train=True)
        self.settings, self.held_out = settings, held_out
        self.model, self.tokenizer = load_for_evaluation(base, AUTO, AUTO, None), load_tokenizer(base, None)
        self.tokenizer.chat_template = settings.chat_template() or self.tokenizer.chat_template

    def loss(self, rows: list[Conversation], steps: int) -> float:
        """Nats per held-out answer token after so many steps on rows."""
        settings = replace(self.settings, sft={**self.settings.sft, "max_steps": steps})
        with tempfile.TemporaryDirectory(prefix="neuronselect-") as folder:
            adapter = Path(folder) / "adapter"
            train_adapter(rows, adapter, settings)
            with adapted(self.model, adapter_source(str(adapter), None), adapter.name) as tuned:
                return round(answer_losses(tuned, self.tokenizer, self.held_out).mean, 6)
