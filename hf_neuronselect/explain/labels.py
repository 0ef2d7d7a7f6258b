"""Labels of SAE features: words that are more frequent where a feature fires than elsewhere, with no model asked.

A feature's label is made from three kinds of words: those it fires on, those just before and those just after. How well a
label predicts where the feature fires is measured on rows it was not made from. A chat model's phrase may stand in the
place of the words, see :mod:`.described`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.digests import cache_dir
from ..core.errors import NeuronSelectError
from ..core.intervals import Interval
from ..core.sources import Source
from ..rows.formats import Conversation
from ..signals.extractor import NeuronFeatureExtractor
from .firings import Firings, firings_of, terms_of

FILE = "labels.parquet"
SLOTS = ("on", "after", "before")
MOST_TERMS, LEAST_SHARE, LEAST_RATIO = 4, 0.05, 2.0
"""A label has at most so many words; each makes up that share of the firings, and is so many times as frequent there."""
PRIOR = 10.0
"""Firings that a word's share is drawn towards its share of all tokens by."""
HELD_OUT = 4
"""Every so manieth row is held out."""
LEAST_FIRED = 10
"""Firings on the rows labels are made from, and on those held out, that a label needs."""
_ABOUT = b"neuron_labels"


@dataclass(frozen=True)
class Description:
    """What a feature fires on, in a chat model's phrase.

    Attributes:
        by: the model's name. score: balanced accuracy of its answers, given the phrase alone, to whether the feature fires in held-out
            contexts; 0.5 is chance, 1 perfect, None if too few could be read. usable: answers that could be read.
    """

    text: str
    by: str
    score: Interval
    usable: int


@dataclass(frozen=True)
class Label:
    """What a feature fires on, in words; made by a machine.

    Attributes:
        on, after, before: words it fires on, whose next token it fires on, whose token before it fires on.
        auc: of predicting from the words alone on which held-out tokens it fires; 0.5 is chance, 1 perfect; None without words.
        tokens, rows: share of the tokens, and of the rows, that it fires on.
        described: a chat model's phrase, which is told in the place of the words.
    """

    on: tuple[str, ...]
    after: tuple[str, ...]
    before: tuple[str, ...]
    auc: float | None
    tokens: float
    rows: float
    described: Description | None = None

    @property
    def score(self) -> float | None:
        """How well what is told predicts where the feature fires; 0.5 is chance. Of words an AUC over tokens, of a phrase a
        balanced accuracy over contexts: no two of a kind.
        """
        return self.auc if self.described is None else self.described.score.value

    @property
    def made(self) -> str:
        """Who made what is told, and its score."""
        if (one := self.described) is not None:
            score = f"balanced accuracy {told}" if (told := one.score.told()) else "not scored"
            return f"made by the chat model {one.by}, {score}"
        return "made by a machine" + ("" if self.auc is None else f", AUC {self.auc:.2f}")

    def __str__(self) -> str:
        return self.words if self.described is None else self.described.text

    @property
    def words(self) -> str:
        """The words of all slots."""
        parts = [(slot, getattr(self, slot)) for slot in SLOTS]
        said = [
            ("" if slot == "on" else f"{slot} ") + " ".join(f"“{word}”" for word in words)
            for slot, words in parts
            if words
        ]
        return ", ".join(said) or "no common word"


_DESCRIBED: Mapping[str, tuple[pa.DataType, Callable[[Description], Any]]] = {
    "description": (pa.string(), lambda one: one.text),
    "described_by": (pa.string(), lambda one: one.by),
    "described_score": (pa.float32(), lambda one: one.score.value),
    "described_low": (pa.float32(), lambda one: one.score.low),
    "described_high": (pa.float32(), lambda one: one.score.high),
    "described_usable": (pa.int32(), lambda one: one.usable),
}


def _described(row: Mapping[str, Any]) -> Description | None:
    """The description in a line of a labels file."""
    text, by, value, low, high, usable = (row[name] for name in _DESCRIBED)
    return None if text is None else Description(text, by, Interval(value, low, high), usable)


def _wordless(label: Label) -> Label:
    return Label((), (), (), None, label.tokens, label.rows)


@dataclass(frozen=True)
class Labels:
    """The labels of an SAE.

    Attributes:
        about: the SAE, the model, and the rows they were made from.
    """

    found: Mapping[int, Label]
    about: Mapping[str, Any] = field(default_factory=dict)

    def get(self, feature: int) -> Label | None:
        return self.found.get(feature)

    def with_descriptions(self, others: Mapping[int, Label]) -> Labels:
        """These labels, with the descriptions that others have, also of features without words here."""
        told = {
            feature: replace(self.found.get(feature) or _wordless(one), described=one.described)
            for feature, one in others.items()
            if one.described is not None
        }
        return Labels({**self.found, **told}, self.about)

    def save(self, path: Path) -> None:
        """Write one parquet file.

        Raises:
            NeuronSelectError: it cannot be written.
        """
        order = sorted(self.found)
        labels = [self.found[latent] for latent in order]
        phrases = [one.described for one in labels]
        words: dict[str, pa.Array] = {
            slot: pa.array([list(getattr(one, slot)) for one in labels], pa.list_(pa.string())) for slot in SLOTS
        }
        numbers = {
            name: pa.array([getattr(one, name) for one in labels], pa.float32()) for name in ("auc", "tokens", "rows")
        }
        told = {
            name: pa.array([one and read(one) for one in phrases], kind) for name, (kind, read) in _DESCRIBED.items()
        }
        table = pa.table({"latent": pa.array(order, pa.int32())} | words | numbers | told)
        table = table.replace_schema_metadata({_ABOUT: json.dumps(dict(self.about), sort_keys=True)})
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, part, compression="zstd", compression_level=19)
            part.replace(path)
        except OSError as cause:
            reason = cause.strerror or cause
            raise NeuronSelectError(
                f"cannot be written: {reason}; name another file", option="out", value=path.name
            ) from cause

    @classmethod
    def load(cls, path: Path) -> Labels:
        """Read what :meth:`save` wrote.

        Raises:
            NeuronSelectError: damaged.
        """
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[_ABOUT])
            rows = table.to_pylist()
            found = {
                int(row["latent"]): Label(
                    on=tuple(row["on"]), after=tuple(row["after"]), before=tuple(row["before"]),
                    auc=row["auc"], tokens=row["tokens"], rows=row["rows"], described=_described(row),
                )
                for row in rows
            }  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as cause:
            raise NeuronSelectError(
                "the labels are damaged: make them again (neuronselect sae label), or delete the file", option="labels",
                value=path.name,
            ) from cause  # fmt: skip
        return cls(found, about)


def check_labels_file(path: Path) -> None:
    """Refuse a place for labels that holds something else.

    Raises:
        NeuronSelectError: a folder, or a file without labels.
    """
    if path.is_dir():
        raise NeuronSelectError("is a folder; name a file", option="out", value=path.name)
    if path.exists():
        try:
            Labels.load(path)
        except NeuronSelectError as cause:
            raise NeuronSelectError(
                "exists and has no labels; name another file", option="out", value=path.name
            ) from cause


def labels_path(sae: Source) -> Path:
    """Where labels of an SAE that are made on this machine are kept."""
    return cache_dir() / "labels" / f"{sae.key.replace(':', '-').replace('/', '-')}.parquet"


def labels_of(sae: Source, first: Path | None = None) -> Labels | None:
    """The labels of an SAE: those made on this machine, else those beside it; None if there are none of this very SAE.

    Args:
        first: file that goes before both.

    Raises:
        NeuronSelectError: they are damaged.
    """
    for path in (first, labels_path(sae), Path(sae.location) / FILE):
        if path is not None and path.is_file() and (found := Labels.load(path)).about.get("sae") == sae.key:
            return found
    return None


# ------------------------------------------------------------------------------------------ making them
def make_labels(
    extractor: NeuronFeatureExtractor,
    rows: Iterable[Conversation],
    *,
    tokens: int,
    about: Mapping[str, Any] | None = None,
) -> Labels:
    """Label the features of an extractor's SAE.

    Args:
        rows: in their order; no more are read than give ``tokens`` tokens. about: of the rows.

    Raises:
        NeuronSelectError: no SAE, or too few tokens.
    """
    sae = extractor.extraction.sae
    if sae is None:
        raise NeuronSelectError("labels are of an SAE's features: name one", option="sae")
    seen = firings_of(extractor, rows, tokens)
    made = {"sae": sae.key, "model": extractor.extraction.spec.source.key, "tokens": len(seen.token), "rows": seen.rows}
    return Labels(label_firings(seen, terms_of(extractor.forward.tokenizer)), made | dict(about or {}))


def label_firings(seen: Firings, terms: Sequence[str]) -> dict[int, Label]:
    """Labels from where features fire.

    A word's ratio in a slot is ``(n + c p) / ((N + c) p)``: n of the feature's N firings (weighted by their strength over
    its mean) have the word there, p is its share of all tokens there, c is :data:`PRIOR`. A label's words are those with the
    largest ``n / N log ratio``.
    """
    words = sorted(set(terms))
    number = {word: i for i, word in enumerate(words)}
    of_token = np.asarray([number[word] for word in terms])[seen.token]
    held = seen.row % HELD_OUT == HELD_OUT - 1
    if held.all() or not held.any():
        raise NeuronSelectError(f"at least {HELD_OUT} rows are needed", option="pool")
    slots = [of_token, *(_neighbour(of_token, seen.row, step) for step in (-1, 1))]
    latents = int(seen.latent.max()) + 1 if len(seen.latent) else 0
    learnt = ~held[seen.place]
    strength = seen.strength / np.maximum(
        _mean_by(seen.latent[learnt], seen.strength[learnt], latents)[seen.latent], 1e-12
    )
    fired = np.bincount(seen.latent[learnt], minlength=latents)
    tried = np.bincount(seen.latent[~learnt], minlength=latents)
    total = np.bincount(seen.latent[learnt], weights=strength[learnt], minlength=latents)
    candidates: dict[int, list[tuple[float, float, int, int]]] = {}
    for which, slot in enumerate(slots):
        base = np.bincount(slot[~held & (slot >= 0)], minlength=len(words)) / (~held).sum()
        word = slot[seen.place[learnt]]
        known = (word >= 0) & (word != number.get("", -1))
        keys, where = np.unique(seen.latent[learnt][known] * len(words) + word[known], return_inverse=True)
        counts = np.bincount(where, weights=strength[learnt][known])
        of, term = np.divmod(keys, len(words))
        share = counts / total[of]
        ratio = (counts + PRIOR * base[term]) / ((total[of] + PRIOR) * base[term])
        good = (share >= LEAST_SHARE) & (ratio >= LEAST_RATIO) & (fired[of] >= LEAST_FIRED)
        for i in np.flatnonzero(good).tolist():
            weight_of = float(np.log(ratio[i]))
            candidates.setdefault(int(of[i]), []).append((float(share[i]) * weight_of, weight_of, which, int(term[i])))
    order = [np.argsort(slot[held], kind="stable") for slot in slots]
    sorted_slots = [slot[held][one] for slot, one in zip(slots, order, strict=True)]
    position = np.cumsum(held) - 1  # of a held-out token among them
    firing = np.argsort(seen.latent[~learnt], kind="stable")
    of_latent, places = seen.latent[~learnt][firing], position[seen.place[~learnt]][firing]
    rows_with = np.bincount(np.unique(seen.latent * seen.rows + seen.row[seen.place]) // seen.rows, minlength=latents)
    every = np.bincount(seen.latent, minlength=latents)
    scores = np.zeros(int(held.sum()))
    found: dict[int, Label] = {}
    for feature, options in candidates.items():
        if tried[feature] < LEAST_FIRED:
            continue
        chosen = sorted(options, reverse=True)[:MOST_TERMS]
        touched = []
        for _, weight_of, which, at in chosen:
            span = slice(*np.searchsorted(sorted_slots[which], (at, at + 1)))
            touched.append(order[which][span])
            scores[touched[-1]] += weight_of
        fires = places[slice(*np.searchsorted(of_latent, (feature, feature + 1)))]
        on, after, before = (
            tuple(words[at] for _, _, one, at in chosen if one == which) for which in range(len(SLOTS))
        )
        found[feature] = Label(
            on, after, before, auc=_auc(scores, np.unique(np.concatenate(touched)), fires),
            tokens=float(every[feature] / len(seen.token)), rows=float(rows_with[feature] / seen.rows),
        )  # fmt: skip
        for hits in touched:
            scores[hits] = 0.0
    return found


def _neighbour(values: np.ndarray, row: np.ndarray, step: int) -> np.ndarray:
    """The value of the token before (-1) or after (1) in the same row; -1 where there is none."""
    found = np.full(len(values), -1)
    same = row[1:] == row[:-1]
    if step < 0:
        found[1:][same] = values[:-1][same]
    else:
        found[:-1][same] = values[1:][same]
    return found


def _mean_by(keys: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(keys, weights=values, minlength=size) / np.maximum(np.bincount(keys, minlength=size), 1)


def _auc(scores: np.ndarray, touched: np.ndarray, fires: np.ndarray) -> float:
    """Chance that a token that fires scores above one that does not, ties half.

    Args:
        scores: ``[n]``, 0 but at the places ``touched``, above 0 there. fires: places of the tokens that fire.
    """
    positive = scores[fires]
    others = np.sort(scores[np.setdiff1d(touched, fires, assume_unique=True)])
    silent, rest = len(scores) - len(fires), len(scores) - len(fires) - len(others)
    below = (np.searchsorted(others, positive) + np.searchsorted(others, positive, side="right")) / 2 + rest
    wins = np.where(positive > 0, below, rest / 2)
    return float(wins.sum() / (len(fires) * silent)) if len(fires) and silent else 0.5
