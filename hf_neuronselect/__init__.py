"""Select the instruction data that makes a model better at a task, by the model's own neurons."""

from .errors import NeuronSelectError, NeuronSelectWarning
from .features.extractor import NeuronFeatureExtractor
from .features.features import Feature, register_feature
from .features.store import FeatureStore
from .library import FeatureLibrary
from .methods import Method, register_method
from .selection import NeuronSelector, Selection

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
