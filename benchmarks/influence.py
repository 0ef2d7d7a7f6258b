"""LESS and GIST end to end, from the pool to its scores, beside the training passes that LESS's definition requires.

    python benchmarks/influence.py --model FOLDER --pool DATA/pool.jsonl.gz --rows 48 --out benchmarks/influence_smollm2.json

Both with their presets, on the same rows, threads, weights and dtype, in alternating runs of one process, each in an empty
folder: nothing is kept between runs. What LESS requires at least: the warm-up's four epochs on 5 % of the pool, and at each of the
four checkpoints a forward and a backward pass over every row of the pool and every exemplar, in batches.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import RATIO, alternate, count, described, machine, plain_logging, ratio, read_pool, spread, write_json
from datasets import Dataset, disable_progress_bars
from gradients import Contenders, moved
from huggingface_hub import constants

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelector
from hf_neuronselect.models.lora import LoraShape, lora_model_of
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.signals.gradient import answers_of

logger = logging.getLogger("influence")
EPOCHS = 4


def in_an_empty_folder(run: Callable[[], object]) -> None:
    before = constants.HF_HOME
    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HOME = folder
        try:
            run()
        finally:
            constants.HF_HOME = before


def scored(name: str, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selector = NeuronSelector(name).prepare(pool, extractor=extractor).fit(target)
    selector.select(pool, k=1, exclude=())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--exemplars", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plain_logging(logger)
    disable_progress_bars()
    extractor = NeuronFeatureExtractor.from_pretrained(
        args.model, features=["gradient"], dtype=args.dtype, device="cpu", max_length=args.max_length
    )
    wanted = args.rows + args.exemplars
    drawn = read_pool(args.pool, 2 * wanted, args.seed)
    usable = [
        (row, sample)
        for row, sample in zip(drawn, answers_of(extractor.extraction, drawn), strict=True)
        if not sample.skip
    ]
    texts, samples = zip(*usable[:wanted], strict=True)
    pool, target = (as_rows(part) for part in (texts[: args.rows], texts[args.rows :]))

    lora = lora_model_of(extractor.extraction.spec, torch.device("cpu"), LoraShape())
    moved(lora)
    passes = Contenders(lora, list(samples)).training
    runs: dict[str, Callable[[], object]] = {
        "less": partial(in_an_empty_folder, partial(scored, "less", pool, target, extractor)),
        "gist": partial(in_an_empty_folder, partial(scored, "gist", pool, target, extractor)),
        "warm-up": partial(in_an_empty_folder, partial(NeuronSelector("less").prepare, pool, extractor=extractor)),
        "one pass": passes,
    }
    for run in runs.values():
        run()
    timed = alternate(runs, args.repeats, torch.device("cpu"), logger)
    required = [train + EPOCHS * once for train, once in zip(timed["warm-up"], timed["one pass"], strict=True)]
    found = {
        "less / training passes": ratio(timed["less"], required),
        "gist / less": ratio(timed["gist"], timed["less"]),
    }
    about = machine(torch.device("cpu"))
    settings = {
        "model": extractor.extraction.spec.source.id, "dtype": args.dtype, "rows": args.rows, "exemplars": args.exemplars,
        "tokens": count(samples), "max_length": args.max_length, "repeats": args.repeats, "seed": args.seed,
    }  # fmt: skip
    write_json(args.out, {
        "machine": about, "settings": settings, "seconds": timed, "required": required,
        "tokens_per_s": {name: spread([count(samples) / one for one in timed[name]]) for name in ("less", "gist")},
        "ratios": found,
    })  # fmt: skip
    logger.info("%s", described(about, settings))
    for name, one in found.items():
        logger.info("%s: %s", name, RATIO.format(**one))


def as_rows(texts: tuple[Conversation, ...]) -> Dataset:
    return Dataset.from_list([{"messages": list(text.messages)} for text in texts])


if __name__ == "__main__":
    main()
