"""Pickers, one file each: the order in which rows are taken once they are scored.

A third party adds one::

    @register_picker
    class WorstFirst(Picker):
        name = "worst-first"
        def order(self, scores, valid, wanted=None, vectors=None):
            return best_first(scores, valid)[::-1]
"""

from . import best_first, cover, diverse, knn, round_robin, transport  # noqa: F401 (imported to register themselves)
from .base import PICKERS, Picker, picker_of, register_picker

__all__ = ["PICKERS", "Picker", "picker_of", "register_picker"]
