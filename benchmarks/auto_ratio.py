"""Is `--ratio auto` nearer to the best ratio than a fixed 5 % or 10 %? Regret of each proxy, the estimate and short runs.

    python benchmarks/auto_ratio.py DATA --work FOLDER --out benchmarks/auto_ratio.json
    python benchmarks/auto_ratio.py DATA --work FOLDER --targets bbh,mmlu,humaneval --seeds 1 --no-halving
        --out benchmarks/auto_ratio_more.json

One method (mona) and the bundled model on 1,000 random rows of the pool. Every ratio is trained with the same number of
steps on packed rows of one length: that is what a run costs, and the length of training is not confounded with the ratio.
Larger shares are then seen in part, small ones several times. What was fixed before the first run:

* The regret of a ratio is its held-out loss minus the smallest of the fixed ratios', means over seeds. An estimate between
  two fixed ratios has the loss interpolated on log(ratio).
* Half of the held-out rows (validation) is read by the halving alone; every regret is of the other half (test).
* Halving: every ratio gets a quarter of the steps with the first seed; the best third of them all steps; the best of these
  by validation loss is taken.
* "a ratio at random" is the mean regret of the fixed ratios.
* An estimate is worth its name if its mean regret over the targets is below that of 5 %, of 10 % and of a ratio at random. The
  interval of its difference to 5 % is over resampled test rows.

Added later, and fixed before these were trained: beside the picks of every ratio stand as many random rows (drawn anew for each
seed), the longest rows, and the untouched model. Picks are better than random rows if the interval of the difference, over
resampled test rows, is below 0.

Each finished run is added to the output, and is not repeated when the script is started again; on another machine, one run is
repeated to see what that changes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, write_json
from datasets import Dataset

from hf_neuronselect import NeuronSelector
from hf_neuronselect.models.loss import answer_losses
from hf_neuronselect.pipelines import bundled
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.rows.load import conversations_of, load_rows
from hf_neuronselect.store.store import FeatureStore, write_store
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.evaluation import without_trained
from hf_neuronselect.training.models import adapted, adapter_source, base_source, load_for_evaluation, load_tokenizer
from hf_neuronselect.training.sft import train_adapter

RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # 2 % are 20 rows
STEPS = 16
POOL = 1000
LONGEST, HELD_OUT = 330, 8_000  # tokens of a held-out row, and of all of a target's
SETTINGS = {
    "packing": True, "max_length": 512, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
    "attn_implementation": "eager", "lora_dropout": 0.0, "lora_r": 16, "lora_alpha": 32, "save_strategy": "no",
    "logging_steps": 10, "disable_tqdm": True, "learning_rate": 3e-3,  # the rate that sft.py chose on random rows
}  # fmt: skip
FIXED, PAPERS, BOOTSTRAP = "fixed {:.0%}", (0.05, 0.1), 2000
CONTROLS = ("random rows", "longest rows")
AGAIN = " again"

logger = logging.getLogger("auto_ratio")


class Lab:
    """Trains on rows and measures held-out answers; finished runs are in ``state``."""

    def __init__(
        self, pool: Dataset, held_out: Mapping[str, list[Conversation]], state: dict[str, Any], out: Path
    ) -> None:
        self.pool, self.held_out, self.state, self.out = pool, held_out, state, out
        self.base = base_source(None)
        self.model, self.tokenizer = (
            load_for_evaluation(self.base, "auto", "cpu", None),
            load_tokenizer(self.base, None),
        )

    def nll(self, model: Any, target: str, halves: str) -> dict[str, list[float]]:
        """Nats of each held-out row: of validation (even rows), test (odd rows), or both."""
        found = {}
        for half in halves.split():
            rows = self.held_out[target][half == "test" :: 2]
            loss = answer_losses(model, self.tokenizer, rows)
            found[half] = [round(value, 4) for value in loss.nll.tolist()]
            self.state["tokens"].setdefault(target, {})[half] = loss.tokens.tolist()
        return found

    def run(
        self, key: str, indices: np.ndarray, steps: int, seed: int, targets: Sequence[str], halves: str
    ) -> dict[str, Any]:
        """Train, and measure the targets."""
        if key not in self.state["runs"]:
            folder, started = Path(tempfile.mkdtemp(prefix="auto-ratio-")), time.perf_counter()
            config = TrainConfig.from_section(SETTINGS | {"max_steps": steps, "seed": seed})
            rows = conversations_of(self.pool.select(indices).flatten_indices())
            record = train_adapter(rows, folder / "adapter", config)
            with adapted(self.model, adapter_source(str(folder / "adapter"), None), "run") as tuned:
                found = {target: self.nll(tuned, target, halves) for target in targets}
            shutil.rmtree(folder)
            seconds = round(time.perf_counter() - started, 1)
            self.state["runs"][key] = {"rows": len(indices), "tokens_a_pass": record.results["tokens"], "seconds": seconds,
                                       "nll": found}  # fmt: skip
            self.out.write_text(json.dumps(self.state, indent=1) + "\n")
            logger.info("%s: %.0f s", key, seconds)
        return self.state["runs"][key]


def held_out_rows(data: Path, target: str, pool: Dataset, tokenizer: Any) -> list[Conversation]:
    """Random rows of a target that the pool does not hold, of at most 330 tokens, up to 8,000 tokens."""
    rows, _ = without_trained(load_rows(str(data / "eval" / f"{target}.jsonl.gz")).data, [pool])
    talks, found, total = conversations_of(rows), [], 0
    for i in np.random.default_rng(0).permutation(len(talks)):
        length = len(tokenizer(talks[i].content())["input_ids"])
        if length <= LONGEST and total + length <= HELD_OUT:
            found.append(talks[i])
            total += length
    return found


def key_of(target: str, ratio: float, seed: int, steps: int) -> str:
    """A run's name: whose rows. All rows are the same for every target and control."""
    return f"{'all targets' if ratio == 1 else target} {ratio:g} seed {seed} steps {steps}"


def loss(state: Mapping[str, Any], target: str, key: str, half: str, rows: np.ndarray | None = None) -> float:
    """Nats per answer token; of resampled rows, if they are given."""
    nll, tokens = np.asarray(state["runs"][key]["nll"][target][half]), np.asarray(state["tokens"][target][half])
    known = np.arange(len(nll)) if rows is None else rows
    known = known[tokens[known] > 0]
    return float(nll[known].sum() / tokens[known].sum())


def test_losses(
    state: Mapping[str, Any], target: str, rows: np.ndarray | None = None, of: str | None = None
) -> np.ndarray:
    """Mean over seeds, of each fixed ratio: of the target's picks, or of a control's rows."""
    return np.asarray(
        [
            np.mean([loss(state, target, key_of(of or target, r, s, STEPS), "test", rows) for s in state["seeds"]])
            for r in RATIOS
        ]
    )


def controls(state: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Losses of the untouched model, and of random and longest rows by ratio; and the picks' loss minus the random rows'."""
    nll, tokens = (np.asarray(of[target]["test"]) for of in (state["untouched"], state["tokens"]))
    shares = [f"{r:g}" for r in RATIOS]
    found: dict[str, Any] = {"untouched": round(float(nll[tokens > 0].sum() / tokens.sum()), 4)}
    for control in CONTROLS:
        found[control] = dict(zip(shares, test_losses(state, target, of=control).round(4).tolist(), strict=True))
    draw = np.random.default_rng(0)
    drawn = [draw.integers(0, len(nll), len(nll)) for _ in range(BOOTSTRAP)]
    gains = [test_losses(state, target, rows) - test_losses(state, target, rows, of=CONTROLS[0]) for rows in drawn]
    low, high = np.quantile(gains, (0.05, 0.95), axis=0)
    mean = test_losses(state, target) - test_losses(state, target, of=CONTROLS[0])
    found["minus random"] = {share: {"mean": round(float(m), 4), "5%": round(float(a), 4), "95%": round(float(b), 4)}
                             for share, m, a, b in zip(shares, mean, low, high, strict=True) if share != "1"}  # fmt: skip
    return found


def at(losses: np.ndarray, ratio: float) -> float:
    """Interpolated on log(ratio)."""
    return float(np.interp(math.log(ratio), np.log(RATIOS), losses))


def halved(state: Mapping[str, Any], target: str) -> float:
    """The ratio that halving takes."""
    left = list(RATIOS)
    for steps in (STEPS // 4, STEPS):
        by_loss = sorted(
            left, key=lambda r: loss(state, target, key_of(target, r, state["seeds"][0], steps), "validation")
        )
        left = by_loss[: math.ceil(len(left) / 3)]
    return left[0]


def summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """Regrets of every way to a ratio, and how they compare with 5 %."""
    found: dict[str, Any] = {"losses": {}, "chosen": {}, "regret": {}, "minus 5%": {}, "seed to seed": {}}
    found["controls"] = {target: controls(state, target) for target in state["targets"]}
    found["repeated"] = {
        key: round(abs(loss(state, key.split()[0], key, "test") - loss(state, key.split()[0], key + AGAIN, "test")), 4)
        for key in state["runs"]
        if key + AGAIN in state["runs"]
    }
    for target in state["targets"]:
        losses = test_losses(state, target)
        found["losses"][target] = dict(zip([f"{r:g}" for r in RATIOS], losses.round(4).tolist(), strict=True))
        pairs = [[loss(state, target, key_of(target, r, s, STEPS), "test") for s in state["seeds"]] for r in RATIOS]
        found["seed to seed"][target] = round(float(np.mean([max(of) - min(of) for of in pairs])), 4)
        auto = state["auto"][target]
        ways = {**auto["estimates"], "auto": auto["ratio"]}
        if state["halving"]:
            ways["halving"] = halved(state, target)
        found["chosen"][target] = ways | {"best": RATIOS[int(losses.argmin())]}
        regret = {name: at(losses, ratio) for name, ratio in ways.items()}
        regret |= {FIXED.format(ratio): at(losses, ratio) for ratio in PAPERS}
        regret["at random"] = float(losses.mean())
        for name, value in regret.items():
            found["regret"].setdefault(name, {})[target] = round(value - float(losses.min()), 4)
    whole = {name: of for name, of in found["regret"].items() if set(of) == set(state["targets"])}
    for of in whole.values():
        of["mean"] = round(float(np.mean(list(of.values()))), 4)
    draw = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(BOOTSTRAP):
        gains: dict[str, list[float]] = {}
        for target in state["targets"]:
            n = len(state["tokens"][target]["test"])
            losses = test_losses(state, target, draw.integers(0, n, n))
            for name in whole:
                if not name.startswith(("fixed 5", "at random")):
                    ratio = PAPERS[1] if name.startswith("fixed") else found["chosen"][target][name]
                    gains.setdefault(name, []).append(at(losses, ratio) - at(losses, PAPERS[0]))
            gains.setdefault("at random", []).append(float(losses.mean()) - at(losses, PAPERS[0]))
        for name, values in gains.items():
            drawn.setdefault(name, []).append(float(np.mean(values)))
    found["minus 5%"] = {
        name: {"mean": round(float(np.mean(values)), 4), "5%": round(float(np.quantile(values, 0.05)), 4),
               "95%": round(float(np.quantile(values, 0.95)), 4)}
        for name, values in drawn.items()
    }  # fmt: skip
    rivals = [whole[name]["mean"] for name in (*map(FIXED.format, PAPERS), "at random")]
    found["worth its name"] = [name for name, of in whole.items()
                               if not name.startswith(("fixed", "at random")) and of["mean"] < min(rivals)]  # fmt: skip
    return found


def as_markdown(state: Mapping[str, Any]) -> list[str]:
    """Losses by ratio beside the controls', how far picks are below random rows, then regrets."""
    found = state["summary"]
    lines = [
        "| held-out loss at | untouched | " + " | ".join(f"{r:.0%}" for r in RATIOS) + " | seed to seed |",
        "|---|" + "--:|" * (len(RATIOS) + 2),
    ]
    for target, losses in found["losses"].items():
        best = min(losses.values())
        cells = [f"**{value:.3f}**" if value == best else f"{value:.3f}" for value in losses.values()]
        apart = f"{found['seed to seed'][target]:.3f}" if len(state["seeds"]) > 1 else ""
        beside = found["controls"][target]
        lines.append(f"| {target} | {beside['untouched']:.3f} | {' | '.join(cells)} | {apart} |")
        for control in CONTROLS:
            cells = [f"{value:.3f}" if share != "1" else "" for share, value in beside[control].items()]
            lines.append(f"| {target}, {control} | | {' | '.join(cells)} | |")
    lines += ["", "| picks minus random rows | " + " | ".join(f"{r:.0%}" for r in RATIOS[:-1]) + " |",
              "|---|" + "--:|" * (len(RATIOS) - 1)]  # fmt: skip
    for target in state["targets"]:
        gains = found["controls"][target]["minus random"].values()
        cells = [f"{one['mean']:+.3f} ({one['5%']:+.3f} to {one['95%']:+.3f})" for one in gains]
        lines.append(f"| {target} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| regret | {' | '.join(state['targets'])} | mean | mean minus 5 % (5–95 %) |",
        "|---|" + "--:|" * (len(state["targets"]) + 2),
    ]
    for name, of in sorted(found["regret"].items(), key=lambda one: one[1].get("mean", math.inf)):
        chosen = [found["chosen"][target].get(name) for target in state["targets"]]
        cells = [
            "" if t not in of else f"{of[t]:.3f}" + (f" ({c:.1%})" if c else "")
            for t, c in zip(state["targets"], chosen, strict=True)
        ]
        gain = found["minus 5%"].get(name)
        told = "" if gain is None else f"{gain['mean']:+.3f} ({gain['5%']:+.3f} to {gain['95%']:+.3f})"
        mean = f"{of['mean']:.3f}" if "mean" in of else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} | {told} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the pool's signals")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "auto_ratio.json")
    parser.add_argument("--targets", default="gsm8k,mbpp,xquad,tydiqa")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--no-halving", action="store_true", help="no trainings for a quarter of the steps")
    args = parser.parse_args()
    targets, seeds = args.targets.split(","), list(range(args.seeds))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    started = time.perf_counter()

    whole = load_rows(str(args.data / "pool.jsonl.gz"))
    drawn = np.sort(np.random.default_rng(0).permutation(len(whole.data))[:POOL])
    pool = whole.data.select(drawn).flatten_indices()
    extractor = bundled.extractor(features=("mona",))
    write_store(pool, extractor, args.work / "store", pool_about={}, shard_rows=100)
    store = FeatureStore(args.work / "store")
    state: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}, "tokens": {}, "auto": {}}
    )
    here = machine(torch.device("cpu"))
    elsewhere = state.setdefault("machine", here)["cpu"] != here["cpu"]
    if elsewhere:
        state["other machine"] = here
    state |= {"pool": whole.about, "rows": POOL, "ratios": RATIOS, "steps": STEPS,
              "tokens_a_step": 512, "seeds": seeds, "targets": targets, "halving": not args.no_halving, "settings": SETTINGS}  # fmt: skip

    selections = {}
    for target in targets:
        exemplars = load_rows(str(args.data / "targets" / f"{target}.jsonl.gz")).data
        selector = NeuronSelector("mona").fit({target: exemplars}, extractor=extractor)
        selections[target] = selector.select(pool, ratio="auto", features=store)
        auto = selections[target].provenance.auto
        state["auto"][target] = {"ratio": auto.ratio, "estimates": auto.estimates, "absent": auto.absent,
                                 "shares": auto.shares, "curves": auto.curves}  # fmt: skip
        logger.info("%s: %s", target, auto.line)
    subsets = {(t, r): selections[t].rethreshold(ratio=r).indices for t in targets for r in RATIOS}
    every = np.asarray(sorted(set.intersection(*(set(subsets[t, 1.0].tolist()) for t in targets))))
    lengths = selections[targets[0]].scores.column("n_tokens").to_numpy()[every]
    longest = every[np.argsort(-lengths, kind="stable")]

    tokenizer = load_tokenizer(base_source(None), None)
    lab = Lab(pool, {t: held_out_rows(args.data, t, pool, tokenizer) for t in targets}, state, args.out)
    state["untouched"] = {t: lab.nll(lab.model, t, "test") for t in targets}
    for seed in seeds:
        for steps in (STEPS // 4, STEPS) if seed == 0 and state["halving"] else (STEPS,):
            for ratio in RATIOS:
                halves = "validation" if steps < STEPS else "validation test" if seed == 0 else "test"
                if ratio == 1:
                    lab.run(key_of("", ratio, seed, steps), every, steps, seed, targets, halves)
                    continue
                for target in targets:
                    lab.run(key_of(target, ratio, seed, steps), subsets[target, ratio], steps, seed, [target], halves)
        for ratio in RATIOS[:-1]:
            random = np.random.default_rng(seed).permutation(every)
            for control, rows in zip(CONTROLS, (random, longest), strict=True):
                taken = rows[: len(subsets[targets[0], ratio])]
                lab.run(key_of(control, ratio, seed, STEPS), taken, STEPS, seed, targets, "test")
    if elsewhere:
        key = key_of(targets[0], PAPERS[0], seeds[0], STEPS)
        lab.run(key + AGAIN, subsets[targets[0], PAPERS[0]], STEPS, seeds[0], targets[:1], "test")
    state["summary"] = summary(state)
    state["minutes"] = state.get("minutes", 0) or round((time.perf_counter() - started) / 60, 1)
    write_json(args.out, state)
    for line in as_markdown(state):
        logger.info(line)
    logger.info("worth its name: %s", ", ".join(state["summary"]["worth its name"]) or "none")


if __name__ == "__main__":
    main()
