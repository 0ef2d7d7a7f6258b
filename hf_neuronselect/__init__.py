"""Select the instruction data that makes a model better at a task, by the model's own neurons."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.errors import NeuronSelectError, NeuronSelectWarning
    from .core.progress import show_progress
    from .methods import Method, PoolMethod, register_method
    from .pickers import Picker, register_picker
    from .selection.library import FeatureLibrary
    from .selection.selection import Selection
    from .selection.selector import NeuronSelector
    from .signals.base import Signal, register_signal
    from .signals.extractor import NeuronFeatureExtractor
    from .store.store import FeatureStore

__version__ = "0.1.0"

# Loaded when first used: torch, transformers and datasets take seconds to import.
_PLACES = {
    "FeatureLibrary": ".selection.library",
    "FeatureStore": ".store.store",
    "Method": ".methods",
    "NeuronFeatureExtractor": ".signals.extractor",
    "NeuronSelectError": ".core.errors",
    "NeuronSelectWarning": ".core.errors",
    "NeuronSelector": ".selection.selector",
    "Picker": ".pickers",
    "PoolMethod": ".methods",
    "Selection": ".selection.selection",
    "Signal": ".signals.base",
    "register_method": ".methods",
    "register_picker": ".pickers",
    "register_signal": ".signals.base",
    "show_progress": ".core.progress",
}

__all__ = [
    "FeatureLibrary",
    "FeatureStore",
    "Method",
    "NeuronFeatureExtractor",
    "NeuronSelectError",
    "NeuronSelectWarning",
    "NeuronSelector",
    "Picker",
    "PoolMethod",
    "Selection",
    "Signal",
    "register_method",
    "register_picker",
    "register_signal",
    "show_progress",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
