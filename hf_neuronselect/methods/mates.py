"""MATES (arXiv 2406.06046): rows of which a regressor predicts that a training step on them lowers the exemplars' loss."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.options import opt
from ..core.progress import track
from ..core.provenance import Budget, SourceRecord
from ..signals.columns import RowBatch
from .base import Method, Scorer, Target, register_method
from .random import gumbel
from .why import Why

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..core.sources import Source
    from ..models.regressor import Regressor
    from ..rows.formats import Conversation
    from ..signals.extraction import Extraction
    from ..signals.extractor import NeuronFeatureExtractor
    from ..signals.probe import ProbeLosses, Probes

logger = logging.getLogger(__name__)

BERT = "google-bert/bert-base-uncased"
TEMPERATURE = 0.5
LOW = 0.2
"""Rank correlation on held-out probes below which the predictions are doubted."""
FEWEST = 10
FILLING = 32
"""Rows whose gradients fill the optimizer's state."""
SEED = 1234
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Prepared:
    """The pool that was prepared, how its rows are read, and where results are kept."""

    pool: Dataset
    extraction: Extraction | None
    work: Path

    def rows(self, numbers: Sequence[int] | None = None) -> Iterator[list[Conversation]]:
        """Rows of the pool, some by their numbers or all, in blocks."""
        from ..core.options import ExtractionOptions
        from ..rows.formats import read_row, row_format, rows_of

        options = self.extraction.options if self.extraction else ExtractionOptions()
        fmt = row_format(self.pool.column_names, options.row_format, options.columns)
        data = self.pool.with_format(None).select_columns(fmt.used)
        count = len(data) if numbers is None else len(numbers)
        for start in range(0, count, _BLOCK):
            block = slice(start, start + _BLOCK)
            yield [read_row(row, fmt) for row in rows_of(data[block if numbers is None else numbers[block]])]

    def answered(self, numbers: np.ndarray, most: int) -> list[Conversation]:
        """The first rows, by their numbers, that have an answer."""
        from ..rows.answers import answered

        found: list[Conversation] = []
        for start in range(0, len(numbers), most):
            if len(found) >= most:
                break
            for block in self.rows(numbers[start : start + most].tolist()):
                found += [row for row in block if not row.skip and answered(row)]
        return found[:most]


@register_method
@dataclass(frozen=True)
class Mates(Method):
    """``-pred / 0.5 + Gumbel noise``, where ``pred`` predicts the exemplars' loss after a step on the row, lower first.

    Some random rows of the pool, the probes, are tried: a copy of the model takes one step of AdamW on the row (clipped to
    norm 1), and a probe's label is the change of the exemplars' mean loss. A text encoder with one output learns the z-scored
    labels of nine tenths of the probes from their texts (squared error, rate 5e-5, batches of 32), keeps the epoch with the
    best rank correlation on the other tenth, and predicts every row.

    Choices: 200 probes (the authors' 80,000); the loss of an exemplar is the mean over its answer tokens, exemplars count equally,
    and the step is on the row's answer tokens, too (the paper pretrains on whole texts); a published model comes without its
    optimizer's state, so AdamW's moments are filled with the mean gradient of 32 rows of the pool and the mean of its
    squares; a row's text is the texts of all its turns, its first 2,048 tokens in pieces of 512.
    """

    name = "mates"
    paper = "arXiv:2406.06046"
    signals = ("row_key",)
    default_budget = Budget(ratio=0.20)
    not_saved = "predicts the rows of one pool"
    judges_others = False
    fits_once = True
    costly = True

    probes: int = opt(200, "Random rows of the pool that are tried.", unit="rows", minimum=FEWEST)
    learning_rate: float = opt(1e-3, "Rate of the step on a row.", minimum=0)
    state: Literal["filled", "empty"] = opt(
        "filled", "AdamW's state before each step: filled with gradients of rows of the pool, or empty."
    )
    regressor: str = opt(BERT, "Text encoder that learns to predict: folder or Hub id[@revision].")
    epochs: int = opt(5, "Times that it sees the probes.", minimum=1)
    draw: Literal["gumbel", "code", "none"] = opt(
        "gumbel",
        "Rows are drawn: largest -pred/0.5 + noise; the authors' code: smallest pred/0.5 + noise; or no noise.",
    )
    seed: int = opt(0, "Seed of the noise.", minimum=0)

    @cached_property
    def _source(self) -> Source:
        from ..models.pin import pin_named  # heavy

        return pin_named(self.regressor, "regressor")

    @property
    def _given(self) -> Prepared | None:
        return getattr(self, "_pool", None)

    @cached_property
    def _probes(self) -> Probes:
        from ..signals.probe import Probes  # heavy

        if (given := self._given) is None:
            return Probes()
        order = np.random.default_rng(SEED).permutation(len(given.pool))
        filling = given.answered(order[::-1], FILLING) if self.state == "filled" else []
        return Probes(given.answered(order, self.probes), filling, self.learning_rate, given.work)

    @property
    def exemplar_signals(self) -> tuple[ProbeLosses, ...]:  # type: ignore[override]
        from ..signals.probe import ProbeLosses  # heavy

        return (ProbeLosses(self._probes),)

    def sources(self) -> dict[str, SourceRecord]:
        return {"regressor": SourceRecord.of(self._source)}

    def stand_in(self, extraction: Extraction) -> str:
        """Any encoder that is not the paper's, by its name."""
        return "" if self._source.id in (BERT, BERT.split("/")[1]) else self._source.id.rsplit("/", 1)[-1]

    def check(self) -> None:
        super().check()
        _ = self._source

    def prepare(self, pool: Dataset | IterableDataset, extractor: NeuronFeatureExtractor | None, work: Path) -> Self:
        """The method that probes rows of this pool; they are tried when exemplars are read.

        Raises:
            NeuronSelectError: a stream.
        """
        from datasets import Dataset

        if not isinstance(pool, Dataset):
            raise NeuronSelectError(
                "tries random rows of the pool and predicts all: load it as a Dataset", option="method", value=self.name
            )
        made = copy.copy(self)
        made.__dict__.pop("_probes", None)
        object.__setattr__(made, "_pool", Prepared(pool, extractor.extraction if extractor else None, work))
        return made

    def fit(self, exemplars: RowBatch) -> Target:
        """What a regressor predicts of the pool's rows.

        Returns:
            ``keys`` uint64 ``[rows, 2]``, hashes of the rows, ascending; ``predicted`` float64 ``[rows]``, z-scored losses;
            ``spearman`` float64 ``[1]``, rank correlation on held-out probes.

        Raises:
            NeuronSelectError: no pool was prepared, or fewer than 10 of its rows can be tried.
        """
        if (given := self._given) is None:
            raise NeuronSelectError(
                "tries rows of the pool first: call prepare(pool, extractor=...) before fit", option="method",
                value=self.name,
            )  # fmt: skip
        changes = exemplars.dense(self.exemplar_signals[0].name).astype(np.float64).mean(axis=0)
        tried = np.flatnonzero(np.isfinite(changes))
        if len(tried) < FEWEST:
            raise NeuronSelectError(
                f"only {len(tried)} rows of the pool could be tried, at least {FEWEST} with an answer are needed: give a "
                "larger pool", option="method", value=self.name,
            )  # fmt: skip
        found = self._predicted(given, [self._probes.rows[i] for i in tried.tolist()], changes[tried])
        if (rho := float(found["spearman"][0])) < LOW:
            warnings.warn(
                f"the regressor of {self.name} hardly predicts the probes it has not seen (rank correlation {rho:.2f} over "
                f"{max(1, len(tried) // 10)}): its order is little more than chance; raise probes or epochs",
                NeuronSelectWarning, stacklevel=2,
            )  # fmt: skip
        logger.info("%s: %d probes, rank correlation %.3f on held-out ones", self.name, len(tried), rho)
        return found

    def _predicted(self, given: Prepared, probes: list[Conversation], changes: np.ndarray) -> dict[str, np.ndarray]:
        """Train and predict, or read what was predicted before."""
        from safetensors.numpy import load, save

        from ..core.writing import put
        from ..rows.leakage import exact_key

        state = [[exact_key(row).hex() for row in probes], changes.tolist(), self._source.key, self.epochs]
        state.append(given.extraction.rows_state() if given.extraction else None)
        digest = hashlib.blake2b(json.dumps(state).encode(), digest_size=8).hexdigest()
        file = given.work / f"mates-predicted-{digest}.safetensors"
        if file.is_file():
            return dict(load(file.read_bytes()))
        weights = given.work / f"mates-regressor-{digest}.safetensors"
        regressor = self._regressor(given)
        if weights.is_file():
            rho = regressor.restore(weights)
        else:
            rho = regressor.learn(regressor.cut([row.words() for row in probes]), changes, epochs=self.epochs)
            regressor.save(weights, rho)
        keys: list[bytes] = []
        values: list[np.ndarray] = []
        with track("predictions", len(given.pool)) as done:
            for block in given.rows():
                usable = [row for row in block if not row.skip]
                keys += [exact_key(row) for row in usable]
                if usable:
                    values.append(regressor.predict(regressor.cut([row.words() for row in usable])))
                done.done(len(block))
        numbers = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
        kept, first = np.unique(numbers, axis=0, return_index=True)
        found = {"keys": kept, "predicted": np.concatenate(values)[first], "spearman": np.asarray([rho])}
        put(file, save(found))
        weights.unlink(missing_ok=True)  # hundreds of megabytes that are not needed any more
        return found

    def _regressor(self, given: Prepared) -> Regressor:
        from ..core.options import ExtractionOptions
        from ..models.regressor import Regressor
        from ..signals.extraction import Extraction
        from ..signals.forward import place_of

        extraction = given.extraction or Extraction(ExtractionOptions())
        place: Any = place_of(replace(extraction, options=replace(extraction.options, device_map=None)), None)
        return Regressor.load(self._source, "regressor").to(place)

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return self.scorer({"target": target})(rows)["target"]

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        """Looks rows up by their hashes.

        Raises:
            NeuronSelectError: a row is not of the pool that was predicted.
        """
        known = {
            name: dict(zip(map(tuple, target["keys"].tolist()), target["predicted"].tolist(), strict=True))
            for name, target in targets.items()
        }

        def score(rows: RowBatch) -> dict[str, np.ndarray]:
            keys = [(int(key[:16], 16), int(key[16:], 16)) for key in rows["row_key"]]
            try:
                return {name: np.asarray([-of[key] / TEMPERATURE for key in keys]) for name, of in known.items()}
            except KeyError:
                raise NeuronSelectError(
                    "was fitted to another pool, of which it has a prediction for each row: fit it to this one",
                    option="method", value=self.name,
                ) from None  # fmt: skip

        return score

    def drawn(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """With Gumbel noise, or less it as in the authors' code."""
        if self.draw == "none":
            return scores
        noise = gumbel(self.seed, rows)
        return scores + noise if self.draw == "gumbel" else scores - noise

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """What was predicted, without parts.

        Raises:
            NeuronSelectError: the row is not of the pool that was predicted.
        """
        predicted = -TEMPERATURE * float(self.score(row, target)[0])
        says = (
            f"{predicted:+.4g} is predicted from the row's text: how a training step on it changes the exemplars' loss, in "
            f"deviations from the mean of the rows that were tried, lower first (rank correlation with measured changes: "
            f"{float(target['spearman'][0]):.2f})"
        )
        return Why(says)
