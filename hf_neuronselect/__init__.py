"""Select the instruction data that makes a model better at a task, by the model's own neurons."""

from .core.errors import NeuronSelectError, NeuronSelectWarning
from .methods import Method, PoolMethod, register_method
from .selection import NeuronSelector, Selection
from .selection.library import FeatureLibrary
from .signals.base import Signal, register_signal
from .signals.extractor import NeuronFeatureExtractor
from .store.store import FeatureStore

__version__ = "0.1.0"

__all__ = [
    "Signal",
    "FeatureLibrary",
    "FeatureStore",
    "Method",
    "NeuronFeatureExtractor",
    "NeuronSelectError",
    "NeuronSelectWarning",
    "NeuronSelector",
    "PoolMethod",
    "Selection",
    "register_signal",
    "register_method",
]
