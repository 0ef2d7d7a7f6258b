"""What models trained on picks are worth: cells of a table, and warnings in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TRAINED = ("trained on", "target", "rows", "loss", "seeds", "change", "accuracy", "checked", "answers")


@dataclass(frozen=True)
class Trained:
    """A model that was trained on picks.

    Attributes:
        arm: the method, or the control. loss: on the target's held-out answers, nats a token. untouched: of the model before.
        answers: share of the trained tokens that are answers'.
        accuracy: share of held-out rows that it answers right. accuracy_untouched: of the model before. checked: of so many rows.
        not_checked: why there is no accuracy; "" where there is.
    """

    arm: str
    target: str
    seed: int
    rows: int
    loss: float
    untouched: float
    answers: float
    seconds: float
    accuracy: float | None = None
    accuracy_untouched: float | None = None
    checked: int = 0
    not_checked: str = ""


@dataclass(frozen=True)
class Transfer:
    """A model trained on picks for one target, measured at a target.

    Attributes:
        arm: as of :class:`Trained`. picked_for: what the picks are for. target: whose held-out answers cost ``loss``, in nats a token.
        untouched: loss of the model before, on the same rows.
    """

    arm: str
    picked_for: str
    target: str
    seed: int
    loss: float
    untouched: float


def transfer_matrix(transfers: Sequence[Transfer], arm: str) -> tuple[list[str], np.ndarray]:
    """Targets, and the change of loss by training on picks for one (row) measured at another (column).

    Returns:
        Names, and float64 ``[targets, targets]``: loss after training minus before, means over seeds; NaN where not measured.
    """
    own = [one for one in transfers if one.arm == arm]
    names = list(dict.fromkeys(one.picked_for for one in transfers))
    found = np.full((len(names), len(names)), np.nan)
    for i, picked_for in enumerate(names):
        for k, target in enumerate(names):
            changes = [one.loss - one.untouched for one in own if (one.picked_for, one.target) == (picked_for, target)]
            if changes:
                found[i, k] = np.mean(changes)
    return names, found


def by_arm(trained: Sequence[Trained], target: str) -> dict[str, list[Trained]]:
    """One target's models of all seeds."""
    of_target = [one for one in trained if one.target == target]
    return {arm: [one for one in of_target if one.arm == arm] for arm in dict.fromkeys(one.arm for one in of_target)}


def training_cells(trained: Sequence[Trained], target: str) -> list[tuple[str, ...]]:
    """Loss and accuracy after training on each arm's rows: means over seeds, best loss first, below the untouched model's."""
    arms = by_arm(trained, target)
    if not arms:
        return []
    every = [one for runs in arms.values() for one in runs]
    before = float(np.mean([one.untouched for one in every]))
    means = {arm: float(np.mean([one.loss for one in runs])) for arm, runs in arms.items()}
    checked = str(max(one.checked for one in every) or "")
    lines: list[tuple[str, ...]] = [
        (
            "(untouched model)",
            target,
            "",
            f"{before:.3f}",
            "",
            "",
            _mean([one.accuracy_untouched for one in every]),
            checked,
            "",
        )
    ]
    for arm in sorted(arms, key=lambda arm: means[arm]):
        runs = arms[arm]
        losses = [one.loss for one in runs]
        spread = f"{min(losses):.3f}–{max(losses):.3f}" if len(losses) > 1 else ""
        lines.append((arm, target, str(runs[0].rows), f"{means[arm]:.3f}", spread, f"{means[arm] - before:+.3f}",
                      _mean([one.accuracy for one in runs]), str(runs[0].checked or ""),
                      f"{np.mean([one.answers for one in runs]):.2f}"))  # fmt: skip
    return lines


def training_warnings(trained: Sequence[Trained], target: str) -> list[str]:
    """Picks that made the model worse than it was, or no better than random rows did; and why there is no accuracy."""
    arms, found = by_arm(trained, target), []
    for arm, runs in arms.items():
        loss, before = (float(np.mean([getattr(one, name) for one in runs])) for name in ("loss", "untouched"))
        drawn = [one.loss for one in arms.get("random", [])]
        if loss > before:
            found.append(
                f"training on {arm} made {target} worse than the untouched model: {loss:.3f} against {before:.3f}"
            )
        elif arm != "random" and drawn and loss >= float(np.mean(drawn)):
            found.append(
                f"training on {arm} helped {target} no more than random rows: {loss:.3f} against {np.mean(drawn):.3f}"
            )
    reasons = dict.fromkeys(one.not_checked for runs in arms.values() for one in runs if one.not_checked)
    return found + [f"{target} has no accuracy: {reason}" for reason in reasons]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else ""
