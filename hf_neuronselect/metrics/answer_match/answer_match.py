"""Exact match of final answers: numbers, short texts, choices."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
The share of predictions whose final answer equals the reference: the last number (GSM8K), the whole short text (SQuAD,
TyDi QA), or the letter of a choice (MMLU, BBH).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of str, texts a model wrote.
    references: list of str, or of lists of str if several answers are accepted; read in the same way as predictions.
    kind: str.
        "number": the last number of the text, or of the part after the last '####'. Thousands commas, currency signs
            and a full stop at the end are ignored; numbers are compared as decimals, so 18 equals 18.00.
        "text": the whole text in lower case, without punctuation, the articles a, an, the and extra spaces.
        "choice": the first letter A to J on its own, as in "(B)" or "B."; a lower-case letter counts only if the text
            has nothing else.
Returns:
    answer_match: float, matches / predictions.
    matches: int.
    unparsed: int, predictions in which no answer was found; they count as wrong.
"""

_CITATION = """\
@article{cobbe2021training,
  title={Training Verifiers to Solve Math Word Problems},
  author={Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo and Kaiser, Lukasz and
    Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and Nakano, Reiichiro and Hesse, Christopher and
    Schulman, John},
  journal={arXiv preprint arXiv:2110.14168}, year={2021}
}
@inproceedings{rajpurkar2016squad,
  title={{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP}, year={2016}
}
"""

# A minus counts unless it is between two terms; a currency sign may follow it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-\u2212][$\u20ac\u00a3\u00a5]?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
)
_CHOICE = re.compile(r"(?<![^\W_])(?P<letter>[A-J])(?![^\W_])(?!['\u2019][^\W_])")
_ONLY_CHOICE = re.compile(r"[\W_]*(?P<letter>[a-j])[\W_]*")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or of the part after its last ``####``; None if there is none."""
    found = list(_NUMBER.finditer(text.rpartition("####")[2]))
    if not found:
        return None
    value = Decimal(found[-1]["digits"].replace(",", ""))
    return -value if found[-1]["sign"] else value


def normalised(text: str) -> str | None:
    """Lower case, one space between words, no punctuation, no articles; None if the text is blank.

    A step that would remove everything is skipped: the answer "A" becomes "a".
    """
    best = " ".join(unicodedata.normalize("NFC", text).lower().split())
    bare = "".join(c for c in best if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    for shorter in (bare, _ARTICLES.sub(" ", bare)):
        best = " ".join(shorter.split()) or best
    return best or None


def choice(text: str) -> str | None:
    """The first letter A to J on its own; None if there is none."""
    found = _CHOICE.search(text) or _ONLY_CHOICE.fullmatch(text)
    return found["letter"].upper() if found else None


KINDS: dict[str, Callable[[str], Any]] = {"number": last_number, "text": normalised, "choice": choice}


def answer_match(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], kind: str = "number"
) -> dict[str, Any]:
    """Compute the exact match of final answers.

    Args:
        predictions: ``[n]`` texts. references: ``[n]``, each a text or the accepted texts. kind: a key of ``KINDS``.

    Returns:
        ``answer_match``, ``matches`` and ``unparsed``.

    Raises:
        ValueError: no predictions, different lengths, an unknown kind, or a reference without an answer.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references; give one for each row")
    if not predictions:
        raise ValueError("predictions: there are none")
    read, matches, unparsed = KINDS[kind], 0, 0
    for i, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        accepted = [accepted] if isinstance(accepted, str) else accepted
        if not isinstance(prediction, str) or not accepted or not all(isinstance(text, str) for text in accepted):
            raise ValueError(f"row {i}: the prediction must be a text, the reference one or several texts")
        wanted = [read(text) for text in accepted]
        if None in wanted:
            seen = accepted[wanted.index(None)]
            raise ValueError(f"references: row {i}, {seen!r}, has no answer of kind {kind!r}")
        answer = read(prediction)
        unparsed += answer is None
        matches += answer in wanted
    return {"answer_match": matches / len(predictions), "matches": matches, "unparsed": unparsed}


class AnswerMatch(evaluate.Metric):
    """Exact match of final answers as an ``evaluate`` metric."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://arxiv.org/abs/2110.14168", "https://arxiv.org/abs/1606.05250"],
        )

    # Both forms of references become lists, so that a list among texts is not read as a text.
    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of predictions and references."""
        if references is not None:
            references = [[one] if isinstance(one, str) else one for one in references]
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference."""
        kwargs = {"predictions": prediction, "references": reference} | kwargs
        if isinstance(kwargs["references"], str):
            kwargs["references"] = [kwargs["references"]]
        super().add(**kwargs)

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], kind: str = "number"
    ) -> dict[str, Any]:
        return answer_match(predictions, references, kind)
