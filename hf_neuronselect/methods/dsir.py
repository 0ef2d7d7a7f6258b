"""DSIR (arXiv 2302.03169): importance weights of hashed n-grams, exemplars against pool."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.options import opt
from ..signals.columns import RowBatch, SparseRows
from .base import PoolMethod, Scorer, Target, register_method
from .random import gumbel
from .why import Why

BUCKETS = 10_000
MOST = 100_000 * BUCKETS
"""n-grams of the pool that its distribution is fitted on at most."""
FLOOR = 1e-8
_WORD_PUNCT = re.compile(r"\w+|[^\w\s]+")


@dataclass
class Seen:
    """The pool's n-grams by bucket, and how many rows have too few words."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    ngrams: int = 0
    rows: int = 0
    short: int = 0


@register_method
@dataclass(frozen=True)
class Dsir(PoolMethod):
    """``log w = sum_b c_b (log(p_b + 1e-8) - log(q_b + 1e-8))`` over a row's n-grams, with Gumbel noise: a draw, not a top k.

    ``c`` counts a row's words and pairs of words (lower case, WordPunct) in 10,000 buckets (sha256); ``p`` are the shares of
    the buckets among the exemplars' n-grams, ``q`` among the pool's. The sum is not divided by the row's length. Choices:
    a row is the texts of all its turns, without the names of roles; no row is too short (the authors' code drops those
    under 100 words, which most instructions are).
    """

    name = "dsir"
    paper = "arXiv:2302.03169"
    signals = ("words",)

    gumbel: bool = opt(True, "Add Gumbel noise, so that rows are drawn by their weights; false: the largest weights.")
    min_words: int = opt(0, "Rows of fewer words are left out; 100 in the authors' code.", unit="words", minimum=0)
    seed: int = opt(0, "Seed of the noise.", minimum=0)

    def fit(self, exemplars: RowBatch) -> Target:
        """``counts``: the exemplars' n-grams by bucket, int64 ``[10000]``."""
        counts = np.bincount(hashed(exemplars["words"]).indices, minlength=BUCKETS)
        if not counts.any():
            raise NeuronSelectError(
                "finds no word in any exemplar; give exemplars with text, or another method", option="method",
                value=self.name,
            )  # fmt: skip
        return {"counts": counts}

    def start(self) -> Seen:
        return Seen()

    def observe(self, state: Seen, rows: RowBatch) -> None:
        ngrams = hashed(rows["words"])
        fitted = int(
            (state.ngrams + ngrams.indptr[:-1] <= MOST).sum()
        )  # as the authors': the row that exceeds it counts
        end = int(ngrams.indptr[fitted])
        state.counts += np.bincount(ngrams.indices[:end], minlength=BUCKETS)
        state.ngrams += end
        state.rows += len(rows)
        state.short += int((_words(ngrams) < self.min_words).sum())

    def finish(self, state: Seen, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """``log_ratio`` of each bucket, float64 ``[10000]``."""
        if state.short:
            warnings.warn(
                f"{self.name} leaves out {state.short} of {state.rows} rows, which have fewer than {self.min_words} words; "
                "a smaller min_words keeps them",
                NeuronSelectWarning,
                stacklevel=2,
            )
        of_pool = np.log(state.counts / max(1, state.ngrams) + FLOOR)
        return {
            name: {"log_ratio": np.log(target["counts"] / target["counts"].sum() + FLOOR) - of_pool}
            for name, target in targets.items()
        }

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return self.scorer({"target": target})(rows)["target"]

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        from ..signals.kernels import products  # numba is loaded only where rows are scored

        table = np.stack([target["log_ratio"] for target in targets.values()], axis=1)

        def score(rows: RowBatch) -> dict[str, np.ndarray]:
            ngrams = hashed(rows["words"])
            weights, _ = products(ngrams, table)
            weights[_words(ngrams) < self.min_words] = np.nan
            return {name: np.ascontiguousarray(weights[:, i]) for i, name in enumerate(targets)}

        return score

    def drawn(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """With Gumbel noise, the same for all exemplars."""
        if not self.gumbel:
            return scores
        return (scores.T + gumbel(self.seed, rows)).T

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """What each word and pair of words adds to the sum."""
        words = _WORD_PUNCT.findall(row["words"][0].lower())
        counts = Counter([*words, *map(" ".join, zip(words, words[1:], strict=False))])
        times = np.asarray(list(counts.values()), np.float64)
        ratios = np.asarray([target["log_ratio"][bucket(ngram)] for ngram in counts])
        total = float((times * ratios).sum())
        says = (
            f"{total:.4g} = the sum over {len(counts)} words and pairs of words of log(exemplars' share / pool's share)"
        )
        facts = {"times": times, "log ratio": ratios}
        return Why.of(says, "n-gram", times * ratios, names=list(counts), facts=facts)


def hashed(texts: Sequence[str] | np.ndarray) -> SparseRows:
    """The buckets of each text's words and pairs of words, in their order, each with the value 1."""
    found: list[int] = []
    ends = [0]
    for text in texts:
        words = _WORD_PUNCT.findall(text.lower())
        found += map(bucket, words)
        found += map(bucket, map(" ".join, zip(words, words[1:], strict=False)))
        ends.append(len(found))
    return SparseRows(np.asarray(ends, np.int64), np.asarray(found, np.int32), np.ones(len(found), np.float32))


@lru_cache(1 << 20)
def bucket(ngram: str) -> int:
    """sha256 modulo 10,000."""
    return int.from_bytes(hashlib.sha256(ngram.encode("utf-8", "surrogatepass")).digest(), "big") % BUCKETS


def _words(ngrams: SparseRows) -> np.ndarray:
    """How many words each row has: m words make m - 1 pairs."""
    return (np.diff(ngrams.indptr) + 1) // 2
