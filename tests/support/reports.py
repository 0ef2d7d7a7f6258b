"""Reports of selections that no model made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from hf_neuronselect.core.cost import Cost
from hf_neuronselect.core.provenance import (
    Budget,
    Counts,
    Lengths,
    MethodRecord,
    Provenance,
    SourceRecord,
    TargetRecord,
    Timing,
)
from hf_neuronselect.explain.page_data import PoolTable, Report, ReportRow
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.selection.selection import Selection

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"


@contextmanager
def without_reports() -> Iterator[None]:
    """Selections are saved with an empty page: to say why, it reads the best rows again, most of a small selection's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "report", lambda *_: "")
        yield


def report(picks: int = 3, total: int = 10, text: str = "a question", **more) -> Report:
    """A selection of the best of ``total`` rows, made of numbers alone."""
    rng = np.random.default_rng(1)
    score = np.sort(rng.normal(size=total))[::-1].copy()
    table = PoolTable(
        np.arange(total), score, rng.integers(5, 900, total), np.arange(total) < picks, np.ones(total, dtype=bool)
    )
    made = Provenance(
        method=MethodRecord(name="mona", paper="arXiv:1"),
        targets={"t": TargetRecord(exemplars=9, used=8, hit=0.625, held_out=(2.0, 1.5, 0.25, -9.0))},
        budget=Budget(k=picks),
        pool=SourceRecord(id="me/pool", commit="0" * 40),
        counts=Counts(rows=total, selected=picks, duplicate=2, leak=1, reasons=("row 3: a bad role",)),
        tokens=Lengths(pool_mean=1.0, selected_mean=2.0),
        packages={"numpy": "2"},
        timing=Timing(seconds=12.3, finished="2030-01-02T03:04:05"),
        cost=Cost(),
    )
    said = Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "an answer"}])
    rows = [ReportRow(i, said if text else None, f"source {i % 3}") for i in range(picks)]
    return Report(**{"made": made, "table": table, "picks": rows} | more)
