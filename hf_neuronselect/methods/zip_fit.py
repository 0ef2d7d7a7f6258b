"""ZIP-FIT (arXiv 2410.18194): rows that compress well together with the exemplars."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method, Scorer, Target, register_method
from .why import Why

GZIP = 18
"""Bytes that gzip puts around the compressed data."""
LONG = 600
"""Seconds from which on the time is said beforehand."""
THREADS = min(8, os.cpu_count() or 1)
"""Rows that are compressed at once; two take 0.52 times as long as one."""
_NEAR = 262  # zlib keeps so much of its window free
_SAMPLE = 8


@register_method
@dataclass(frozen=True)
class ZipFit(Method):
    """``mean over exemplars e of 1 - (C(x + e) - min(C(x), C(e))) / max(C(x), C(e))``, C the size after gzip.

    The text of the row comes first, with nothing between the two, as in the authors' package. Choices: a row and an exemplar
    are the texts of all their turns, without the names of roles; level 9, gzip's own default in Python. The package's
    default is 0, which compresses nothing: the score is then a function of the longer text's length alone.
    """

    name = "zip-fit"
    paper = "arXiv:2410.18194"
    signals = ("words",)
    not_saved = "keeps the exemplars' texts"

    level: int = opt(9, "gzip's level, 0 to 9; 0 (the authors' default) compresses nothing.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level > 9:
            raise NeuronSelectError("must be at most 9", option="level", value=self.level)

    def fit(self, exemplars: RowBatch) -> Target:
        """``bytes``: the exemplars' texts, uint8; ``lengths``: bytes of each."""
        texts = _encoded(exemplars["words"])
        return {
            "bytes": np.frombuffer(b"".join(texts), np.uint8),
            "lengths": np.asarray([len(text) for text in texts], np.int64),
        }

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return self.scorer({"target": target})(rows)["target"]

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        """Each different exemplar is compressed once a row, whatever targets have it."""
        texts = {name: _texts_of(target) for name, target in targets.items()}
        every = list(dict.fromkeys(text for of_target in texts.values() for text in of_target))
        columns = {name: [every.index(text) for text in of_target] for name, of_target in texts.items()}
        alignments = partial(self._alignments, exemplars=every, alone=self._sizes(every))

        def score(rows: RowBatch) -> dict[str, np.ndarray]:
            with ThreadPoolExecutor(THREADS, "zip-fit") as threads:  # zlib lets go of Python's lock
                table = np.stack(list(threads.map(alignments, _encoded(rows["words"]))))
            return {name: table[:, of_target].mean(axis=1) for name, of_target in columns.items()}

        return score

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each exemplar's share of the mean."""
        texts = _texts_of(target)
        found = self._alignments(_encoded(row["words"])[0], texts, self._sizes(texts))
        says = (
            f"{found.mean():.4f} = the mean over {len(texts)} exemplars of how well the row compresses with each; exemplar "
            f"{int(found.argmax())} is nearest ({found.max():.4f})"
        )
        return Why.of(says, "exemplar", found / len(found), facts={"alignment": found})

    def forecast(self, rows: int, targets: Mapping[str, Target]) -> str:
        every = list(dict.fromkeys(text for target in targets.values() for text in _texts_of(target)))
        sample = every[:: max(1, len(every) // _SAMPLE)][:_SAMPLE]
        started = time.perf_counter()
        for text in sample:
            self._alignments(text, sample, self._sizes(sample))
        each = (time.perf_counter() - started) / len(sample) ** 2
        seconds = rows * len(every) * each / THREADS
        if seconds < LONG:
            return ""
        return (
            f"{self.name} compresses each of {rows:,} rows with each of {len(every):,} exemplars, which takes about "
            f"{seconds / 3600:.1f} hours; give fewer exemplars, or fewer rows"
        )

    def _sizes(self, texts: Sequence[bytes]) -> np.ndarray:
        return np.asarray([len(zlib.compress(text, self.level, -15)) for text in texts], np.float64) + GZIP

    def _alignments(self, row: bytes, exemplars: Sequence[bytes], alone: np.ndarray) -> np.ndarray:
        """1 minus the distance of a row to each exemplar: float64 ``[exemplars]``."""
        own, together = compressed(row, exemplars, self.level)
        return 1 - (together - np.minimum(own, alone)) / np.maximum(own, alone)


def compressed(row: bytes, exemplars: Sequence[bytes], level: int) -> tuple[float, np.ndarray]:
    """Sizes after gzip of a row, and of the row with each exemplar behind it.

    They are gzip's own to the byte. The row is compressed once, and the compressor's state copied for each exemplar. The
    smallest window that holds both texts finds the same matches, and is copied several times as fast.
    """
    longest = len(row) + max(map(len, exemplars))
    bits = next((bits for bits in range(9, 16) if longest <= (1 << bits) - _NEAR), 0)
    if not bits:
        sizes = [len(zlib.compress(row + text, level, -15)) for text in (b"", *exemplars)]
    else:
        first = zlib.compressobj(level, zlib.DEFLATED, -bits)
        begun = len(first.compress(row))
        sizes = []
        for text in (b"", *exemplars):
            rest = first.copy()
            sizes.append(begun + len(rest.compress(text)) + len(rest.flush()))
    found = np.asarray(sizes, np.float64) + GZIP
    return float(found[0]), found[1:]


def _encoded(texts: Sequence[str] | np.ndarray) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _texts_of(target: Target) -> list[bytes]:
    ends = np.cumsum(target["lengths"]).tolist()
    return [target["bytes"][start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)]
