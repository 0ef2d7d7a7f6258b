"""Reasons of the rows that a report shows as cards. Only these rows cost a pass of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..core.errors import NeuronSelectError
from ..explain.explanation import Part
from ..explain.page_data import PoolTable, best_target
from ..explain.reasons import Reasons
from ..signals.base import signals_of
from .why import Explainer

if TYPE_CHECKING:
    from .selection import Selection

PICKS, NEAR, PARTS = 12, 6, 5
"""Picks and near misses whose reasons are shown, and parts of each."""
_COMMAND = "neuronselect report FOLDER"
_NEVER_AGAIN = ("judge",)  # engines that cost money


def reasons_of(
    selection: Selection, table: PoolTable, picks: Sequence[int], near: Sequence[int], load: bool
) -> tuple[Mapping[int, Reasons], str]:
    """Why rows have their scores.

    Args:
        picks, near: places in the table. load: whether the model is loaded for it where it is not.

    Returns:
        Reasons by place in the table; and why there are none, in one sentence, or "".
    """
    shown = [*picks[:PICKS], *near[:NEAR]]
    found: dict[int, Reasons] = {}
    try:
        for target, places in _by_target(selection, table, shown).items():
            explainer = selection.explainer(target=target)
            _check(explainer, load)
            numbers = {place: int(table.index[place]) for place in places}
            explainer.evidence.read_ahead(list(numbers.values()))
            for place, number in numbers.items():
                if (one := _reasons(explainer, number)) is not None:
                    found[place] = one
    except NeuronSelectError as cause:
        return {}, f"Why these rows have their scores is not shown: {cause.message}."
    return found, ""


def _by_target(selection: Selection, table: PoolTable, places: Sequence[int]) -> dict[str | None, list[int]]:
    """The rows by the target that they suit best."""
    if len(table.targets) < 2:
        return {None: list(places)}
    names, best = list(table.targets), best_target(table)
    found: dict[str | None, list[int]] = {}
    for place in places:
        found.setdefault(names[int(best[place])], []).append(place)
    return found


def _check(explainer: Explainer, load: bool) -> None:
    """Refuse what would cost more than a pass over the rows shown.

    Raises:
        NeuronSelectError: so it would; the command that helps is named.
    """
    evidence, method = explainer.evidence, explainer.evidence.method
    runs = [one for one in signals_of(method.signals) if one.engine != "text" and not (evidence.stored and one.stored)]
    if any(one.engine in _NEVER_AGAIN for one in runs):
        raise NeuronSelectError("a judge gave the scores, and it is not asked again")
    reads_texts = all(one.engine == "text" for one in signals_of(method.signals))
    at_hand = evidence.selector.extractor is not None or load or evidence.selector.extraction.model is None
    if not (reads_texts or at_hand):
        raise NeuronSelectError(f"the model is not loaded; {_COMMAND} loads it and adds them")
    if method.observes and evidence.target not in evidence.selection.finished:
        if evidence.pool is None:
            raise NeuronSelectError(f"{method.name} weighs a row by the whole pool; {_COMMAND} --pool POOL adds them")
        if runs:
            raise NeuronSelectError(
                f"{method.name} weighs a row by the whole pool, which would be read again; {_COMMAND} --pool POOL --features STORE "
                "adds them"
            )


def _reasons(explainer: Explainer, number: int) -> Reasons | None:
    """Of one row; None where it is not at hand, or cannot be read."""
    evidence, behind = explainer.evidence, explainer.behind
    try:
        text, why = evidence.text_of(number), explainer.why(number)
        heat = behind.heat(why, text, PARTS)
    except NeuronSelectError as cause:
        if cause.option in ("pool", "row"):
            return None
        raise
    shares = why.shares
    parts = tuple(
        Part(
            why.names[i] if why.names else f"{why.unit} {why.ids[i]}", why.unit, None if why.names else int(why.ids[i]),
            float(why.amounts[i]), float(shares[i]), {}, label=behind.label(why.signal, int(why.ids[i])) if why.signal else None,
            link=behind.link(why.signal, int(why.ids[i])) if why.signal else "",
        )
        for i in range(min(PARTS, len(why.ids)))
    )  # fmt: skip
    return Reasons(evidence.target, why.says, parts, len(why.ids), heat)
