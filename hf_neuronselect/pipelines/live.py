"""A comparison while it runs: a table on a terminal, whose lines fill as methods finish, else a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.progress import LiveTable
from ..explain.report import text_table
from .comparison import Comparison, Line
from .parts import Say

HEADER = ("method", "target", "rows", "precision", "5–95 %", "seconds")


@dataclass
class Live:
    """Tells the user of each line.

    Attributes:
        methods, targets: names of all that will run. table: on a terminal, else None. note: for a line in words.
    """

    methods: Sequence[str]
    targets: Sequence[str]
    table: LiveTable | None
    note: Say

    def tell(self, found: Comparison, line: Line | None = None) -> None:
        """Show what is there.

        Args:
            line: the one that is done now; None: none is done yet.
        """
        if self.table is None:
            if line is not None:
                self.note(line.short())
            return
        known = {(one.method, one.target): one for one in found.lines}
        order = [(method, target) for method in self.methods for target in self.targets]
        text = text_table(HEADER, [self._cells(known.get(key), *key) for key in order])
        near = 0 if line is None else order.index((line.method, line.target))
        self.table.show(text.split("\n"), LiveTable.HEAD + near)

    def _cells(self, line: Line | None, method: str, target: str) -> tuple[str, ...]:
        if line is None:
            return method, target, "", "", "", ""
        if line.reason:
            return method, target, "did not run", "", "", ""
        precision = "" if line.precision is None else f"{line.precision:.2f}"
        between = "" if line.low is None else f"{line.low:.2f}–{line.high:.2f}"
        return method, target, str(line.rows), precision, between, f"{line.seconds:.1f}"
