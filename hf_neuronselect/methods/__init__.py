"""Selection methods, one file each, found by their paper's name.

A third party adds one in three lines::

    @register_method
    class Shouting(Method):
        name, features, needs_target = "shouting", (), False
        def score(self, batch, target): return np.asarray([text.count("!") for text in batch.texts])
"""

from . import full, hidden, longest, mona, nait, polysemantic, random, routing
from .base import METHODS, Method, make_method, register_method

__all__ = ["METHODS", "Method", "make_method", "register_method"]

_ = (hidden, mona, nait, polysemantic, routing, full, longest, random)  # imported to register themselves
