"""Selection: the rows, their scores, and how they were selected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..core import folders
from ..core.errors import NeuronSelectError
from ..core.folders import CAPABILITY_FOLDER, DATA_FILE, FITTED, SCORES_FILE
from ..core.folders import SELECTION_RECORD as RECORD
from ..core.provenance import Budget, Provenance
from ..core.seals import checksums, encode
from ..core.spread import Spread
from ..core.writing import put, writing
from ..explain.fragments import selection_fragment
from ..explain.selection_page import selection_page
from ..explain.spots import one_line
from ..hub.cards import SelectionCard, write_card
from ..hub.pushable import PushToHub
from ..methods.base import Target
from ..rows.formats import Conversation, RowFormat, read_row, row_format
from ..rows.load import conversations_of, with_messages
from ..rows.media import with_bytes
from ..signals.extractor import NeuronFeatureExtractor
from .capability import Capability
from .record import mean_length
from .reported import reported

if TYPE_CHECKING:
    from ..explain.causal import CausalCheck
    from ..explain.explanation import Contrast, Explanation, WhyNot
    from ..store.store import FeatureStore
    from .plot import Plots
    from .selector import NeuronSelector
    from .why import Explainer


SHOWN = 5
"""Rows that a notebook shows."""


class Selection(PushToHub):
    """Selected rows, best first.

    Attributes:
        dataset: the rows as they came + ``neuron_score``, ``neuron_rank``, ``source_index``.
        indices: int64, their numbers in the pool, in the same order.
        provenance: model, SAE, method, options, counts, timing, cost: what ``selection.json`` holds.
        selector: the fitted selector that made it; None only for a selection put together by hand.
        pool, features: what it was selected from; None for a stream, or a selection read from disk.
        finished: targets as the pool was scored by them; of those missing here, the method looks at the pool again.
    """

    provenance: Provenance

    def __init__(
        self,
        dataset: Dataset,
        indices: np.ndarray,
        scores: pa.Table | Path,
        *,
        selector: NeuronSelector | None = None,
        choose: Callable[[Budget], tuple[Dataset, np.ndarray, pa.Table]] | None = None,
        provenance: Provenance | None = None,
        keep_alive: Any = None,
    ) -> None:
        self.dataset, self.indices, self.selector = dataset, indices, selector
        if provenance is not None:
            self.provenance = provenance
        self._scores, self._choose, self._keep_alive = scores, choose, keep_alive
        self.pool: Dataset | None = None
        self.features: FeatureStore | None = None
        self.finished: Mapping[str, Target] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {self.provenance.counts.rows} rows by {self.provenance.method.name!r})"

    def _repr_html_(self) -> str:
        """For notebooks: a sentence, what speaks against the selection, and the first rows."""
        few = self.dataset.with_format(None)[:SHOWN]
        shown = {"score": [f"{score:.4g}" for score in few["neuron_score"]], "pool row": map(str, few["source_index"])}
        column = (self.provenance.spread or Spread()).source_column
        if column in self._own_columns and all(isinstance(one, str) for one in few[column]):
            shown[column] = [one_line(name, 40) for name in few[column]]
        shown["text"] = [one_line(self.excerpt(i), 160) for i in range(len(few["neuron_score"]))]
        return selection_fragment(self.provenance, list(shown), list(zip(*shown.values(), strict=True)))

    # ------------------------------------------------------------------------------------- scores
    def score_batches(self) -> Iterator[pa.Table]:
        """The table of :attr:`scores` in parts."""
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
        """Every pool row's scores (see :func:`~hf_neuronselect.selection.scores.score_table`)."""
        return pa.concat_tables(list(self.score_batches()))

    def picked_lengths(self) -> np.ndarray:
        """Tokens of the selected rows, where they are known."""
        found = []
        for table in self.score_batches():
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
        """Select from the same scores under another budget; no model runs.

        Raises:
            NeuronSelectError: the pool is no longer at hand (a stream, or a selection read from disk).
        """
        if self._choose is None:
            raise NeuronSelectError("the pool is not at hand any more: select again from it")
        budget = Budget(ratio, k, threshold, max_tokens)
        dataset, indices, table = self._choose(budget)
        other = Selection(dataset, indices, table, selector=self.selector, choose=self._choose)
        other.pool, other.features, other.finished = self.pool, self.features, self.finished
        made = self.provenance
        other.provenance = replace(
            made,
            budget=budget,
            auto=None,
            counts=replace(made.counts, selected=len(other)),
            tokens=replace(made.tokens, selected_mean=mean_length(other.picked_lengths())),
            files=None,
        )
        return other

    # ------------------------------------------------------------------------------------ explain
    @property
    def plot(self) -> Plots:
        """The report's pictures as matplotlib figures: ``selection.plot.scores()``, ``.lengths()``, ``.sources()``."""
        from .plot import Plots  # matplotlib is loaded where a picture is wanted

        return Plots(self)

    def explainer(
        self,
        *,
        target: str | None = None,
        extractor: NeuronFeatureExtractor | None = None,
        features: FeatureStore | None = None,
        pool: Dataset | None = None,
        exemplars: Dataset | None = None,
    ) -> Explainer:
        """Explains rows, why others were left out, and why one beats another; keeps what it has read.

        Args:
            target: which of several targets.
            extractor: default the selector's own, which is made again where its model is bundled or on the Hub. With a store
                it is needed for tokens alone.
            features: a store of the pool's signals: how rare features are, and where else they fire. pool: its rows' texts.
            exemplars: those the target was fitted on.
                All three default to those that the selection was made with, in the same process.

        Raises:
            NeuronSelectError: a store, a pool or exemplars that the selection was not made with; both are named.
        """
        from .why import Explainer

        return Explainer(self, target, extractor, features, pool, exemplars)

    def explain(self, i: int, *, top: int = 10, **given: Any) -> Explanation:
        """Why a selected row has its score: its parts, the tokens they come from, and where else they are found.

        Args:
            i: 0-based place in the selection. top: parts told. given: as of :meth:`explainer`.

        Raises:
            NeuronSelectError: no such row; the model or SAE is gone or is another one.
        """
        return self.explainer(**given).explain(i, top)

    def why_not(self, row: int, *, top: int = 10, **given: Any) -> WhyNot:
        """Why a row of the pool was not selected: its score, its distance to the cut, or what left it out.

        Args:
            row: its number in the pool. top, given: as of :meth:`explain`; with a pool or a store it is compared with the last pick.
        """
        return self.explainer(**given).why_not(row, top)

    def contrast(self, one: int, other: int, *, top: int = 10, **given: Any) -> Contrast:
        """Why one selected row scores higher than another, part by part.

        Args:
            one, other: places in the selection. top, given: as of :meth:`explain`.
        """
        return self.explainer(**given).contrast(one, other, top)

    def causal_check(
        self, k: int = 16, *, draws: int = 10, seed: int = 0, held_out: Dataset | None = None, **given: Any
    ) -> CausalCheck:
        """Whether the task uses the features that explain the picks: its loss without them, and without random ones.

        Args:
            k: features zeroed. draws, seed: of random features of like activity that add as much.
            held_out: rows of the task; default its exemplars. given: as of :meth:`explainer`.

        Raises:
            NeuronSelectError: scores that are not made from an SAE's features; no model, SAE or rows at hand; too few of them.
        """
        from .causal import CausalOptions, causal_check

        return causal_check(self.explainer(**given), CausalOptions(k, draws, seed), held_out)

    # ------------------------------------------------------------------------------------- the rows
    @property
    def row_format(self) -> RowFormat:
        """How the selected rows were read when they were scored."""
        own = self._own_columns
        settings = self.provenance.extractor.options if self.provenance.extractor else None
        return row_format(own, settings.row_format, settings.columns) if settings else row_format(own)

    @property
    def _own_columns(self) -> list[str]:
        """The data's own columns."""
        names = self.dataset.column_names
        # Columns after `source_index` are ours: a saved selection may have a column `messages` there.
        own = names[: names.index("source_index")] if "source_index" in names else names
        return [name for name in own if not name.startswith("neuron_")]

    def conversations(self) -> list[Conversation]:
        """The rows as they were read when they were scored; of rows scored as plain text, the turns if there are any."""
        fmt = self.row_format
        if fmt.name == "text" and "messages" in self.dataset.column_names:
            fmt = row_format(self.dataset.column_names, "messages")
        return conversations_of(self.dataset, fmt)

    def excerpt(self, i: int, characters: int = 600) -> str:
        """The beginning of the i-th selected row's text."""
        fmt = self.row_format
        text = read_row(self.dataset.with_format(None).select_columns(fmt.used)[i], fmt).content()
        return text if len(text) <= characters else text[:characters] + " …"

    # -------------------------------------------------------------------------------- persistence
    def save_pretrained(
        self, folder: str | Path, *, messages: bool = True, examples: bool = True, reasons: bool | None = None
    ) -> None:
        """Write a selection folder; ``datasets.load_dataset(folder)`` opens its rows.

        Args:
            folder: new, empty, or a selection folder (replaced; what was added to its README stays).
            messages: add a ``messages`` column where the rows have none.
            examples: show beginnings of rows in the card and the report. reasons: as of :meth:`report`.

        Raises:
            NeuronSelectError: the folder holds something else, or the disk is full.
        """
        with writing(Path(folder), folders.SELECTION) as new:
            (new / "data").mkdir()
            with_bytes(self._with_messages() if messages else self.dataset).to_parquet(new / DATA_FILE)
            writer: pq.ParquetWriter | None = None
            for table in self.score_batches():
                writer = writer or pq.ParquetWriter(new / SCORES_FILE, table.schema)
                writer.write_table(table)
            if writer is not None:
                writer.close()
            files = [DATA_FILE, SCORES_FILE]
            if self.selector is not None and not self.selector.method.not_saved:
                self.selector.fitted().save(new / CAPABILITY_FOLDER)
                files += FITTED
            self.provenance = replace(self.provenance, files=checksums(new, files))
            self.write_pages(new, examples, before=Path(folder), reasons=reasons)
            put(new / RECORD, encode(self.provenance))

    def write_pages(
        self, folder: Path, examples: bool, before: Path | None = None, reasons: bool | None = None
    ) -> None:
        """Write ``README.md`` (what was added to the one ``before`` stays) and ``report.html`` of a selection folder."""
        shown = [self.excerpt(i) for i in range(min(3, len(self)))] if examples else []
        write_card(folder, SelectionCard(self.provenance, shown), before)
        put(folder / "report.html", self.report(examples, reasons))

    def report(self, examples: bool = True, reasons: bool | None = None) -> str:
        """The selection as one HTML page that needs nothing else.

        Args:
            examples: without them no text of the data is in it, and no reasons.
            reasons: why the best rows and those that just missed have their scores, which takes two passes of the model over
                these 18 rows. Default: where the model is loaded; True: it is loaded where it is not.
        """
        return selection_page(reported(self, examples, reasons))

    def _with_messages(self) -> Dataset:
        return with_messages(self.dataset, self.row_format)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Selection:
        """Load a saved selection, from a folder or the Hub.

        Raises:
            NeuronSelectError: not a selection folder, rows that do not match ``selection.json``, or no rows.
        """
        from .selector import NeuronSelector  # selectors make selections, and a saved selection has its selector

        folder, provenance = folders.fetch_selection(source, revision=revision, token=token)
        if not provenance.counts.selected:  # `datasets` cannot read a file without rows
            raise NeuronSelectError(
                "has no rows, since none is within its budget: select again with a lower threshold, or more tokens",
                option="selection", value=str(source),
            )  # fmt: skip
        selector = None
        if set(FITTED) <= (provenance.files or {}).keys():
            fitted = Capability.load(folder / CAPABILITY_FOLDER, str(source), provenance.capability)
            selector = NeuronSelector.of(fitted)
        dataset = Dataset.from_parquet(escape(str(folder / DATA_FILE)))
        assert isinstance(dataset, Dataset)
        return cls(
            dataset,
            np.asarray(dataset["source_index"], dtype=np.int64),
            pq.read_table(folder / SCORES_FILE),
            selector=selector,
            provenance=provenance,
        )
