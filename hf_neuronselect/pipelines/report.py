"""Write a saved selection's report again, with reasons."""

from __future__ import annotations

from pathlib import Path

from ..core.configs import ReportConfig
from ..core.errors import NeuronSelectError
from ..core.writing import put
from ..rows.load import BUNDLED
from ..selection.selection import Selection
from ..store.store import FeatureStore
from .explain import pool_of, rows_like
from .parts import Say, named_specs, quiet


def report(config: ReportConfig, *, say: Say = quiet) -> Path:
    """Write ``report.html`` of a selection folder; nothing else in it changes.

    Returns:
        Its path.

    Raises:
        NeuronSelectError: not a selection folder; a model, SAE, store, pool or exemplars that it was not made with.
    """
    if not config.folder.is_dir():
        raise NeuronSelectError(
            "no such folder; download the selection first", option="folder", value=config.folder.name
        )
    selection = Selection.from_pretrained(config.folder)
    selection.pool = pool_of(config, selection)
    selection.features = None if config.features is None else FeatureStore(config.features)
    selector, given = selection.selector, named_specs(config.target, "target")
    if selector is not None:
        for name, spec in given.items():
            if name not in selector.exemplars:
                known = ", ".join(selector.exemplars) or "none"
                raise NeuronSelectError(f"the selection's targets are {known}: NAME=ROWS", option="target", value=name)
            selector.examples[name] = rows_like(spec, "target", selector.exemplars[name].source)
        for name, record in selector.exemplars.items():
            source = record.source.id if record.source else None
            if name not in given and (source or "").startswith(BUNDLED):
                selector.examples[name] = rows_like(str(source), "target", None)
        if config.model is not None or config.sae is not None or config.device != "auto":
            selector.make_extractor(model=config.model, sae=config.sae, device=config.device)
        if config.examples and len(selection):
            selection.explainer().evidence.text_of(int(selection.indices[0]))  # of another pool it would not be
    path = config.folder / "report.html"
    put(path, selection.report(config.examples, reasons=True))
    say(f"-> {path}")
    return path
