"""What is measured about selections and the models trained on them, as modules of Hugging Face ``evaluate``.

Each folder is loaded by ``evaluate.load(str(metric_path(name)))`` and can be pushed to the Hub as a Space as it is.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import unknown

METRICS = ("answer_match", "mtld", "precision_at_budget", "selection_overlap", "target_loss")


def metric_path(name: str) -> Path:
    """The folder of a module; ``evaluate.load`` takes it as a string.

    Args:
        name: one of :data:`METRICS`.

    Raises:
        NeuronSelectError: an unknown name.
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS, "metric")
    return Path(__file__).parent / name
