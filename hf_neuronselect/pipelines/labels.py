"""Label the features of a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from ..core.errors import NeuronSelectError
from ..core.options import AUTO, ExtractionOptions
from ..core.sae_configs import SaeLabelConfig
from ..explain.labels import Labels, check_labels_file, labels_path, make_labels
from ..rows.formats import Conversation, read_row, row_format
from ..rows.load import load_rows
from ..signals.activations import Mona
from .parts import Say, extractor_of, quiet


def label_sae(config: SaeLabelConfig, *, say: Say = quiet, note: Say = quiet) -> Labels:
    """Label an SAE's features from random rows of a pool, and keep the labels where ``explain`` finds them.

    Raises:
        NeuronSelectError: bad input, or no row can be read.
    """
    if config.out is not None:
        check_labels_file(config.out)
    rows = load_rows(config.pool)
    assert isinstance(rows.data, Dataset)
    bundled = config.model is None and config.sae == AUTO
    options = ExtractionOptions(
        model=config.model, revision=config.revision, sae=None if bundled else config.sae, sae_revision=config.sae_revision,
        layer=config.layer, max_length=config.max_length, dtype=config.dtype, device=config.device,
    )  # fmt: skip
    extractor = extractor_of(options, (Mona(),), note)
    about = {
        "pool": rows.source.id,
        "pool_commit": rows.source.commit,
        "max_length": config.max_length,
        "seed": config.seed,
    }
    found = make_labels(extractor, _shuffled(rows.data, config.seed), tokens=config.tokens, about=about)
    if not found.found:
        raise NeuronSelectError("too few to label any feature; give more rows, or read more tokens", option="tokens",
                                value=config.tokens)  # fmt: skip
    sae = extractor.extraction.sae
    assert sae is not None
    path = config.out or labels_path(sae)
    found.save(path)
    auc = np.asarray([label.auc for label in found.found.values()])
    say(
        f"{len(auc):,} features labelled from {found.about['tokens']:,} tokens; how well a label predicts where its feature "
        f"fires (AUC on held-out rows): median {np.median(auc):.2f}, {np.mean(auc >= 0.8):.0%} of them at least 0.80 -> {path}"
    )
    return found


def _shuffled(data: Dataset, seed: int) -> Iterator[Conversation]:
    """All rows in a random order, read as they are asked for."""
    fmt = row_format(data.column_names)
    texts = data.with_format(None).select_columns(fmt.used)
    order = np.random.default_rng(seed).permutation(len(data))
    return (read_row(row, fmt) for row in texts.select(order))
