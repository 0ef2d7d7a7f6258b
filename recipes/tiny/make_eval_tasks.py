"""Draw small offline tasks for lm-evaluation-harness from labelled eval files; only rows under permissive licences.

    python recipes/tiny/make_eval_tasks.py --eval DIR --out recipes/lm_eval_tasks --held-out recipes/data

``DIR`` has ``gsm8k.jsonl.gz``, ``mmlu.jsonl.gz`` and ``tydiqa.jsonl.gz`` (``messages`` of one user and one assistant
turn, ``id``), and ``meta/`` with files of the same names (``subject``; ``lang`` and ``answers``) by ``id``. ``--held-out``
also writes rows (``messages``) of ``gsm8k`` and ``mbpp`` for the loss on held-out answers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

FEWSHOT = 5  # rows of a task kept for few-shot examples, never used as test rows
HELD_OUT = 200  # rows for the loss on held-out answers
PASSAGE_BYTES = 1100  # longest TyDi QA prompt: fits a small model's context, and keeps the file small

Row = dict[str, Any]

COMMON = {
    "tag": "neuronselect_small",
    "dataset_path": "json",
    # Relative to the task file: run_tasks makes them absolute; lm-eval's command line must run in the task's folder.
    "dataset_kwargs": {"data_files": {"test": "test.jsonl", "fewshot": "fewshot.jsonl"}},
    "test_split": "test",
    "fewshot_split": "fewshot",
    "fewshot_config": {"sampler": "first_n"},
}
GREEDY = {"do_sample": False, "temperature": 0.0}
TASKS: dict[str, dict[str, Any]] = {
    "gsm8k_small": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 256, **GREEDY},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"-?\d[\d,]*(?:\.\d+)?", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                # Remove the text before the reference's final number, and separators and a zero fraction in both.
                "regexes_to_ignore": [r"(?s).*####\s*", ",", r"\.0+$"],
            }
        ],
    },
    "mmlu_small": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
        ],
    },
    "tydiqa_small": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}\nAnswer:",
        "doc_to_target": "answers",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48, **GREEDY},
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
    },
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    makers: dict[str, Callable[[Path], Iterable[Row]]] = {
        "gsm8k_small": gsm8k,
        "mmlu_small": mmlu,
        "tydiqa_small": tydiqa,
    }
    for name, make in makers.items():
        rows = list(make(args.eval))
        order = np.random.default_rng(args.seed).permutation(len(rows))
        drawn = _spread([rows[i] for i in order], args.rows + FEWSHOT)
        write_task(args.out / name, name, drawn[FEWSHOT:], drawn[:FEWSHOT])
    for name in ("gsm8k", "mbpp") if args.held_out else ():
        rows = list(_read(args.eval / f"{name}.jsonl.gz"))
        chosen = np.sort(np.random.default_rng(args.seed).permutation(len(rows))[:HELD_OUT])
        args.held_out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in chosen.tolist())
        (args.held_out / f"{name}_held_out.jsonl").write_text(lines, encoding="utf-8")


def gsm8k(folder: Path) -> Iterable[Row]:
    """The question and the worked answer, which ends in ``#### number``."""
    for row in _read(folder / "gsm8k.jsonl.gz"):
        user, assistant = (turn["content"] for turn in row["messages"])
        yield {"id": row["id"], "question": user, "answer": assistant}


def mmlu(folder: Path) -> Iterable[Row]:
    """The question with its four options, and the index of the right one."""
    subjects = {meta["id"]: meta["subject"] for meta in _read(folder / "meta" / "mmlu.jsonl.gz")}
    for row in _read(folder / "mmlu.jsonl.gz"):
        user, assistant = (turn["content"] for turn in row["messages"])
        yield {"id": row["id"], "group": subjects[row["id"]], "prompt": user, "answer": "ABCD".index(assistant)}


def tydiqa(folder: Path) -> Iterable[Row]:
    """Short passages with their question, and every accepted answer."""
    metas = {meta["id"]: meta for meta in _read(folder / "meta" / "tydiqa.jsonl.gz")}
    for row in _read(folder / "tydiqa.jsonl.gz"):
        prompt, meta = row["messages"][0]["content"], metas[row["id"]]
        if len(prompt.encode()) <= PASSAGE_BYTES:
            yield {"id": row["id"], "group": meta["lang"], "prompt": prompt, "answers": meta["answers"]}


def _spread(rows: list[Row], count: int) -> list[Row]:
    """Take rows from each group in turn, so that subjects and languages have equal weight."""
    seen: dict[str, int] = {}
    turns = []
    for place, row in enumerate(rows):
        group = row.get("group", "")
        seen[group] = turn = seen.get(group, 0) + 1
        turns.append((turn if "group" in row else 0, place))
    return [rows[place] for _, place in sorted(turns)[:count]]


def write_task(folder: Path, name: str, test: list[Row], fewshot: list[Row]) -> None:
    """Write ``name.yaml``, ``test.jsonl`` and ``fewshot.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"task": name, **COMMON, **TASKS[name], "metadata": {"version": 1.0}}
    # Copies: YAML would write a shared object once and refer to it.
    text = yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True, width=120)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    for split, rows in (("test", test), ("fewshot", fewshot)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    logging.info("%s: %d rows and %d few-shot rows, %.0f kB", name, len(test), len(fewshot), size / 1e3)


def _read(path: Path) -> Iterable[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


if __name__ == "__main__":
    main()
