"""Fit targets, score pools, select rows."""

from .selection import Selection
from .selector import NeuronSelector

__all__ = ["NeuronSelector", "Selection"]
