"""Random rows as long as the picks of another method, with as large a share of answers: the control of a gain."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.folders import DATA_FILE, SCORES_FILE, SELECTION_RECORD, fetch_selection
from ..core.options import opt
from ..core.provenance import Budget, Provenance, SourceRecord
from ..signals.columns import RowBatch
from .base import PoolMethod, Target, register_method
from .random import uniform
from .why import Why

PARTS = 10
FAR = 0.2
"""Difference of mean lengths, as a share, from which on the match is doubted."""


@dataclass
class Lengths:
    """Numbers of the pool's rows, in parts: row, tokens, answer tokens; and the keys of rows that were picked."""

    rows: list[np.ndarray] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    answers: list[np.ndarray] = field(default_factory=list)
    keys: dict[int, str] = field(default_factory=dict)


@register_method
@dataclass(frozen=True)
class MatchedRandom(PoolMethod):
    """For each pick of a selection of this pool, best first, a random row of its cell that the selection has not picked.

    See :func:`matched_rows`. Rows that the selection left out as duplicates or leaks are not drawn. A drawn row's score falls
    from 1 (drawn for the best pick) towards 0; the other rows have none.
    """

    name = "matched-random"
    signals = ("tokens", "answer_tokens", "row_key")
    needs_target = False
    grades = False
    default_budget = Budget(ratio=1.0)
    source_option = "selection"

    selection: str = opt("", "The selection to match: its folder or Hub id, of the same pool.")
    seed: int = opt(0, "Another seed, another draw.", minimum=0)

    def check(self) -> None:
        super().check()
        if not self.selection:
            raise NeuronSelectError(
                f"name the selection to match: --method {self.name}:SELECTION (a folder or Hub id)", option="method",
                value=self.name,
            )  # fmt: skip
        _ = self._given

    def sources(self) -> dict[str, SourceRecord]:
        from ..core.digests import files_hash
        from ..core.sources import hub_commit

        folder, _ = self._given
        if Path(self.selection).is_dir():
            commit = f"content:{files_hash(folder, (SELECTION_RECORD,))}"
            return {"selection": SourceRecord(id=Path(self.selection).resolve().name, commit=commit)}
        return {"selection": SourceRecord(id=self.selection.partition("@")[0], commit=hub_commit(folder))}

    @cached_property
    def _given(self) -> tuple[Path, Provenance]:
        name, _, revision = self.selection.partition("@")
        known = Path(self.selection).is_dir()
        return fetch_selection(
            self.selection if known else name, revision=None if known else revision or None, option="selection"
        )

    @cached_property
    def _picks(self) -> np.ndarray:
        """Numbers of the picked rows, best first."""
        scores = pq.read_table(self._given[0] / SCORES_FILE, columns=["source_index", "rank", "selected"])
        picked = scores.filter(scores.column("selected"))
        return picked.column("source_index").to_numpy()[np.argsort(picked.column("rank").to_numpy())]

    def start(self) -> Lengths:
        return Lengths()

    def observe(self, state: Lengths, rows: RowBatch) -> None:
        state.rows.append(rows.index)
        state.tokens.append(rows["n_tokens"])
        state.answers.append(rows["n_answer_tokens"])
        keys = rows["row_key"]
        for place in np.flatnonzero(np.isin(rows.index, self._picks)).tolist():
            state.keys[int(rows.index[place])] = keys[place]

    def finish(self, state: Lengths, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """``rows``: the rows drawn, ascending; ``scores``: theirs."""
        rows, tokens, answers = (np.concatenate(part) for part in (state.rows, state.tokens, state.answers))
        scores = pq.read_table(self._given[0] / SCORES_FILE, columns=["source_index", "excluded"])
        self._check_pool(state, int(rows.max()), scores.num_rows)
        out = np.isin(scores.column("excluded").to_numpy(zero_copy_only=False), ["duplicate", "leak"])
        free = ~np.isin(rows, scores.column("source_index").to_numpy()[out])
        picks = np.searchsorted(rows, self._picks)
        drawn = matched_rows(picks, tokens, answers, free, self.seed, keys=rows)
        theirs, ours = tokens[picks].mean(), tokens[drawn].mean()
        if abs(ours / theirs - 1) > FAR:
            warnings.warn(
                f"the rows drawn have {ours:.0f} tokens on average, the picks {theirs:.0f}: the pool has too few other rows of "
                "their lengths; match a smaller selection",
                NeuronSelectWarning,
                stacklevel=2,
            )
        order = np.argsort(drawn)
        found = {"rows": rows[drawn[order]], "scores": 1 - order / len(drawn)}
        return dict.fromkeys(targets, found)

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        place = np.minimum(np.searchsorted(target["rows"], rows.index), len(target["rows"]) - 1)
        return np.where(target["rows"][place] == rows.index, target["scores"][place], np.nan)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        score = float(self.score(row, target)[0])
        if np.isnan(score):
            return Why("it was not drawn for a pick of the selection that is matched")
        pick = round((1 - score) * len(target["rows"]))
        return Why(
            f"it was drawn for pick {pick} of the selection that is matched, which is about as long; its text does not count"
        )

    def _check_pool(self, state: Lengths, last: int, rows: int) -> None:
        """Refuse a selection whose picks are not the rows of this pool.

        Raises:
            NeuronSelectError: another pool, or a pick that cannot be read here.
        """
        from glob import escape

        from datasets import Dataset

        from ..rows.formats import row_format
        from ..rows.leakage import exact_key
        from ..rows.load import conversations_of, without_selection

        folder, made = self._given
        data = Dataset.from_parquet(escape(str(folder / DATA_FILE)))
        own = without_selection(data)
        known = made.extractor.options if made.extractor else None
        fmt = row_format(own.column_names or [], known.row_format, known.columns) if known else None
        keys = [exact_key(row).hex() for row in conversations_of(own, fmt)]
        wrong = [row for row, key in zip(self._picks.tolist(), keys, strict=True) if state.keys.get(row) != key]
        if wrong or last >= rows:
            what = f"row {wrong[0]} differs" if wrong else f"it has {rows} rows"
            raise NeuronSelectError(
                f"is a selection of another pool ({what}); name the pool that it was made from", option="selection",
                value=self.sources()["selection"].id,
            )  # fmt: skip


def matched_rows(
    picks: np.ndarray, tokens: np.ndarray, answers: np.ndarray, free: np.ndarray, seed: int = 0,
    keys: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """For each pick, in order, a row that was not picked, of the same cell and drawn without replacement.

    A cell is a decile of the pool's tokens and a decile of its shares of answer tokens. Where it is empty, the nearest one
    counts: by the squared distance in deciles, then by the distance in tokens (choice).

    Args:
        picks: int64 ``[k]``, rows. tokens, answers: ``[n]``, of every row, and how many of these are answers.
        free: bool ``[n]``, rows that may be drawn. keys: the rows' numbers, by which chance is keyed; default 0 to n - 1.

    Returns:
        int64 ``[k]``.

    Raises:
        NeuronSelectError: fewer free rows than picks.
    """
    left = free.copy()
    left[picks] = False
    if int(left.sum()) < len(picks):
        raise NeuronSelectError(
            f"{len(picks)} picks leave {int(left.sum())} other rows, too few to draw as many; select fewer rows"
        )
    inside = free.copy()
    inside[picks] = True
    by_tokens, by_share = (_parts(values, inside) for values in (tokens, answers / np.maximum(tokens, 1)))
    cells = by_tokens * PARTS + by_share
    chance = uniform(seed, np.arange(len(tokens)) if keys is None else keys)
    waiting: list[list[int]] = [[] for _ in range(PARTS * PARTS)]
    rows = np.flatnonzero(left)
    for row in rows[np.argsort(chance[rows], kind="stable")[::-1]].tolist():
        waiting[cells[row]].append(row)
    high, wide = np.divmod(np.arange(PARTS * PARTS), PARTS)
    drawn = []
    for cell in cells[picks].tolist():
        if not waiting[cell]:
            up, aside = np.abs(high - high[cell]), np.abs(wide - wide[cell])
            cell = next(near for near in np.lexsort((up, up**2 + aside**2)).tolist() if waiting[near])
        drawn.append(waiting[cell].pop())
    return np.asarray(drawn, np.int64)


def _parts(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The decile, 0 to 9, of each value among those ``inside``; equal values are in the same one."""
    edges = np.quantile(values[inside], np.arange(1, PARTS) / PARTS)
    return np.searchsorted(edges, values, side="right")
