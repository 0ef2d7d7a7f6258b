"""What models trained on picks are worth: cells of a table, and warnings in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.intervals import HIGH, LOW, RESAMPLES

TRAINED = ("trained on", "target", "rows", "loss", "seeds", "change", "95 %", "accuracy", "checked", "answers")


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Losses of one target's held-out rows before and after a training.

    Attributes:
        before, after: float64 ``[n]``, nats, summed over a row's answer tokens. tokens: int64 ``[n]``, answer tokens, at least 1.
    """

    before: np.ndarray
    after: np.ndarray
    tokens: np.ndarray

    @property
    def change(self) -> float:
        """Nats a token that the training added."""
        return float((self.after - self.before).sum() / self.tokens.sum())


ByRow = Mapping[tuple[str, str, str, int], RowLosses]
"""(arm, target of the picks, measured target, seed) -> its held-out rows."""


@dataclass(frozen=True)
class Trained:
    """A model that was trained on picks.

    Attributes:
        arm: the method, or the control. loss: on the target's held-out answers, nats a token. untouched: of the model before.
        low, high: 95 % interval of ``loss - untouched`` over held-out rows.
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
    low: float
    high: float
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
        untouched: loss of the model before, on the same rows. low, high: 95 % interval of ``loss - untouched`` over these rows.
    """

    arm: str
    picked_for: str
    target: str
    seed: int
    loss: float
    untouched: float
    low: float
    high: float


def resampled_changes(runs: Sequence[RowLosses], seed: int = 0) -> np.ndarray:
    """Change of the loss by training, with seeds and held-out rows drawn again, both with replacement.

    With the same seed, runs on the same held-out rows share each draw of them, so that what two arms differ by can be told.

    Args:
        runs: one a seed of the training.

    Returns:
        float64 ``[RESAMPLES]``, nats a token, each the mean over the drawn seeds.
    """
    changes = np.empty((RESAMPLES, len(runs)))
    for n in {len(run.tokens) for run in runs}:
        times = np.random.default_rng(seed).multinomial(
            n, np.full(n, 1 / n), RESAMPLES
        )  # [draws, n]: how often a row is drawn
        for i, run in enumerate(runs):
            if len(run.tokens) == n:
                changes[:, i] = times @ (run.after - run.before) / (times @ run.tokens)
    drawn = np.random.default_rng(seed + 1).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), RESAMPLES)
    found: np.ndarray = (drawn * changes).sum(axis=1) / len(runs)
    return found


def ends_of(draws: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval."""
    low, high = np.percentile(draws, [LOW, HIGH])
    return float(low), float(high)


def own_gains(by_row: ByRow, arm: str) -> dict[str, tuple[float, float, float]]:
    """By target: how much more training on an arm's picks for it changes its loss than picks for the others do, with the 95 %
    interval. Below 0: picks help their own target most. Each target is told by itself, since the size of a change differs.
    """
    pairs: dict[str, dict[str, list[RowLosses]]] = {}
    for (of, picked_for, target, _), run in by_row.items():
        if of == arm:
            pairs.setdefault(target, {}).setdefault(picked_for, []).append(run)
    found = {}
    for target, picks in pairs.items():
        others = [runs for picked_for, runs in picks.items() if picked_for != target]
        if target in picks and others:
            mean = _mean_change(picks[target]) - float(np.mean([_mean_change(runs) for runs in others]))
            drawn = resampled_changes(picks[target]) - np.mean([resampled_changes(runs) for runs in others], axis=0)
            found[target] = (mean, *ends_of(drawn))
    return found


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


def training_cells(trained: Sequence[Trained], by_row: ByRow, target: str) -> list[tuple[str, ...]]:
    """Loss and accuracy after training on each arm's rows: means over seeds, best loss first, below the untouched model's.

    The column "95 %" is the interval of the change over held-out rows and seeds.
    """
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
        low, high = ends_of(resampled_changes(_at_own(by_row, arm, target)))
        lines.append((arm, target, str(runs[0].rows), f"{means[arm]:.3f}", spread, f"{means[arm] - before:+.3f}",
                      f"{low:+.3f} to {high:+.3f}", _mean([one.accuracy for one in runs]), str(runs[0].checked or ""),
                      f"{np.mean([one.answers for one in runs]):.2f}"))  # fmt: skip
    return lines


def _at_own(by_row: ByRow, arm: str, target: str) -> list[RowLosses]:
    """One arm's trainings for a target, measured there."""
    return [run for (of, picked_for, at, _), run in by_row.items() if (of, picked_for, at) == (arm, target, target)]


def training_warnings(trained: Sequence[Trained], by_row: ByRow, target: str) -> list[str]:
    """Picks that made the model worse, or are not shown to help, or not more than random rows; and why there is no accuracy."""
    arms, found = by_arm(trained, target), []
    random = [one.loss for one in arms.get("random", [])]
    for arm, runs in arms.items():
        loss, before = (float(np.mean([getattr(one, name) for one in runs])) for name in ("loss", "untouched"))
        if loss > before:
            found.append(
                f"training on {arm} made {target} worse than the untouched model: {loss:.3f} against {before:.3f}"
            )
        elif arm != "random" and random and loss >= (drawn := float(np.mean(random))):
            found.append(f"training on {arm} helped {target} no more than random rows: {loss:.3f} against {drawn:.3f}")
        elif doubt := _doubt(by_row, arm, target):
            found.append(f"{doubt}; more held-out rows would tell")
    reasons = dict.fromkeys(one.not_checked for runs in arms.values() for one in runs if one.not_checked)
    return found + [f"{target} has no accuracy: {reason}" for reason in reasons]


def _doubt(by_row: ByRow, arm: str, target: str) -> str:
    """Which gain of an arm may be chance: that against the untouched model, or that against random rows."""
    runs = _at_own(by_row, arm, target)
    mean, draws = _mean_change(runs), resampled_changes(runs)
    low, high = ends_of(draws)
    if high >= 0:
        return f"whether training on {arm} helped {target} is not sure: {mean:+.3f} ({low:+.3f} to {high:+.3f})"
    if arm == "random" or not (random := _at_own(by_row, "random", target)):
        return ""
    low, high = ends_of(draws - resampled_changes(random))
    if high < 0:
        return ""
    return (
        f"whether training on {arm} helped {target} more than random rows is not sure: "
        f"{mean - _mean_change(random):+.3f} ({low:+.3f} to {high:+.3f})"
    )


def _mean_change(runs: Sequence[RowLosses]) -> float:
    return float(np.mean([run.change for run in runs]))


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else ""
