"""Select the instruction data that makes a model better at a task, by the model's own neurons."""

from .core.errors import NeuronSelectError, NeuronSelectWarning
from .methods import Method, register_method
from .selection import NeuronSelector, Selection
from .selection.library import FeatureLibrary
from .signals.extractor import NeuronFeatureExtractor
from .signals.forward import Feature, register_feature
from .store.store import FeatureStore

__version__ = "0.1.0"

__all__ = [
    "Feature",
    "FeatureLibrary",
    "FeatureStore",
    "Method",
    "NeuronFeatureExtractor",
    "NeuronSelectError",
    "NeuronSelectWarning",
    "NeuronSelector",
    "Selection",
    "register_feature",
    "register_method",
]
