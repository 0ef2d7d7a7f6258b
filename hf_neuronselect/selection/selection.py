"""Selection: the rows, their scores, and where they came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from huggingface_hub import snapshot_download

from ..core.errors import NeuronSelectError
from ..core.sources import content_hash, hub_errors
from ..hub.pushable import PushToHub
from ..rows.formats import row_format
from ..rows.load import with_messages
from .budget import Budget, Picked
from .reader import Reader
from .scan import EXCLUDED

if TYPE_CHECKING:
    from .selector import NeuronSelector

RECORD = "selection.json"
DATA_FILE = "data/train-00000-of-00001.parquet"
SCORES_FILE = "scores.parquet"


def score_table(
    scores: Mapping[str, np.ndarray],
    picked: Picked,
    n_tokens: np.ndarray,
    truncated: np.ndarray,
    excluded: np.ndarray,
    index: np.ndarray | None = None,
) -> pa.Table:
    """Every pool row: source_index, score[, score_<target>], rank, n_tokens, truncated, selected, excluded."""
    index = np.arange(len(n_tokens)) if index is None else index
    chosen = np.zeros(len(index), dtype=bool)
    chosen[picked.indices] = True
    columns: dict[str, pa.Array] = {
        "source_index": pa.array(index, pa.int64()),
        "score": pa.array(picked.score, pa.float64(), from_pandas=True),
    }
    if len(scores) > 1:
        for name, values in scores.items():
            columns[f"score_{name}"] = pa.array(values, pa.float64(), from_pandas=True)
    return pa.table(
        columns
        | {
            "rank": pa.array(picked.rank, pa.int64(), mask=picked.rank < 0),
            "n_tokens": pa.array(n_tokens, pa.int32(), mask=n_tokens < 0),
            "truncated": pa.array(truncated, pa.bool_()),
            "selected": pa.array(chosen, pa.bool_()),
            "excluded": pa.array([EXCLUDED[code] or None for code in excluded], pa.string()),
        }
    )


class Selection(PushToHub):
    """Selected rows, best first.

    Attributes:
        dataset: the rows as they came + ``neuron_score``, ``neuron_rank``, ``source_index``.
        indices: int64, their numbers in the pool, in the same order.
        provenance: what ``selection.json`` holds: model, SAE, method, parameters, counts, timing.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: np.ndarray,
        scores: pa.Table | Path,
        *,
        selector: NeuronSelector | None = None,
        choose: Callable[[Budget], tuple[Dataset, Picked, pa.Table]] | None = None,
        provenance: dict[str, Any] | None = None,
        keep_alive: Any = None,
    ) -> None:
        self.dataset, self.indices = dataset, indices
        self.provenance = provenance or {}
        self._scores, self._selector, self._choose, self._keep_alive = scores, selector, choose, keep_alive

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        method = self.provenance.get("method", {}).get("name", "?")
        rows = self.provenance.get("counts", {}).get("rows", "?")
        return f"Selection({len(self)} of {rows} rows by {method!r})"

    # ------------------------------------------------------------------------------------- scores
    def _score_batches(self) -> Iterator[pa.Table]:
        if isinstance(self._scores, pa.Table):
            yield self._scores
            return
        # A stream's log: what was selected is known only now; ranks of the others are null.
        place = {int(row): rank for rank, row in enumerate(self.indices)}
        with pq.ParquetFile(self._scores) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                ranks = [place.get(row) for row in table.column("source_index").to_pylist()]
                names = table.column_names
                table = table.set_column(names.index("rank"), "rank", pa.array(ranks, pa.int64()))
                selected = pa.array([rank is not None for rank in ranks])
                yield table.set_column(names.index("selected"), "selected", selected)

    @property
    def scores(self) -> pa.Table:
        """Every pool row's scores (see :func:`score_table`)."""
        return pa.concat_tables(list(self._score_batches()))

    def picked_lengths(self) -> np.ndarray:
        """Tokens of the selected rows, where they are known."""
        found = []
        for table in self._score_batches():
            lengths = table.filter(table.column("selected")).column("n_tokens").drop_null()
            found.append(lengths.to_numpy())
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def rethreshold(
        self,
        *,
        ratio: float | None = None,
        k: int | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
    ) -> Selection:
        """The same scores under another budget; no model runs.

        Raises:
            NeuronSelectError: the pool is no longer at hand (a stream, or a selection read from disk).
        """
        if self._choose is None:
            raise NeuronSelectError("the pool is not at hand any more: select again from it")
        budget = Budget(ratio, k, threshold, max_tokens)
        dataset, picked, table = self._choose(budget)
        other = Selection(dataset, picked.indices, table, selector=self._selector, choose=self._choose)
        lengths = other.picked_lengths()
        other.provenance = self.provenance | {
            "budget": {name: value for name, value in vars(budget).items() if value is not None},
            "counts": self.provenance["counts"] | {"selected": len(other)},
            "tokens": self.provenance["tokens"]
            | {"selected_mean": round(float(lengths.mean()), 2) if len(lengths) else None},
        }
        return other

    # ------------------------------------------------------------------------------------ explain
    def explain(self, i: int, *, target: str | None = None, top: int = 10) -> list[dict[str, float]]:
        """Which features made the i-th selected row win.

        Args:
            i: 0-based place in the selection. target: which of several targets. top: features returned.

        Returns:
            The features with the largest share of the score, each ``{"latent", "value", "target", "share"}``.

        Raises:
            NeuronSelectError: the method cannot say, or the model is not at hand.
        """
        if not 0 <= i < len(self):
            raise NeuronSelectError(f"the selection has rows 0 to {len(self) - 1}", option="row", value=i)
        selector = self._selector
        if selector is None or selector.extractor is None:
            raise NeuronSelectError(
                "the selector and its extractor are not at hand: select again, or fit with extractor="
            )
        name = target or next(iter(selector.targets))
        if name not in selector.targets:
            raise NeuronSelectError(f"one of {', '.join(selector.targets)}", option="target", value=name)
        drop = [c for c in self.dataset.column_names if c.startswith("neuron_") or c == "source_index"]
        row = self.dataset.select([i]).remove_columns(drop)
        batch = next(iter(Reader(selector.method.signals, selector.extractor, dict(selector.identities)).read(row)))
        found = selector.method.explain(batch.rows.only_usable(), selector.targets[name])
        if not found:
            raise NeuronSelectError(f"method {selector.method.name!r} does not say which features made a row win")
        columns = {key: values[:top].tolist() for key, values in found[0].items()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    # -------------------------------------------------------------------------------- persistence
    def save_pretrained(self, folder: str | Path, *, messages: bool = True, examples: bool = True) -> None:
        """Write a selection folder; ``datasets.load_dataset(folder)`` opens its rows.

        Args:
            folder: new, empty, or a selection folder (replaced; what was added to its README stays).
            messages: add a ``messages`` column where the rows have none.
            examples: show beginnings of rows in the card and the report.

        Raises:
            NeuronSelectError: the folder holds something else, or the disk is full.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / RECORD).exists())):
            raise NeuronSelectError(
                "exists and is not a selection folder; name another", option="out", value=folder.name
            )
        try:
            (folder / "data").mkdir(parents=True, exist_ok=True)
            # The record is written last: a folder without it is not a selection yet.
            (folder / RECORD).unlink(missing_ok=True)
            (self._with_messages() if messages else self.dataset).to_parquet(folder / DATA_FILE)
            writer: pq.ParquetWriter | None = None
            for table in self._score_batches():
                writer = writer or pq.ParquetWriter(folder / SCORES_FILE, table.schema)
                writer.write_table(table)
            if writer is not None:
                writer.close()
            files = {name: content_hash(folder / name) for name in (DATA_FILE, SCORES_FILE)}
            self.provenance["files"] = files
            self.write_pages(folder, examples)
            text = json.dumps(self.provenance, indent=2, ensure_ascii=False, default=str)
            (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        except OSError as cause:
            raise NeuronSelectError(
                f"cannot be written: {cause.strerror or cause}", option="out", value=folder.name
            ) from cause

    def write_pages(self, folder: Path, examples: bool) -> None:
        """``README.md`` (what was added to it stays) and ``report.html`` of a selection folder."""
        from ..explain.report import excerpt, selection_report
        from ..hub.cards import SelectionCard, write_card

        shown = [excerpt(self, i) for i in range(min(3, len(self)))] if examples else []
        write_card(folder, SelectionCard(self.provenance, self.provenance["files"][DATA_FILE], shown))
        (folder / "report.html").write_text(selection_report(self, rows=20 if examples else 0), encoding="utf-8")

    def _with_messages(self) -> Dataset:
        if "messages" in self.dataset.column_names:
            return self.dataset
        settings = self.provenance.get("extractor") or {}
        own = [c for c in self.dataset.column_names if not c.startswith("neuron_") and c != "source_index"]
        fmt = row_format(own, settings.get("row_format", "auto"), dict(settings.get("columns") or []))
        return self.dataset if fmt.name == "text" else with_messages(self.dataset, fmt)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Selection:
        """A saved selection, from a folder or the Hub.

        Raises:
            NeuronSelectError: not a selection folder, or rows that do not match ``selection.json``.
        """
        folder = Path(source)
        if not folder.is_dir():
            with hub_errors("selection", str(source)):
                folder = Path(
                    snapshot_download(
                        str(source), repo_type="dataset", revision=revision, token=token,
                        allow_patterns=[RECORD, SCORES_FILE, "data/*.parquet"],
                    )
                )  # fmt: skip
        provenance = check_selection(folder, str(source))
        dataset = Dataset.from_parquet(str(folder / DATA_FILE))
        assert isinstance(dataset, Dataset)
        return cls(
            dataset,
            np.asarray(dataset["source_index"], dtype=np.int64),
            pq.read_table(folder / SCORES_FILE),
            provenance=provenance,
        )


def check_selection(folder: Path, name: str) -> dict[str, Any]:
    """``selection.json`` of a folder whose files are those it was written with.

    Raises:
        NeuronSelectError: not a selection folder, or one that was edited.
    """
    try:
        provenance: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        rows = pq.read_metadata(folder / DATA_FILE).num_rows
        now = {file: content_hash(folder / file) for file in provenance["files"]}
    except (OSError, KeyError, json.JSONDecodeError, pa.ArrowInvalid) as cause:
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:160]
        raise NeuronSelectError(f"not a selection folder ({reason})", option="selection", value=name) from cause
    for file, before in provenance["files"].items():
        if now[file] != before:
            raise NeuronSelectError(
                f"{file} was changed after selection.json was written ({rows} rows in data/, "
                f"{provenance['counts']['selected']} by selection.json); select again, or use the file itself as rows",
                option="selection", value=name,
            )  # fmt: skip
    return provenance
