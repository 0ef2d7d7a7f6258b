"""BM25: rows that share rare words with the exemplars; scored by the library bm25s."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.options import opt
from ..signals.columns import RowBatch
from .base import PoolMethod, Target, register_method
from .why import Why

K1, B = 1.5, 0.75
LONG = 20
"""Mean length of words above which they are probably whole sentences."""
_ASCII = re.compile(r"\w+")
# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, Tai, Balinese, Javanese, kana, Yi, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u3005-\u3007\u3040-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f\ua980-\ua9df\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)


class Numbers(dict[str, int]):
    """Terms by number; one that is looked up for the first time gets the next."""

    def __missing__(self, term: str) -> int:
        self[term] = number = len(self)
        return number


@dataclass
class Documents:
    """Rows of the pool as numbers of their terms.

    Attributes:
        known: term -> its number. terms: numbers of each row's terms, in their order. rows: the rows' numbers.
    """

    known: Numbers = field(default_factory=Numbers)
    terms: list[list[int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@register_method
@dataclass(frozen=True)
class Bm25(PoolMethod):
    """Lucene's BM25 (k1 1.5, b 0.75) of a row, as a document, for each exemplar, as a query.

    Choices: a row and an exemplar are the texts of all their turns, without the names of roles. Words are runs of
    letters, marks, digits and ``_`` in lower case (NFKC, case folded), however short; scripts without spaces are cut into
    overlapping pairs of characters. What a target keeps is a 64-bit hash of each word, in no order.
    """

    name = "bm25"
    paper = "Robertson & Zaragoza, 2009 (doi:10.1561/1500000019)"
    signals = ("words",)
    libraries = ("bm25s",)
    judges_others = False
    scores_by_row = True

    queries: Literal["mean", "max"] = opt("mean", "A row's score over the exemplars: their mean, or the best.")
    stop_words: Literal["none", "english"] = opt("none", "english: leave out its most common words.")
    unspaced: Literal["pairs", "characters"] = opt(
        "pairs", "How scripts without spaces are cut: overlapping pairs of characters, or single ones."
    )

    def terms(self, text: str) -> list[str]:
        """The words of a text that count."""
        found = terms_of(text, 2 if self.unspaced == "pairs" else 1)
        if self.stop_words == "english":
            common = _english()
            found = [term for term in found if term not in common]
        return found

    def fit(self, exemplars: RowBatch) -> Target:
        """``terms``: uint64 hashes of all words, sorted within each exemplar; ``lengths``: how many each has."""
        words = [self.terms(text) for text in exemplars["words"]]
        queries = [sorted(map(_hashed, terms)) for terms in words]
        lengths = np.asarray([len(query) for query in queries], dtype=np.int64)
        if not lengths.any():
            raise NeuronSelectError(
                "finds no word in any exemplar; give exemplars with text, or another method", option="method",
                value=self.name,
            )  # fmt: skip
        if empty := int((lengths == 0).sum()):
            warnings.warn(
                f"{self.name} finds no word in {empty} of {len(lengths)} exemplars, which count for nothing; remove them",
                NeuronSelectWarning,
                stacklevel=2,
            )
        if (letters := np.mean([len(term) for terms in words for term in terms])) > LONG:
            warnings.warn(
                f"the exemplars' words have {letters:.0f} letters on average: {self.name} cannot split a script without "
                "spaces that it does not know; compare with another method",
                NeuronSelectWarning,
                stacklevel=2,
            )
        return {"terms": np.asarray([term for query in queries for term in query], np.uint64), "lengths": lengths}

    def start(self) -> Documents:
        return Documents()

    def observe(self, state: Documents, rows: RowBatch) -> None:
        state.terms += (list(map(state.known.__getitem__, self.terms(text))) for text in rows["words"])
        state.rows += rows.index.tolist()

    def finish(self, state: Documents, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """``rows``, ascending, and their ``scores``; the ``known`` words' hashes and in how many rows each is (``frequency``);
        ``size``: how many rows, and their mean length.
        """
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.INFO)  # it says each step otherwise
        known = {_hashed(term): number for term, number in state.known.items()}
        rows, index = np.asarray(state.rows, np.int64), bm25s.BM25(method="lucene", k1=K1, b=B, dtype="float64")
        if known:
            index.index((state.terms, dict(state.known)), show_progress=False)
        lengths = [len(terms) for terms in state.terms]
        about_pool = {  # what a score is explained by
            "known": np.asarray(list(known), np.uint64),
            "frequency": np.diff(index.scores["indptr"]) if known else np.zeros(0, np.int64),
            "size": np.asarray([len(lengths), sum(lengths) / max(1, len(lengths))]),
        }
        found = {}
        for name, target in targets.items():
            queries = np.split(target["terms"], np.cumsum(target["lengths"])[:-1])
            numbers = [[known[term] for term in query.tolist() if term in known] for query in queries if len(query)]
            if not any(numbers):
                warnings.warn(
                    f"no word of the exemplars is in the pool, so {self.name} scores every row 0: are they of another "
                    "language?",
                    NeuronSelectWarning,
                    stacklevel=2,
                )
            table = [index.get_scores_from_ids(query) if query else np.zeros(len(rows)) for query in numbers]
            scores = np.mean(table, axis=0) if self.queries == "mean" else np.max(table, axis=0)
            found[name] = {**target, "rows": rows, "scores": scores, **about_pool}
        return found

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return target["scores"][np.searchsorted(target["rows"], rows.index)]

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """What each word of the row adds: ``idf tf / (tf + k1 (1 - b + b length / mean length))`` an exemplar that has it."""
        words = self.terms(row["words"][0])
        counts, own = Counter(words), {_hashed(word): word for word in words}
        frequency = dict(zip(target["known"].tolist(), target["frequency"].tolist(), strict=True))
        documents, mean_length = target["size"].tolist()

        def weight(word: str, seen: int) -> float:
            rare = math.log(1 + (documents - seen + 0.5) / (seen + 0.5))
            return rare * counts[word] / (counts[word] + K1 * (1 - B + B * len(words) / mean_length))

        queries = [
            query.tolist() for query in np.split(target["terms"], np.cumsum(target["lengths"])[:-1]) if len(query)
        ]
        tables: list[dict[str, float]] = []
        for query in queries:
            tables.append({})
            for term in query:
                if term in own and term in frequency:
                    tables[-1][own[term]] = tables[-1].get(own[term], 0.0) + weight(own[term], frequency[term])
        best = self.queries == "max"
        if best:
            tables = [max(tables, key=lambda table: sum(table.values()))]
        parts: dict[str, float] = {}
        for table in tables:
            for word, amount in table.items():
                parts[word] = parts.get(word, 0.0) + amount / len(tables)
        says = f"{sum(parts.values()):.4g} = the weights of {len(parts)} words that it shares with " + (
            "the best exemplar" if best else f"exemplars, averaged over {len(tables)} exemplars"
        )
        facts = {
            "times": np.asarray([counts[word] for word in parts], np.float64),
            "rows with it": np.asarray([frequency[_hashed(word)] for word in parts], np.float64),
        }
        return Why.of(says, "word", list(parts.values()), names=list(parts), facts=facts)


def terms_of(text: str, unit: int = 2) -> list[str]:
    """The words of a text; runs of a script without spaces as overlapping parts of ``unit`` characters.

    A character is a letter with the marks that follow it.
    """
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    if text.isascii():
        return _ASCII.findall(text)
    word, runs, letter = _patterns()
    terms: list[str] = []
    for found in word.findall(text):
        if found.isascii():
            terms.append(found)
            continue
        for run in runs.findall(found):
            if not run[0]:
                terms.append(run[1])
                continue
            letters = letter.findall(run[0])
            for i in range(max(1, len(letters) - unit + 1)):
                terms.append("".join(letters[i : i + unit]))
    return terms


@lru_cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    r"""Of words, of runs with and without spaces, and of letters with their marks (which ``\w`` lacks)."""
    marks = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "M"]
    mark = "".join(re.escape(one) for one in marks)
    return (
        re.compile(rf"\w+(?:[{mark}]+\w*)*"),
        re.compile(rf"([{_UNSPACED}]+)|([^{_UNSPACED}]+)"),
        re.compile(rf".[{mark}]*", re.DOTALL),
    )


@lru_cache
def _english() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


def _hashed(term: str) -> int:
    return int.from_bytes(hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
