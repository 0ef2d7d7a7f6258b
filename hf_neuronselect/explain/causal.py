"""Whether a task uses the features that explain picks: what was measured, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.intervals import Interval
from ..core.text import shown
from .labels import Label
from .report import text_table

LIKE = 1.5
"""From this ratio of what two sets of features add to the activation on, they are not alike."""


@dataclass(frozen=True)
class Named:
    """A feature that explains picks.

    Attributes:
        share: of the sums that the picks' scores are made from, their mean. size: mean norm of what it adds to the activation of a token.
        rate: share of the tokens on which it is active. label: made by a machine.
    """

    feature: int
    share: float
    size: float
    rate: float
    label: Label | None = None


@dataclass(frozen=True)
class CausalCheck:
    """The rise of the loss on a task's answers without the features that explain the picks, against random ones.

    Attributes:
        features: those that were zeroed, the largest share first. picks: as many were explained. rows: whose answers were read; rows_are: what
            they are.
        loss: nats an answer token of the model as it is. rise: what is added without the features; random_rise: without random
            features of like activity, the mean of the draws. above: the first minus the second, row by row.
        draws: rise of each draw. random_features: in a draw, their mean number. taken, random_taken: share of the activation's norm that is taken off at a token, mean.
        notes: what a reader should know besides.
    """

    method: str
    target: str
    features: tuple[Named, ...]
    picks: int
    rows: int
    rows_are: str
    loss: Interval
    rise: Interval
    random_rise: Interval
    above: Interval
    draws: tuple[float, ...]
    random_features: float
    taken: float
    random_taken: float
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """``used``, ``not like`` (more is taken off than at random), ``below random``, ``as random``, or ``not shown``."""
        low, high, rise = self.above.low, self.above.high, self.rise.low
        assert low is not None and high is not None and rise is not None
        if low > 0:
            return "used" if self.taken < LIKE * self.random_taken else "not like"
        if high < 0:
            return "below random"
        return "as random" if rise > 0 else "not shown"

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        ratio = self.taken / max(self.random_taken, 1e-30)
        return {
            "used": "used: without these features the loss on the task's answers rises more than without random features of like "
                    "activity that add as much",
            "not like": "not shown: the loss rises more without these features than without random ones, but they also make up "
                        f"{ratio:.1f} times as much of the activation, and no others are left that could: try fewer features",
            "below random": "not shown: random features of like activity hurt more than these",
            "as random": "not shown: random features of like activity hurt as much as these",
            "not shown": "not shown: the loss does not rise without these features",
        }[self.outcome]  # fmt: skip

    def record(self) -> Mapping[str, object]:
        """For JSON."""

        def told(one: Interval) -> list[float | None]:
            return [one.value, one.low, one.high]

        return {
            "method": self.method, "target": self.target, "outcome": self.outcome, "picks": self.picks, "rows": self.rows,
            "rows_are": self.rows_are, "loss": told(self.loss), "rise": told(self.rise), "random_rise": told(self.random_rise),
            "above": told(self.above), "draws": list(self.draws), "random_features": self.random_features, "taken": self.taken, "random_taken": self.random_taken,
            "features": [[one.feature, one.share, one.size, one.rate] for one in self.features], "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        cells = [
            [f"feature {one.feature}", f"{one.share:.1%}", f"{one.rate:.1%}", f"{one.size:.3g}"]
            for one in self.features
        ]
        rises = [
            ["these features", self.rise.told("+.4f"), f"{self.taken:.1%}"],
            [
                f"{self.random_features:.0f} random ones, {len(self.draws)} draws",
                self.random_rise.told("+.4f"),
                f"{self.random_taken:.1%}",
            ],
            ["difference, row by row", self.above.told("+.4f"), ""],
        ]
        lines = [
            f"Does {self.target} use the {len(self.features)} features that explain the best {self.picks} picks of {self.method}?",
            text_table(["", "share of the picks' scores", "tokens with it", "adds (norm)"], cells),
            *(f"feature {one.feature} ({one.label.made}): {one.label}" for one in self.features if one.label),
            "",
            f"Loss on the answers of {self.rows} {self.rows_are}: {self.loss.told('.4f')} nats a token. What is added, with 95 % "
            "intervals, when these are zeroed:",
            text_table(["", "rise of the loss", "of the activation"], rises),
            f"Verdict: {self.verdict}.",
        ]  # fmt: skip
        return shown("\n".join([*lines, *(f"Note: {note}." for note in self.notes)]), lines=True)

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        printer.text(str(self))  # type: ignore[attr-defined]
