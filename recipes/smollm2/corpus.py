"""Tokens to train the SAE of SmolLM2-135M-Instruct on, and the rows to measure it with.

    python recipes/smollm2/corpus.py --model SMOLLM2 --data DATA --out WORK

``DATA`` has ``text/*.jsonl.xz``, ``pool.jsonl.gz``, ``pool_meta.jsonl.gz`` and ``targets/*.jsonl.gz``. Written are
``WORK/corpus.npz`` (text, and half of the pool's rows under permissive terms) and ``WORK/measure.npz`` (every pool row
and exemplar; ``trained`` marks the half that the SAE sees).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.training.token_rows import TokenRows

logger = logging.getLogger("smollm2.corpus")

PERMISSIVE = ("permissive", "permissive?")
# Non-commercial, share-alike, GFDL or unclear terms, which could apply to trained weights.
LEFT_OUT = {"codealpaca_2k", "sgd_dialogue", "tweeteval_sentiment", "cmrc2018", "jaquad", "nusax_mt", "rails-guides",
            "stacks-project"}  # fmt: skip
TARGETS = ("gsm8k", "mbpp", "humaneval", "xquad", "tydiqa", "mmlu")
CONTEXT, MEASURED = 512, 384
RELATED = Path(__file__).parents[2] / "benchmarks" / "related_sources.json"


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with (lzma if path.suffix == ".xz" else gzip).open(path, "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def trained_half(name: str) -> bool:
    """Whether a pool row of permissive terms is in the half that is trained on."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def as_chat(text: str) -> Conversation | None:
    question, separator, answer = text.partition("\n\nAssistant: ")
    if not separator or not question.startswith("User: "):
        return None
    turns = [{"role": "user", "content": question.removeprefix("User: ")}, {"role": "assistant", "content": answer}]
    return Conversation(messages=turns)


class Encoder:
    """Token ids of plain texts and of conversations in the model's chat template."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.chats = SampleEncoder(self.tokenizer, max_length=1 << 20)

    def plain(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.uint16) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def chat(self, conversations: list[Conversation]) -> list[np.ndarray]:
        samples = self.chats.encode(conversations)
        assert not any(sample.skip for sample in samples)
        return [sample.input_ids.astype(np.uint16) for sample in samples]


def corpus(encoder: Encoder, data: Path, pool: list[dict[str, Any]], files: str) -> tuple[TokenRows, dict[str, int]]:
    rows: list[np.ndarray] = []
    tokens: dict[str, int] = {}
    for path in sorted((data / "text").glob(files)):
        chats, texts = [], []
        for row in lines(path):
            if row["source"] not in LEFT_OUT:
                chat = as_chat(row["text"]) if path.name.startswith("instructions") else None
                if chat:
                    chats.append(chat)
                else:
                    texts.append(row["text"])
        found = (encoder.chat(chats) if chats else []) + (encoder.plain(texts) if texts else [])
        tokens[path.name.split(".")[0]] = sum(map(len, found))
        rows += found
        logger.info("%s: %d rows, %d tokens", path.name, len(found), tokens[path.name.split(".")[0]])
    found = encoder.chat([Conversation(messages=row["messages"]) for row in pool if row["trained"]])
    tokens["pool"] = sum(map(len, found))
    return TokenRows.of(rows + found, CONTEXT), tokens


def shared_prefix(rows: list[np.ndarray]) -> int:
    """Length of the template's beginning that most rows share."""
    heads = np.asarray([row[:64] for row in rows if len(row) >= 64])
    return int((heads == np.median(heads, axis=0)).mean(axis=0).__lt__(0.9).argmax())


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--files", default="instructions*.jsonl.xz", help="texts to train on, beside pool rows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(args.model)

    licence = {row["id"]: row["licence_class"] for row in lines(args.data / "pool_meta.jsonl.gz")}
    pool = list(lines(args.data / "pool.jsonl.gz"))
    for row in pool:
        row["trained"] = licence[row["id"]] in PERMISSIVE and trained_half(row["id"])
    sources = sorted({row["source"] for row in pool})
    exemplars = {name: list(lines(args.data / "targets" / f"{name}.jsonl.gz")) for name in TARGETS}
    everything = pool + [row for rows in exemplars.values() for row in rows]
    encoded = encoder.chat([Conversation(messages=row["messages"]) for row in everything])
    prefix = shared_prefix(encoded)
    logger.info("%d pool rows, %d trained on; the template begins with %d tokens", len(pool),
                sum(row["trained"] for row in pool), prefix)  # fmt: skip
    measured = TokenRows.of([row[:MEASURED] for row in encoded], MEASURED)
    assert len(measured) == len(everything)
    np.savez_compressed(
        args.out / "measure.npz",
        ids=measured.ids.astype(np.uint16),
        starts=measured.starts,
        prefix=prefix,
        source=np.asarray([sources.index(row["source"]) for row in pool], np.int16),
        trained=np.asarray([row["trained"] for row in pool]),
        permissive=np.asarray([licence[row["id"]] in PERMISSIVE for row in pool]),
        sources=np.asarray(sources),
        targets=np.asarray([f"{name}={len(rows)}" for name, rows in exemplars.items()]),
        related=np.asarray(RELATED.read_text()),
    )
    rows, tokens = corpus(encoder, args.data, pool, args.files)
    np.savez(args.out / "corpus.npz", ids=rows.ids.astype(np.uint16), starts=rows.starts.astype(np.uint32))
    (args.out / "corpus.json").write_text(
        json.dumps({"rows": len(rows), "tokens": int(rows.starts[-1]), "used": rows.usable, "by": tokens}, indent=1)
        + "\n"
    )
    logger.info("%d rows, %d tokens", len(rows), rows.starts[-1])


if __name__ == "__main__":
    main()
