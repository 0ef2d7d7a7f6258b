"""Rows of a pool that hold an exemplar, or repeat an earlier row: found while scoring, or once for many selections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..core.options import RowOptions
from ..core.progress import track
from ..rows.formats import Conversation, read_row, row_format, rows_of
from ..rows.leakage import Leakage, Seen, exact_key
from .reader import BATCH_ROWS, own_columns


@dataclass(frozen=True)
class Marks:
    """Rows that a selection may leave out, whatever scores them.

    Attributes:
        leak: bool ``[n]``, rows that are an exemplar or hold one's question.
        duplicate: bool ``[n]``, rows equal to an earlier row.
    """

    leak: np.ndarray
    duplicate: np.ndarray

    def __len__(self) -> int:
        return len(self.leak)

    def __getitem__(self, rows: slice) -> Marks:
        return Marks(self.leak[rows], self.duplicate[rows])


class Marker:
    """Marks batches of one pool, in order; rows that are not ``usable`` (bool ``[n]``) have no mark."""

    def __init__(self) -> None:
        self.seen = Seen()

    def duplicates(self, conversations: Sequence[Conversation], usable: np.ndarray) -> np.ndarray:
        """Bool ``[n]``: rows equal to an earlier one, of this batch or of those before."""
        found = np.zeros(len(conversations), dtype=bool)
        rows = np.flatnonzero(usable).tolist()
        keys = [exact_key(conversations[i]) for i in rows]
        before, new = self.seen.contains(keys), set[bytes]()
        for i, row_key, known in zip(rows, keys, before.tolist(), strict=True):
            found[i] = known or row_key in new
            if not known:
                new.add(row_key)
        self.seen.add(new)
        return found

    def leaks(self, conversations: Sequence[Conversation], usable: np.ndarray, leakage: Leakage) -> np.ndarray:
        """Bool ``[n]``: rows that hold an exemplar."""
        found = np.zeros(len(conversations), dtype=bool)
        for i in np.flatnonzero(usable).tolist():
            found[i] = leakage.find(conversations[i])
        return found


def mark_pool(pool: Dataset, leakage: Mapping[str, Leakage], options: RowOptions) -> dict[str, Marks]:
    """Marks of a whole pool by target, to give to several selections from it.

    Raises:
        NeuronSelectError: its columns are of no known format.
    """
    own = own_columns(pool.column_names)
    fmt = row_format(own, options.row_format, options.columns)
    texts = pool.with_format(None).select_columns(fmt.used)
    marker = Marker()
    duplicate: list[np.ndarray] = []
    leak: dict[str, list[np.ndarray]] = {name: [] for name in leakage}
    with track("leaks and duplicates", len(pool), brief=True) as progress:
        for start in range(0, len(pool), BATCH_ROWS):
            conversations = [read_row(row, fmt) for row in rows_of(texts[start : start + BATCH_ROWS])]
            usable = np.asarray([not one.skip for one in conversations])
            duplicate.append(marker.duplicates(conversations, usable))
            for name, what in leakage.items():
                leak[name].append(marker.leaks(conversations, usable, what))
            progress.done(len(conversations))
    return {name: Marks(np.concatenate(leak[name]), np.concatenate(duplicate)) for name in leakage}
