"""What is written of a comparison: tables as CSV and Parquet, and the same to read as Markdown and as a page."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.folders import COMPARISON
from ..core.text import shown
from ..core.writing import writing
from ..explain.shared_picks import SharedPicks
from ..selection.cosines import Cosines, cosines
from ..selection.selector import NeuronSelector
from .compare_report import page_of
from .comparison import LEGEND, RANKS, Comparison, Line, rank_cells
from .core_rows import CORE, CoreLine, core_cells, core_lines, shared_picks
from .trained import TRAINED, Trained, Transfer


def write_comparison(found: Comparison, folder: Path) -> None:
    """Write the files that ``docs/methods.md`` lists, with the lines so far; what was there of an earlier run goes."""
    needs = {key: one for key, one in found.selections.items() if found.jobs[key].chosen.method.needs_target}
    shared = shared_picks(needs, len(found.pool))  # other methods pick the same rows for every target
    cores, alike = cores_of(found, shared), cosines_by_method(found)
    with writing(folder, COMPARISON) as new:
        lines = [asdict(line) for line in found.lines]
        _csv(new / "compare.csv", [one.name for one in fields(Line)], lines)
        _parquet(new / "compare.parquet", lines, Line)
        _csv(new / "overlap.csv", ["target", "method", "other", "overlap"], _overlaps(found))
        shares = [
            {"target": target, "method": method or "(the pool)", "source": source, "share": share}
            for (method, target), mix in found.sources.items()
            for source, share in mix.items()
        ]
        _csv(new / "sources.csv", ["target", "method", "source", "share"], shares)
        if shared:
            _write_shared(new, shared, cores)
        if alike:
            names = ["method", "target", "other", "block", "cosine"]
            _csv(
                new / "cosines.csv",
                names,
                [line for method, one in alike.items() for line in _of_cosines(method, one)],
            )
        if found.trained:
            runs = [asdict(one) for one in found.trained]
            _csv(new / "training.csv", [one.name for one in fields(Trained)], runs)
            _parquet(new / "training.parquet", runs, Trained)
        if found.transfers:
            _csv(new / "transfer.csv", [one.name for one in fields(Transfer)], [asdict(one) for one in found.transfers])
        (new / "compare.md").write_text(_markdown(found, cores), encoding="utf-8")
        (new / "compare.html").write_text(page_of(found, shared, cores, alike), encoding="utf-8")


def cores_of(found: Comparison, shared: Mapping[str, SharedPicks]) -> list[CoreLine]:
    """The rows that each method picks for several targets; without examples their sources are not told."""
    sources = found.row_sources if found.config is None or found.config.examples else None
    return [line for method, one in shared.items() for line in core_lines(method, one, _tokens(found, method), sources)]


def _tokens(found: Comparison, method: str) -> np.ndarray:
    """Tokens of each row of the pool, as a method's scores have them: NaN where not known."""
    first = next(one for (of, _), one in found.selections.items() if of == method)
    return first.scores.column("n_tokens").to_numpy().astype(np.float64)


def cosines_by_method(found: Comparison) -> dict[str, Cosines]:
    """Cosines between the targets of each method that keeps a vector of them; of two targets at least."""
    fitted: dict[str, dict[str, NeuronSelector]] = {}
    for method, target in found.selections:
        selector = found.jobs[method, target].fit()
        if selector.scored_by.prototype:  # else none, or one for each exemplar
            fitted.setdefault(method, {})[target] = selector
    return {method: cosines(of) for method, of in fitted.items() if len(of) > 1}


def _of_cosines(method: str, one: Cosines) -> Iterator[dict[str, Any]]:
    for block, matrix in enumerate(one.by_layer):
        for i, target in enumerate(one.names):
            for k, other in enumerate(one.names):
                yield {
                    "method": method,
                    "target": target,
                    "other": other,
                    "block": block,
                    "cosine": float(matrix[i, k]),
                }


def _overlaps(found: Comparison) -> list[dict[str, Any]]:
    return [
        {"target": target, "method": one, "other": other, "overlap": float(matrix[i, k])}
        for target in found.targets
        for methods, matrix in [found.overlaps(target)]
        for i, one in enumerate(methods)
        for k, other in enumerate(methods)
    ]


def _write_shared(new: Path, shared: Mapping[str, SharedPicks], cores: Sequence[CoreLine]) -> None:
    """Overlaps of targets, cores, sets of targets, and every picked row with the targets that picked it."""
    overlaps = [
        {"method": method, "target": target, "other": other, "overlap": float(one.overlap[i, k]), "rows": int(one.common[i, k])}
        for method, one in shared.items()
        for i, target in enumerate(one.targets)
        for k, other in enumerate(one.targets)
    ]  # fmt: skip
    _csv(new / "target_overlap.csv", ["method", "target", "other", "overlap", "rows"], overlaps)
    names = ["method", "least", "rows", "share", "by_chance", "tokens"]
    _csv(new / "core.csv", names, [{name: getattr(line, name) for name in names} for line in cores])
    sets = [
        {"method": method, "targets": "+".join(targets), "rows": rows}  # no target's name has a plus
        for method, one in shared.items()
        for targets, rows in one.sets
    ]
    _csv(new / "target_sets.csv", ["method", "targets", "rows"], sets)
    parts = []
    for method, one in shared.items():
        of = [[name for name, there in zip(one.targets, row, strict=True) if there] for row in one.picked.tolist()]
        columns = {"method": [method] * len(of), "row": one.rows, "targets": one.served, "picked_for": of}
        parts.append(pa.table(columns, _PICKED))
    pq.write_table(pa.concat_tables(parts), new / "picks.parquet")


_PICKED = pa.schema([("method", pa.string()), ("row", pa.int64()), ("targets", pa.int64()), ("picked_for", pa.list_(pa.string()))])  # fmt: skip


def _markdown(found: Comparison, cores: Sequence[CoreLine]) -> str:
    parts = [_markdown_table(*found.shown(*found.targets), 2), LEGEND]
    if ranks := found.ranks():
        parts.append(_markdown_table(RANKS, [rank_cells(one) for one in ranks], 1))
    if trained := [cells for name in found.targets for cells in found.of_training(name)]:
        parts.append(_markdown_table(TRAINED, trained, 2))
    if cores:
        parts.append(_markdown_table(CORE, [core_cells(line) for line in cores], 1))
    said = [*found.warnings(found.targets), *(line.short() for line in found.failed)]
    parts += ["\n".join(f"- {shown(one)}" for one in said)] if said else []
    return "\n\n".join(parts) + "\n"


def _csv(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


_ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}


def _parquet(path: Path, rows: Sequence[Mapping[str, Any]], kind: type[Line | Trained]) -> None:
    schema = pa.schema([(one.name, _ARROW[str(one.type).split(" | ")[0]]) for one in fields(kind)])
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(shown(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
