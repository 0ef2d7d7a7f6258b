r"""The record of a ``compare --held-out --transfer`` run, row by row, and its tables.

    python benchmarks/slices.py DATA --out S
    neuronselect compare --pool S/pool_1000.jsonl --model SMOLLM2 --sae auto --dtype bfloat16 --max-length 512 --ratio 0.05 \
        --methods mona,nait-contrast,less,gist --target gsm8k=S/targets/gsm8k.jsonl ... --held-out gsm8k=S/held_out/gsm8k.jsonl ... \
        --train max_steps=25 --train per_device_train_batch_size=2 --train max_length=512 --train dtype=bfloat16 --transfer --out RUN
    python benchmarks/transfer.py RUN --out benchmarks/transfer_smollm2.json

What counts as shown was fixed before the run, by the warnings of ``compare`` (``hf_neuronselect/pipelines/trained.py``): training
helped if the 95 % interval of the change of the loss lies below 0, and more than random rows did if that of the difference
does. Whether picks are for their own target is told for each measured target by itself, since the size of a change differs between
targets: the change by its own picks minus the mean change by those for other targets. (Fixed before the run was the mean over
targets; it is dominated by mmlu, as was seen afterwards.) Intervals draw held-out rows again; arms are compared on the same draws.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, write_json

from hf_neuronselect.pipelines.trained import RowLosses, ends_of, own_gains, resampled_changes

CONTROLS = ("random", "longest", "matched-random", "lowest")
FORM = "{:+.3f} ({:+.3f} to {:+.3f})"
Key = tuple[str, str, str, int]


def record_of(run: Path) -> dict[str, Any]:
    """What ``compare`` kept of its trainings."""
    steps = json.loads((run / "trained" / "run.json").read_text(encoding="utf-8"))["steps"]
    trained = []
    for name, step in steps.items():
        arm, target, seed = re.fullmatch(r"(.+) on (.+), seed (\d+)", name).groups()  # type: ignore[union-attr]
        result = step["result"]
        rows = {at: [np.round(before, 3).tolist(), np.round(after, 3).tolist(), [int(one) for one in tokens]]
                for at, (before, after, tokens) in result["by_row"].items()}  # fmt: skip
        told = {key: result[key] for key in ("answers", "accuracy", "accuracy_untouched", "checked")}
        trained.append({"arm": arm, "picked_for": target, "seed": int(seed), **told, "by_row": rows})
    return {"machine": machine(torch.device("cpu")), "trained": trained}


def losses_of(record: Mapping[str, Any]) -> dict[Key, RowLosses]:
    """Held-out rows by (arm, target of the picks, measured target, seed)."""
    return {
        (one["arm"], one["picked_for"], at, one["seed"]): RowLosses(*map(np.asarray, rows))
        for one in record["trained"]
        for at, rows in one["by_row"].items()
    }


def as_markdown(record: Mapping[str, Any]) -> list[str]:
    """The tables: change of the loss at each target, the same against random rows, and what picks do for other targets."""
    by_row = losses_of(record)
    arms = list(dict.fromkeys(arm for arm, *_ in by_row))
    targets = list(dict.fromkeys(of for _, of, *_ in by_row))

    def runs(arm: str, picked_for: str, at: str) -> list[RowLosses]:
        return [run for (a, p, t, _), run in by_row.items() if (a, p, t) == (arm, picked_for, at)]

    def told(ofs: list[RowLosses], minus: list[RowLosses] | None = None) -> str:
        """A change, or what it has above that by other rows, with its interval."""
        value, draws = np.mean([run.change for run in ofs]), resampled_changes(ofs)
        if minus is not None:
            value, draws = value - np.mean([run.change for run in minus]), draws - resampled_changes(minus)
        return FORM.format(value, *ends_of(draws))

    changes = np.asarray([[np.mean([run.change for run in runs(arm, of, of)]) for of in targets] for arm in arms])
    places = (changes[:, None] > changes[None]).sum(axis=1).mean(axis=1)  # the size of a change differs between targets

    head, line = " | ".join(targets), "--:|" * len(targets)
    lines = [f"| trained on | {head} |", f"|---|{line}"]
    before = [np.mean([run.before.sum() / run.tokens.sum() for run in runs(arms[0], of, of)]) for of in targets]
    lines.append(f"| nothing: the loss itself | {' | '.join(f'{one:.3f}' for one in before)} |")
    order = [arms[i] for i in np.argsort(places, kind="stable")]
    for arm in order:
        lines.append(f"| {arm} | {' | '.join(told(runs(arm, of, of)) for of in targets)} |")
    lines += ["", f"| minus random rows | {head} |", f"|---|{line}"]
    for arm in order:
        if arm != "random":
            cells = [told(runs(arm, of, of), runs("random", of, of)) for of in targets]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", f"| picks for | {' | '.join(f'at {of}' for of in targets)} |", f"|---|{line}"]
    for arm in order:
        if arm.startswith(CONTROLS):
            continue
        for i, of in enumerate(targets):
            cells = [f"{np.mean([run.change for run in runs(arm, of, at)]):+.3f}" for at in targets]
            cells[i] = f"**{cells[i]}**"
            lines.append(f"| {arm}: {of} | {' | '.join(cells)} |")
        gains = own_gains(by_row, arm)
        lines.append(f"| {arm}: own minus others | {' | '.join(FORM.format(*gains[at]) for at in targets)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that compare wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_json(args.out, record_of(args.run))


if __name__ == "__main__":
    main()
