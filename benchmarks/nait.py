"""Readings of NAIT, its contrast, and hidden states and MoNA against the pool, on one model: which rows they pick.

    python benchmarks/nait.py --data DATA --model MODEL --label smollm2 --rows 4000 --dtype bfloat16 --max-length 768 \
        --work WORK [--sae SAE] [--no-system]

Precision is the share of a target's related sources (``related_sources.json``, fixed before the first run) in the picked
5 % and 10 % of a seeded random sample of the pool, or of the whole pool without ``--rows``. Beside every reading stand
20 random draws and the longest rows. Signals go to a store under WORK that is finished if a run breaks off. The record
is ``benchmarks/nait_LABEL.json``; ``python benchmarks/nait.py --tables`` prints all records as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, plain_logging, write_json
from datasets import Dataset, disable_progress_bars

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.selection.selection import Selection
from hf_neuronselect.signals.base import digest
from hf_neuronselect.store.store import FeatureStore, write_store

logger = logging.getLogger("benchmarks.nait")
HERE = Path(__file__).parent
RATIOS, DRAWS, SEED = (0.05, 0.10), 20, 0
PAPER = {"reading": "paper"}
READINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "longest": ("longest", {}),
    "hidden": ("hidden", {}),
    "hidden, centre=pool": ("hidden", {"centre": "pool"}),
    "rds-plus": ("rds-plus", {}),
    "rds-plus, exemplars=mean": ("rds-plus", {"picker": "best-first"}),
    "nait (preset: content ends, svd)": ("nait", {}),
    "candidate=last": ("nait", {"candidate": "last"}),
    "candidate=mean": ("nait", {"candidate": "mean"}),
    "normalize=true": ("nait", {"normalize": True}),
    "direction=pca": ("nait", {"direction": "pca"}),
    "direction=mean": ("nait", {"direction": "mean"}),
    "ends=answer": ("nait", {"ends": "answer"}),
    "ends=template": ("nait", {"ends": "template"}),
    "reading=paper": ("nait", PAPER),
    "reading=paper, candidate=mean": ("nait", {**PAPER, "candidate": "mean"}),
    "reading=paper, candidate=last": ("nait", {**PAPER, "candidate": "last"}),
    "nait-contrast": ("nait-contrast", {}),
}
OF_SAE: dict[str, tuple[str, dict[str, Any]]] = {
    "mona": ("mona", {}),
    "mona, centre=pool": ("mona", {"centre": "pool"}),
    "mona, cosine": ("mona", {"metric": "cosine"}),
}
BOLD = {"nait (preset: content ends, svd)", "nait-contrast", "mona"}
SIGNALS = ("hidden", "rds_plus", "nait", "nait_answer", "nait_template", "nait_last", "nait_template_last", "nait_mean",
           "content_mean", "answer_mean")  # fmt: skip


def main() -> None:
    plain_logging(logger)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the records there are, and stop")
    parser.add_argument("--data", type=Path, help="pool.jsonl.gz and targets/")
    parser.add_argument("--model", default=None, help="default: the bundled model and SAE")
    parser.add_argument("--sae", default=None)
    parser.add_argument("--label", help="name of the record")
    parser.add_argument("--rows", type=int, default=None, help="random rows of the pool; default all")
    parser.add_argument("--among", type=int, default=None, help="measured: the rows of a run with so many --rows")
    parser.add_argument("--store", default=None, help="label of a run with the same options, whose signals are read")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-length", type=int, default=768)
    parser.add_argument("--pool-tokens", default="all")
    parser.add_argument("--no-system", action="store_true", help="without the system turn that the chat template adds")
    parser.add_argument("--work", type=Path, help="folder for the store of signals")
    args = parser.parse_args()
    if args.tables:
        for path in sorted(HERE.glob("nait_*.json")):
            for line in as_markdown(json.loads(path.read_text())):
                logger.info("%s", line)
        return
    disable_progress_bars()
    warnings.simplefilter("ignore", NeuronSelectWarning)
    pool = load_rows(str(args.data / "pool.jsonl.gz"))
    assert isinstance(pool.data, Dataset)
    rows, among = pool.data, np.ones(len(pool.data), dtype=bool)
    if args.rows is not None:
        order = np.random.default_rng(SEED).permutation(len(rows))[: args.rows]
        rows = rows.select(np.sort(order))
        among = np.isin(np.sort(order), order[: args.among])
    given: dict[str, Any] = {} if args.model is None else {"model": args.model, "dtype": args.dtype, "sae": args.sae}
    extractor = make_extractor(given, args)
    readings = READINGS | (OF_SAE if extractor.extraction.sae else {})
    signals = [*SIGNALS, *(["mona"] if extractor.extraction.sae else [])]
    extractor = extractor.with_features(signals)
    write_store(rows, extractor, args.work / (args.store or args.label), pool_about={})
    write_json(
        HERE / f"nait_{args.label}.json",
        measure(args, rows, among, FeatureStore(args.work / (args.store or args.label)), extractor, readings),
    )


def make_extractor(given: dict[str, Any], args: argparse.Namespace) -> NeuronFeatureExtractor:
    """The extractor; without a system turn if asked, as the template then renders rows that have none."""
    options = {**given, "max_length": args.max_length, "pool_tokens": args.pool_tokens}
    if args.model is None:
        from hf_neuronselect.core import bundled

        options |= {"model": str(bundled.MODEL), "sae": str(bundled.SAE)}
    made = NeuronFeatureExtractor.from_pretrained(features=["hidden"], **options)
    if not args.no_system:
        return made
    template = made.forward.tokenizer.chat_template
    start = template.index("{% if loop.first and messages[0]['role'] != 'system' %}")
    end = template.index("{% endif %}", start) + len("{% endif %}")
    return NeuronFeatureExtractor.from_pretrained(
        features=["hidden"], chat_template=template[:start] + template[end:], **options
    )


def measure(
    args: argparse.Namespace, rows: Dataset, among: np.ndarray, store: FeatureStore, extractor: NeuronFeatureExtractor,
    readings: dict[str, tuple[str, dict[str, Any]]],
) -> dict[str, Any]:  # fmt: skip
    related = json.loads((HERE / "related_sources.json").read_text())
    source = np.asarray(rows["source"])
    first = np.asarray([first_word(messages) for messages in rows["messages"]])
    found: dict[str, Any] = {
        "label": args.label, "model": extractor.extraction.spec.source.id, "rows": int(among.sum()), "dtype": args.dtype,
        "max_length": args.max_length, "pool_tokens": args.pool_tokens, "system_turn": not args.no_system,
        "machine": machine(torch.device("cpu")), "targets": {},
    }  # fmt: skip
    for target, sources in related.items():
        right = np.isin(source, sources)
        exemplars = load_rows(str(args.data / "targets" / f"{target}.jsonl.gz"), option="target").data
        featured = exemplars.map(
            extractor,
            batched=True,
            batch_size=100,
            cache_file_name=str(
                args.work / f"{args.store or args.label}-{target}-{digest(dict(extractor.identities))}.arrow"
            ),
        )
        random = [NeuronSelector("random", seed=seed) for seed in range(DRAWS)]
        table: dict[str, Any] = {"base rate": float(right[among].mean())}
        for ratio in RATIOS:
            shares = [share(one.select(rows, ratio=ratio, features=store), right, among, ratio) for one in random]
            table[f"random at {ratio:.0%}"] = {"mean": float(np.mean(shares)), "95th": float(np.percentile(shares, 95))}
        words = Counter(first_word(messages) for messages in exemplars["messages"])
        word, times = words.most_common(1)[0]
        table["first word"] = {"word": word, "share of exemplars": times / len(exemplars),
                               "share of pool": float((first == word).mean()),
                               "base rate of rows with other first words": float(right[among & ~np.isin(first, list(words))].mean())}  # fmt: skip
        for label, (method, options) in readings.items():
            try:
                selector = NeuronSelector(method, **options).fit({target: featured})
            except NeuronSelectError as error:  # answers of one token have no drift
                table[label] = {**dict.fromkeys((f"{ratio:.0%}" for ratio in RATIOS), 0.0), "refused": error.message}
                continue
            picks = {ratio: selector.select(rows, ratio=ratio, features=store) for ratio in RATIOS}
            record = picks[RATIOS[0]].provenance.targets.get(target)
            same = np.isin(first[picks[RATIOS[0]].indices], list(words))
            table[label] = {
                **{f"{ratio:.0%}": share(one, right, among, ratio) for ratio, one in picks.items()},
                "mean_tokens": picks[RATIOS[0]].provenance.tokens.selected_mean,
                "hit": record.hit if record else None,
                "picks with an exemplar's first word": float(same.mean()),
                "other first words at 5%": share(
                    picks[RATIOS[0]], right, among & ~np.isin(first, list(words)), RATIOS[0]
                ),
                "doubts": list(record.doubts) if record else [],
            }
        found["targets"][target] = table
        logger.info("%s: %s", target, {name: round(one["5%"], 3) for name, one in table.items() if name in readings})
    return found


def first_word(messages: list[dict[str, Any]]) -> str:
    """The first word of the first turn."""
    return ((messages[0]["content"] or "").split() or [""])[0]


def share(selection: Selection, right: np.ndarray, among: np.ndarray, ratio: float) -> float:
    """Precision of the first picks among some of the rows, in the order of a selection from all."""
    rank = selection.scores.column("rank").to_numpy(zero_copy_only=False)  # NaN: cannot be picked
    rows = np.flatnonzero(among & np.isfinite(rank))
    best = rows[np.argsort(rank[rows], kind="stable")[: round(ratio * int(among.sum()))]]
    return float(right[best].mean())


def as_markdown(record: dict[str, Any]) -> list[str]:
    """Precision at 5 % by target, with the averages at 5 % and 10 %."""
    targets = record["targets"]
    system = "" if record["system_turn"] else ", without the template's system turn"
    lines = [
        f"**{record['label']}** ({record['model']}, {record['rows']:,} rows cut at {record['max_length']} tokens, "
        f"{record['dtype']}, pooled tokens {record['pool_tokens']}{system})", "",
        "| | " + " | ".join(targets) + " | average | at 10 % | above random |",
        "|---|" + "--:|" * (len(targets) + 3),
    ]  # fmt: skip
    base = [one["base rate"] for one in targets.values()]
    lines.append(_line("whole pool", base, base, ""))
    for name in ("mean", "95th"):
        at5, at10 = ([one[f"random at {ratio}"][name] for one in targets.values()] for ratio in ("5%", "10%"))
        label = "random" if name == "mean" else "random, 95th percentile"
        lines.append(_line(label, at5, at10, ""))
    bars = [one["random at 5%"]["95th"] for one in targets.values()]
    for label in [name for name in next(iter(targets.values())) if name in READINGS | OF_SAE]:
        at5, at10 = ([one[label][ratio] for one in targets.values()] for ratio in ("5%", "10%"))
        above = sum(value > bar for value, bar in zip(at5, bars, strict=True))
        lines.append(_line(label, at5, at10, f"{above} of {len(at5)}"))
    return [*lines, "", *_without_first_words(targets)]


def _without_first_words(targets: dict[str, Any]) -> list[str]:
    """Precision at 5 % among the rows whose first word is none of the exemplars'."""
    name = "other first words at 5%"
    known = [label for label in READINGS | OF_SAE if all(name in one.get(label, {}) for one in targets.values())]
    if not known:
        return []
    rest = [one["first word"]["base rate of rows with other first words"] for one in targets.values()]
    rows = {"all such rows": rest} | {label: [one[label][name] for one in targets.values()] for label in known}
    return [
        "Rows whose first word is none of the exemplars', the best 5 % of them:", "",
        "| | " + " | ".join(targets) + " | average |", "|---|" + "--:|" * (len(targets) + 1),
        *(f"| {label} | " + " | ".join(f"{x:.2f}" for x in values) + f" | {np.mean(values):.3f} |" for label, values in rows.items()),
        "",
    ]  # fmt: skip


def _line(label: str, at5: list[float], at10: list[float], above: str) -> str:
    cells = [*(f"{value:.2f}" for value in at5), f"{np.mean(at5):.3f}", f"{np.mean(at10):.3f}", above]
    label = f"**{label}**" if label in BOLD else label
    return f"| {label} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
