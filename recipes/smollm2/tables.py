"""The tables of this folder's README, from figures.json: ``python recipes/smollm2/tables.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHIPPED = "20M of instructions"
ROWS = {
    "random": "random, mean of 20 draws",
    "random, 95th percentile": "random, 95th percentile",
    "longest": "longest",
    "hidden": "hidden, same block",
    "hidden, pool mean taken off": "hidden, pool mean taken off",
    f"{SHIPPED}: mona": "**MoNA with this SAE**",
    f"{SHIPPED}: mona, weighted by rarity": "MoNA, features weighted by rarity",
}


def precision(found: dict[str, Any], rows: str) -> list[str]:
    """Share of related sources by method and target, on one set of rows."""
    table = found["precision"][rows]
    targets = list(table["random"])
    lines = [f"| | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
    return lines + [
        f"| {name} | {' | '.join(f'{table[method][target]:.3f}' for target in targets)} |"
        for method, name in ROWS.items()
    ]


def tokens(found: dict[str, Any]) -> list[str]:
    """SAEs trained on other tokens."""
    lines = [
        "| trained on | FVU | loss with it | single latents' AUC | MoNA, 9,896 rows | MoNA, unseen rows |",
        "|---|---|---|---|---|---|",
    ]
    in_order = sorted(found["saes"].items(), key=lambda one: ("all texts" not in one[0], int(one[0].split("M")[0])))
    for name, sae in in_order:
        mona = [found["precision"][rows][f"{name}: mona"]["average"] for rows in ("sample", "unseen")]
        figures = [sae["fvu"], sae["loss_with_sae"], sae["single_latents_mean"], *mona]
        lines.append(f"| {name} | {' | '.join(f'{one:.3f}' for one in figures)} |")
    return lines


def tables(folder: Path) -> list[str]:
    """All tables as Markdown."""
    found = json.loads((folder / "figures.json").read_text())
    return ["\n".join(lines) for lines in (precision(found, "sample"), precision(found, "unseen"), tokens(found))]


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(tables(Path(__file__).parent)) + "\n")
