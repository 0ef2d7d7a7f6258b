"""What stands behind the parts of a score: rarity in the pool, exemplars, tokens, labels, and where else a unit fires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.sources import Source
from ..explain.background import Firing, firing_in
from ..explain.explanation import Part
from ..explain.labels import Label, Labels, labels_of
from ..explain.reasons import Heat, heat_of, word_heat
from ..explain.spots import Spot, spot_at, spots_of
from ..methods.why import Moves, Why
from ..models.find_sae import feature_page
from ..rows.formats import Conversation
from ..signals.base import SIGNALS
from ..signals.forward import ForwardSignal
from ..signals.heat import moved_values, unit_values
from .evidence import Evidence

TOLD, TOKENS, ROWS = 5, 3, 2
"""Parts whose tokens are told; tokens of each; other rows of each."""
COMMON = 0.99
"""Share of the pool's rows from which on a part is said to be in all of them."""
HEATED = 1024
"""Units whose tokens are told together, those that add most."""
MOVED = 4
"""Tokens told that moved a score up, and as many that moved it down."""


class Behind:
    """Tells the parts of a score with what stands behind them."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    # ------------------------------------------------------------------------------------- parts
    def parts(self, why: Why, number: int, text: Conversation | None, top: int) -> tuple[Part, ...]:
        """The first parts.

        Args:
            number: of the row in the pool. text: the row as it was read; None where it is not at hand.
        """
        shares = why.shares
        parts = [
            Part(
                why.names[i] if why.names else f"{why.unit} {why.ids[i]}", why.unit, None if why.names else int(why.ids[i]),
                float(why.amounts[i]), float(shares[i]), {name: float(fact[i]) for name, fact in why.facts.items()},
                usual=None if why.usual is None else float(why.usual[i]),
            )
            for i in range(min(top, len(why.ids)))
        ]  # fmt: skip
        if not why.signal or not parts:
            return tuple(parts)
        units = [int(one) for one in why.ids[: len(parts)]]
        firing, tokens = self._firing(why, number), self.tokens(why.signal, units, text)
        carriers, told = self._carriers(why.signal, units), []
        elsewhere = self._elsewhere(why.signal, units[:TOLD], firing) if firing else {}
        for place, (part, unit) in enumerate(zip(parts, units, strict=True)):
            told.append(
                replace(
                    part,
                    label=self.label(why.signal, unit),
                    rarity=firing.rows[unit] / self.evidence.rows if firing else None,
                    exemplars=carriers.get(unit),
                    tokens=tokens.get(unit, ()) if place < TOLD else (),
                    elsewhere=elsewhere.get(unit, ()),
                    link=self.link(why.signal, unit),
                )
            )
        return tuple(told)

    @property
    def sae(self) -> Source | None:
        extractor = self.evidence.extractor
        return extractor.extraction.sae if extractor is not None else None

    @cached_property
    def _labels(self) -> Labels | None:
        found = labels_of(self.sae) if self.sae is not None else None
        if self.sae is not None and found is None:
            self.evidence.note(
                f"there are no labels of the SAE {self.sae.id}; neuronselect sae label makes them from any rows",
                lasting=True,
            )
        return found

    def label(self, signal: str, unit: int) -> Label | None:
        """The label of a signal's unit, if it is a feature that has one."""
        return self.feature_label(unit) if _of_sae(signal) else None

    def feature_label(self, feature: int) -> Label | None:
        """A feature's label, if there is one."""
        return self._labels.get(feature) if self._labels is not None else None

    def link(self, signal: str, unit: int) -> str:
        """A page about a feature; "" where there is none."""
        return feature_page(self.sae, unit) if self.sae and _of_sae(signal) else ""

    def _firing(self, why: Why, number: int) -> Firing | None:
        """Where the units fire in the pool; how much of the sum says nothing, since nearly every row has it, is noted."""
        evidence, signal = self.evidence, why.signal
        if evidence.store is None or signal not in evidence.stored:
            evidence.note(
                "how rare a part is in the pool, and where else it is found, needs a store of the pool's signals "
                "(neuronselect extract, then --features)"
            )
            return None
        found = firing_in(
            evidence.store, signal, evidence.stored[signal], why.ids.tolist(), told=TOLD, best=ROWS, without=[number]
        )
        common = np.asarray([found.rows[int(unit)] >= COMMON * evidence.rows for unit in why.ids])
        if common.any():
            evidence.note(
                f"{int(common.sum())} of the {len(common)} parts, {why.shares[common].sum():.0%} of the sum, are in at least "
                f"{COMMON:.0%} of the pool's rows: they set this row apart only by how strong they are"
            )
        return found

    def _carriers(self, signal: str, units: Sequence[int]) -> dict[int, tuple[tuple[int, float], ...]]:
        """Unit -> the exemplars that have it, by their numbers, with its value, largest first."""
        exemplars = self.evidence.exemplars
        if exemplars is None:
            self.evidence.note("which exemplars have a part is told where they are given (--target)")
            return {}
        sparse = exemplars.sparse(signal)
        found: dict[int, list[tuple[int, float]]] = {unit: [] for unit in units}
        for i, number in enumerate(exemplars.index.tolist()):
            for unit, value in zip(*(part.tolist() for part in sparse.row(i)), strict=True):
                if unit in found and value > 0:
                    found[unit].append((number, float(value)))
        return {unit: tuple(sorted(ones, key=lambda one: -one[1])) for unit, ones in found.items()}

    # ------------------------------------------------------------------------------------- tokens
    def tokens(
        self, signal: str, units: Sequence[int], text: Conversation | None, *, top: int = TOKENS, row: int | None = None
    ) -> dict[int, tuple[Spot, ...]]:
        """Unit -> the tokens of a row on which it is strongest; nothing without a model or the text.

        Args:
            top, row: as of :func:`spots_of`.
        """
        extractor = self.evidence.extractor
        if extractor is None or text is None:
            return {}
        values = unit_values(extractor, text, signal, units)
        decode = extractor.forward.tokenizer.decode
        return {unit: spots_of(decode, values, i, top=top, row=row) for i, unit in enumerate(units)}

    def _elsewhere(self, signal: str, units: Sequence[int], firing: Firing) -> dict[int, tuple[Spot, ...]]:
        """Unit -> where it is strongest in the pool's other rows: on which token, or where the row begins.

        The model reads each row once, for all units that are strongest there.
        """
        of_row: dict[int, dict[int, float]] = {}
        for unit in units:
            for number, value in firing.best[unit]:
                of_row.setdefault(number, {})[unit] = value
        found: dict[tuple[int, int], tuple[Spot, ...]] = {}
        for number, own in of_row.items():
            text = self.evidence.text_of(number)
            if text is None:
                self.evidence.note("texts of other rows are told where the pool is given (--pool)")
                continue
            spots = self.tokens(signal, list(own), text, top=1, row=number)
            for unit, value in own.items():
                found[unit, number] = spots.get(unit) or (Spot("", "", text.content()[:200], value, number),)
        return {
            unit: tuple(spot for number, _ in firing.best[unit] for spot in found.get((unit, number), ()))
            for unit in units
        }

    def heat(self, why: Why, text: Conversation | None, told: Sequence[int]) -> Heat | None:
        """A row's text with what its tokens, or its words, add to the score; None where they say nothing.

        A unit's part of the score is shared out over tokens as its strength is, so that tokens add up to the score's parts.

        Args:
            told: places of parts of which the same is told for each by itself.
        """
        extractor = self.evidence.extractor if why.signal or why.moves is not None else None
        if text is None:
            return None
        if why.unit in ("word", "n-gram"):
            return word_heat(text, dict(zip(why.names, why.amounts.tolist(), strict=True)))
        if extractor is None:
            return None
        decode = extractor.forward.tokenizer.decode
        if why.moves is not None:
            moved = moved_values(extractor, text, why.moves.signal, why.moves.weights, why.moves.offset)
            return heat_of(decode, moved, text)
        kept = np.union1d(np.argsort(-why.amounts, kind="stable")[:HEATED], np.asarray(told, np.int64))
        found = unit_values(extractor, text, why.signal, why.ids[kept].tolist())
        total = found.values.sum(axis=0)
        share = np.divide(found.values, total, out=np.zeros_like(found.values), where=total > 0)
        added = share * why.amounts[kept]
        columns = np.column_stack([added.sum(axis=1), added[:, np.searchsorted(kept, told)]])
        return heat_of(decode, replace(found, values=columns), text)

    def moved(self, moves: Moves, text: Conversation | None) -> tuple[Spot, ...]:
        """The tokens that moved a score most, up and then down."""
        extractor = self.evidence.extractor
        if extractor is None or text is None:
            return ()
        try:
            values = moved_values(extractor, text, moves.signal, moves.weights, moves.offset)
        except NeuronSelectError as cause:
            self.evidence.note(cause.message)
            return ()
        added, decode = values.values[:, 0], extractor.forward.tokenizer.decode
        order = np.argsort(-added, kind="stable")
        up, down = order[:MOVED][added[order[:MOVED]] > 0], order[::-1][:MOVED][added[order[::-1][:MOVED]] < 0]
        return tuple(spot_at(decode, values.input_ids, int(values.places[at]), float(added[at])) for at in (*up, *down))


def _of_sae(signal: str) -> bool:
    kind = SIGNALS[signal]
    return issubclass(kind, ForwardSignal) and kind.needs_sae
