"""Make the training text of the bundled base model, and its tokenizer.

It only reads sources whose licence allows trained weights to be published, and no math, code, question-answering or
chain-of-thought *instructions*: the model is the BASE model of all experiments, so it must not have seen rows like those
of the targets.

    python recipes/tiny/corpus.py --text DIR --out WORK

writes ``WORK/tokenizer/`` and ``WORK/tokens.npy`` (uint16, documents shuffled, each ``bos … eos``).
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("tiny.corpus")

PLAIN_FILES = ("books_en", "docs_en", "code", "multilingual")
# Left out: share-alike or GFDL text, whose terms could apply to the weights.
LEFT_OUT = {"rails-guides", "stacks-project"}
# General instructions; no other instruction source is read.
GENERAL_INSTRUCTIONS = {"natinst_en", "p3_t0"}

BOS, EOS, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def read_jsonl_xz(path: Path) -> Iterator[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def as_chat(text: str) -> str | None:
    """Render a ``User: … / Assistant: …`` text like the chat template, without the bos and the last eos."""
    question, separator, answer = text.partition("\n\nAssistant: ")
    if not separator or not question.startswith("User: "):
        return None
    return f"<|user|>\n{question.removeprefix('User: ')}\n<|assistant|>\n{answer}"


def documents(text_dir: Path) -> Iterator[str]:
    for name in PLAIN_FILES:
        for row in read_jsonl_xz(text_dir / f"{name}.jsonl.xz"):
            if row["source"] not in LEFT_OUT:
                yield row["text"]
    for row in read_jsonl_xz(text_dir / "instructions_en.jsonl.xz"):
        if row["source"] in GENERAL_INSTRUCTIONS and (chat := as_chat(row["text"])):
            yield chat


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    # Split digits (for arithmetic), keep long runs of spaces together (for code).
    pattern = Regex(r"\p{N}| ?\p{L}[\p{L}\p{M}]*|\s+(?!\S)|\s+| ?[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of {books_en,docs_en,code,...}.jsonl.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--tokenizer-chars", type=int, default=24_000_000, help="characters the BPE is trained on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    docs = list(documents(args.text))
    order = np.random.default_rng(args.seed).permutation(len(docs))
    docs = [docs[i] for i in order]
    logger.info("%d documents, %.1f M characters", len(docs), sum(map(len, docs)) / 1e6)

    sample, taken = [], 0
    for doc in docs:
        sample.append(doc)
        taken += len(doc)
        if taken >= args.tokenizer_chars:
            break
    tokenizer = train_tokenizer(sample, args.vocab_size)
    tokenizer.save_pretrained(args.out / "tokenizer")
    logger.info("tokenizer: %d entries, from %.1f M characters", len(tokenizer), taken / 1e6)

    pieces = []
    for start in range(0, len(docs), 2000):
        for encoding in tokenizer.backend_tokenizer.encode_batch(docs[start : start + 2000]):
            pieces.append(np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16))
    tokens = np.concatenate(pieces)
    np.save(args.out / "tokens.npy", tokens)
    logger.info("%.1f M tokens", len(tokens) / 1e6)


if __name__ == "__main__":
    main()
