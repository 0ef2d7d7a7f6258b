"""Say why a selection has a row, or has it not."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from ..core.configs import EvidenceOptions, ExplainConfig
from ..core.errors import NeuronSelectError
from ..core.provenance import SourceRecord
from ..explain.causal import CausalCheck
from ..explain.explanation import Contrast, Explanation, WhyNot
from ..rows.load import BUNDLED, load_rows
from ..selection.causal import CausalOptions, causal_check
from ..selection.selection import Selection
from ..selection.why import Explainer
from ..store.store import FeatureStore
from .parts import Say, quiet


def explain(config: ExplainConfig, *, say: Say = quiet) -> Explanation | WhyNot | Contrast | CausalCheck:
    """Explain a row of a selection, a row that it has not, or two of its rows against each other; or check the reasons.

    Raises:
        NeuronSelectError: no such row; a model, SAE, store, pool or exemplars that the selection was not made with.
    """
    explainer = explainer_of(config, config.target, Selection.from_pretrained(config.folder))
    found: Explanation | WhyNot | Contrast | CausalCheck
    if config.causal is not None:
        held_out = None if config.held_out is None else rows_like(config.held_out, "held_out", None)
        found = causal_check(explainer, CausalOptions(config.causal, config.draws, config.seed), held_out)
    elif config.contrast is not None:
        found = explainer.contrast(*config.contrast, config.top)
    elif config.why_not is not None:
        found = explainer.why_not(config.why_not, config.top)
    else:
        assert config.row is not None
        found = explainer.explain(config.row, config.top)
    say(str(found))
    return found


def explainer_of(config: EvidenceOptions, wanted: str | None, selection: Selection) -> Explainer:
    """An explainer of a saved selection, with what the options give.

    Args:
        wanted: ``NAME`` of a target, or ``NAME=ROWS`` with its exemplars.

    Raises:
        NeuronSelectError: a model, SAE, store, pool or exemplars that the selection was not made with.
    """
    name, given, spec = (wanted or "").partition("=")
    target = name or None
    selector, exemplars = selection.selector, None
    if selector is None:
        raise NeuronSelectError(
            f"a selection by {selection.provenance.method.name} keeps nothing of its exemplars: select again in Python, and "
            "explain there", option="folder",
        )  # fmt: skip
    pool = pool_of(config, selection)
    target = target or next(iter(selector.targets))
    record = selector.exemplars.get(target)
    source = record.source if record else None
    if given:
        exemplars = rows_like(spec, "target", source)
    elif source is not None and (source.id or "").startswith(BUNDLED):
        exemplars = rows_like(str(source.id), "target", None)
    if config.model is not None or config.sae is not None or config.device != "auto":
        selector.make_extractor(model=config.model, sae=config.sae, device=config.device)
    store = None if config.features is None else FeatureStore(config.features)
    return selection.explainer(target=target, features=store, pool=pool, exemplars=exemplars)


def pool_of(config: EvidenceOptions, selection: Selection) -> Dataset | None:
    """The pool that is named, or a bundled one; None where it is not at hand.

    Raises:
        NeuronSelectError: another one than the selection's.
    """
    if config.pool is not None:
        return rows_like(config.pool, "pool", selection.provenance.pool)
    known = selection.provenance.pool.id or ""
    return rows_like(known, "pool", None) if known.startswith(BUNDLED) else None


def rows_like(spec: str, option: str, known: SourceRecord | None) -> Dataset:
    """Rows, which must be those that are recorded.

    Raises:
        NeuronSelectError: they are others; both are named.
    """
    rows = load_rows(spec, option=option)
    assert isinstance(rows.data, Dataset)
    now = rows.source
    if known is not None and known.commit and now.commit and known.commit != now.commit:
        raise NeuronSelectError(
            f"is {now.id} at {now.commit}, and the selection was made with {known.id} at {known.commit}: name that one",
            option=option, value=Path(spec).name,
        )  # fmt: skip
    return rows.data
