"""Show which latents two targets use, and on which tokens a latent fires."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from ..signals.columns import SparseRows

COLOURS = ("#1f6feb", "#d4572a")


def _dense(rows: SparseRows, width: int) -> np.ndarray:
    table = np.zeros((len(rows), width), dtype=np.float32)
    for i in range(len(rows)):
        indices, values = rows.row(i)
        table[i, indices] = values
    return table


def activation_profiles(panels: Mapping[str, Mapping[str, SparseRows]], *, units: int = 80, samples: int = 24) -> bytes:
    """Plot activation profiles of two targets, a panel per kind of unit (as in figure 4 of the MoNA paper).

    Args:
        panels: panel title -> {target -> activations of its exemplars}, for two targets.
        units: number of units shown, the most active ones, ordered by the target they favour.
        samples: number of exemplars drawn as faint lines; the bold line is the mean over all.

    Returns:
        A PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 3.1 * len(panels)), dpi=110, layout="constrained")
    for axis, (title, targets) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        width = 1 + max(int(rows.indices.max(initial=0)) for rows in targets.values())
        tables = {name: _dense(rows, width) for name, rows in targets.items()}
        means = np.stack([table.mean(axis=0) for table in tables.values()])
        shown = np.argsort(-means.max(axis=0), kind="stable")[:units]
        shown = shown[np.argsort(means[1, shown] - means[0, shown], kind="stable")]
        for colour, (name, table) in zip(COLOURS, tables.items(), strict=True):
            for line in table[:samples]:
                axis.plot(line[shown], color=colour, alpha=0.12, linewidth=0.7)
            axis.plot(table[:, shown].mean(axis=0), color=colour, linewidth=2.2, label=name)
        union = np.maximum(means[0], means[1]).sum()
        overlap = np.minimum(means[0], means[1]).sum() / union if union else 0.0
        axis.set_title(f"{title}: overlap of the two means (Jaccard) {overlap:.2f}", loc="left", fontsize=11)
        axis.set_xlabel(f"the {len(shown)} most active units, ordered by the target they favour", fontsize=9)
        axis.set_ylabel("mean activation", fontsize=9)
        axis.set_ylim(0, float(np.percentile(np.concatenate([t[:, shown] for t in tables.values()]), 99.5)) * 1.05 or 1)
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper center", ncols=2)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    pyplot.close(figure)
    return out.getvalue()
