"""Table and picture of benchmarks/sft.json: ``python benchmarks/sft_report.py`` prints Markdown and writes sft.png."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import typer

from hf_neuronselect.training.figures import results_figure

HERE = Path(__file__).parent
ARMS = ("mona", "nait", "random", "mona, lowest", "full")


def main() -> None:
    state = json.loads((HERE / "sft.json").read_text())
    runs: dict[tuple[str, str], list[dict]] = {}
    for key, found in state["runs"].items():
        if match := re.fullmatch(r"(\w+) (.+) seed \d+", key):
            runs.setdefault((match[1], match[2]), []).append(found)
    targets = [t for t in dict.fromkeys(target for target, _ in runs) if t != "rate"]
    rows = []
    for target in targets:
        typer.echo(f"\n{target}: loss on held-out answers, nats a token (lower is better)\n")
        typer.echo("| trained on | loss, mean | by seed | against random | rows | answers' share of the tokens |")
        typer.echo("|---|--:|---|--:|--:|--:|")
        base = np.mean([found["base"][target] for arm in ARMS for found in runs.get((target, arm), [])])
        rows.append({"model": "base", "data": target, "value": float(base)})
        typer.echo(f"| nothing (base) | {base:.3f} | | | | |")
        random = np.mean([found["losses"][target] for found in runs[target, "random"]])
        for arm in ARMS:
            found = runs.get((target, arm), [])
            losses = [run["losses"][target] for run in found]
            if not losses:
                continue
            rows += [{"model": arm, "data": target, "value": loss} for loss in losses]
            shares = np.mean([run["answer_share"] for run in found])
            each = ", ".join(f"{loss:.3f}" for loss in losses)
            typer.echo(
                f"| {arm} | {np.mean(losses):.3f} | {each} | {np.mean(losses) - random:+.3f} | {found[0]['rows']:,} "
                f"| {shares:.2f} |"
            )
    (HERE / "sft.png").write_bytes(results_figure(rows))


if __name__ == "__main__":
    typer.run(main)
