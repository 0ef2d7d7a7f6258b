"""Report benchmarks/sft.json: ``python benchmarks/sft_report.py`` prints a Markdown table and writes sft.png."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import typer

from hf_neuronselect.training.figures import results_figure

HERE = Path(__file__).parent
ARMS = ("mona", "nait", "random", "longest", "mona, lowest", "full")


def main() -> None:
    state = json.loads((HERE / "sft.json").read_text())
    runs: dict[tuple[str, str], list[dict]] = {}
    for key, run in state["runs"].items():
        if (match := re.fullmatch(r"(\w+) (.+) seed \d+", key)) and match[1] != "rate":
            runs.setdefault((match[1], match[2]), []).append(run)
    targets = list(dict.fromkeys(target for target, _ in runs))
    rows, lines = [], []
    for target in targets:
        found = [run["base"][target] for arm in ARMS for run in runs.get((target, arm), [])]
        rows.append({"model": "base", "data": target, "value": float(np.mean(found))})
    bases = " ".join(f"{row['value']:.3f} | |" for row in rows)
    lines.append(f"| nothing (base) | | {bases}")
    for arm in ARMS:
        line = [arm, f"{runs[targets[0], arm][0]['rows']:,}"]
        for target in targets:
            losses = [run["losses"][target] for run in runs.get((target, arm), [])]
            rows += [{"model": arm, "data": target, "value": loss} for loss in losses]
            share = np.mean([run["answer_share"] for run in runs[target, arm]])
            line += [f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})", f"{share:.2f}"]
        lines.append(f"| {' | '.join(line)} |")
    columns = [f"{target} | answers' share" for target in targets]
    typer.echo(f"| trained on | rows | {' | '.join(columns)} |")
    typer.echo(f"|---|{'--:|' * (1 + 2 * len(targets))}")
    for line in lines:
        typer.echo(line)
    (HERE / "sft.png").write_bytes(results_figure(rows))


if __name__ == "__main__":
    typer.run(main)
