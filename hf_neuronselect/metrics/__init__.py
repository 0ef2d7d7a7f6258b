"""Metrics of selections and of models trained on them, as modules of Hugging Face ``evaluate``.

``evaluate.load(str(metric_path(name)))`` loads a module; its folder can be pushed to the Hub as a Space.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import unknown

METRICS = ("answer_match", "mtld", "precision_at_budget", "selection_overlap", "target_loss")


def metric_path(name: str) -> Path:
    """The folder of a metric; pass it to ``evaluate.load`` as a string.

    Args:
        name: one of :data:`METRICS`.

    Raises:
        NeuronSelectError: the name is unknown.
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS, "metric")
    return Path(__file__).parent / name
