"""Plot the results of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..explain.pictures import COLOURS

BASE = "base"


def results_figure(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot held-out loss by model, a panel per data set: a dot per run, a bar at the mean, a line at the base model.

    Args:
        rows: ``{"model", "data", "value"}``; several rows of a model and data set are different seeds.

    Returns:
        A PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(row["data"] for row in rows))
    models = [name for name in dict.fromkeys(row["model"] for row in rows) if name != BASE] or [BASE]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 1.4 + 0.48 * len(models)), dpi=110, layout="constrained"
    )
    for axis, data in zip(np.atleast_1d(axes), panels, strict=True):
        values = {
            name: [row["value"] for row in rows if (row["model"], row["data"]) == (name, data)]
            for name in (BASE, *models)
        }
        for place, name in enumerate(models):
            found = values[name]
            if not found:
                continue
            mean = float(np.mean(found))
            axis.plot(found, [place] * len(found), "o", color=COLOURS[0], alpha=0.45, markersize=6)
            axis.plot([mean, mean], [place - 0.3, place + 0.3], color=COLOURS[0], linewidth=2.4)
            axis.annotate(
                f"{mean:.3f}", (mean, place - 0.3), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
        if values[BASE]:
            axis.axvline(float(np.mean(values[BASE])), color=COLOURS[1], linestyle="--", linewidth=1.2)
            axis.annotate(
                f"base {np.mean(values[BASE]):.3f}", (float(np.mean(values[BASE])), 1), (4, -2),
                xycoords=("data", "axes fraction"), textcoords="offset points", color=COLOURS[1], fontsize=8, va="top",
            )  # fmt: skip
        axis.set_yticks(range(len(models)), models)
        axis.set_ylim(len(models) - 0.4, -0.8)
        axis.margins(x=0.18)
        axis.set_title(data, loc="left", fontsize=11)
        axis.set_xlabel("loss on held-out answers, nats a token (left is better)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    pyplot.close(figure)
    return out.getvalue()
