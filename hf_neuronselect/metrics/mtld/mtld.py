"""MTLD: lexical diversity as the length of text before words repeat."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
MTLD, the measure of textual lexical diversity (McCarthy & Jarvis, 2010): the mean length, in words, of the stretches of
a text over which the type-token ratio stays at or above a threshold (0.72). The mean of reading forward and backward.
"""

_KWARGS_DESCRIPTION = """
Args:
    data: list of str, the texts.
    threshold: float in (0, 1), the type-token ratio below which a stretch (a factor) ends. Default 0.72.
Returns:
    mtld: float, the mean over texts that have words, in words; nan if there are none.
    per_text: list of float, each text's value; nan for a text without words.
    texts: int, the texts in the mean.
    no_words: int, the texts without words.
"""

_CITATION = """\
@article{mccarthy2010mtld,
  title={MTLD, vocd-D, and HD-D: A validation study of sophisticated approaches to lexical diversity assessment},
  author={McCarthy, Philip M. and Jarvis, Scott},
  journal={Behavior Research Methods},
  volume={42}, number={2}, pages={381--392}, year={2010},
  doi={10.3758/BRM.42.2.381}
}
"""


def words(text: str) -> list[str]:
    """Split into lower-case runs of letters, digits and their combining marks, in any script."""
    runs = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower()).split()
    return [run for run in runs if any(c.isalnum() for c in run)]


def factors(tokens: Iterable[str], threshold: float) -> float:
    """Count stretches whose type-token ratio falls below the threshold; the last one counts in part."""
    whole, seen, length = 0, set[str](), 0
    for token in tokens:
        length += 1
        seen.add(token)
        if len(seen) / length < threshold:
            whole, seen, length = whole + 1, set(), 0
    return whole + (1 - len(seen) / length) / (1 - threshold) if length else float(whole)


def mtld(text: str, threshold: float = 0.72) -> float:
    """Compute a text's lexical diversity.

    Args:
        text: any text. threshold: in (0, 1).

    Returns:
        Words per factor, the mean of the forward and the backward reading. NaN for a text without words. If no word is
        repeated there is no factor and the ratio would be infinite: then the number of words.

    Raises:
        ValueError: the threshold is out of range.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold!r}: must lie between 0 and 1; the usual one is 0.72")
    tokens = words(text)
    if len(set(tokens)) == len(tokens):
        return float(len(tokens)) if tokens else math.nan
    return sum(len(tokens) / factors(reading, threshold) for reading in (tokens, reversed(tokens))) / 2


class Mtld(evaluate.Measurement):
    """MTLD as an ``evaluate`` measurement."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"data": datasets.Value("string")}),
            reference_urls=["https://doi.org/10.3758/BRM.42.2.381"],
        )

    def _compute(self, data: Sequence[str | None], threshold: float = 0.72) -> dict[str, Any]:
        missing = [i for i, text in enumerate(data) if text is None]
        if missing:
            raise ValueError(f"data: text {missing[0]} is None; give every row a string")
        values = [mtld(text, threshold) for text in data if text is not None]
        counted = [value for value in values if not math.isnan(value)]
        return {
            "mtld": math.fsum(counted) / len(counted) if counted else math.nan,
            "per_text": values,
            "texts": len(counted),
            "no_words": len(values) - len(counted),
        }
