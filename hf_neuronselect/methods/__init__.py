"""Selection methods, one file each, found by their paper's name.

A third party adds one in five lines::

    @register_method
    class Shouting(Method):
        name, signals, needs_target = "shouting", ("text",), False
        def score(self, rows, target):
            return np.asarray([text.count("!") for text in rows["text"]])
"""

from . import (  # noqa: F401 (imported to register themselves)
    alpagasus,
    bm25,
    deita,
    dsir,
    encoder,
    full,
    gist,
    gradient_norm,
    hidden,
    ifd,
    igds,
    instruction_mining,
    less,
    llm2vec,
    longest,
    matched_random,
    mates,
    mona,
    nag,
    nait,
    nait_contrast,
    polysemantic,
    random,
    rds_plus,
    routing,
    sae_diversity,
    selectit,
    subset,
    zip_fit,
)
from .base import METHODS, Method, PoolMethod, make_method, register_method, signals_needed

__all__ = ["METHODS", "Method", "PoolMethod", "make_method", "register_method", "signals_needed"]
