"""Feature columns: what one forward pass turns a row into."""

from .extractor import NeuronFeatureExtractor

__all__ = ["NeuronFeatureExtractor"]
