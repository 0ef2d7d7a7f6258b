"""Train the bundled SAE on the penultimate block of the bundled model, on the same text, by eai-sparsify.

python recipes/tiny/train_sae.py --work WORK --model WORK/model --out WORK/sae --tokens 6e6
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sparsify import SaeConfig, TrainConfig, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect.core.digests import SAE_FILES, model_hash
from hf_neuronselect.core.sae_record import SAE_RECORD, SaeRecord, verdict_of
from hf_neuronselect.core.seals import encode, write_checksums
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.training.models import BUNDLED
from hf_neuronselect.training.sae_measure import measure_saes
from hf_neuronselect.training.token_rows import TokenRows

AUXK_ALPHA, DEAD_AFTER_TOKENS, BATCH_TOKENS = 1 / 32, 500_000, 4096


def packed_rows(token_ids: Iterable[Sequence[int] | np.ndarray], bos: int, context: int) -> np.ndarray:
    """Concatenate documents and cut them into rows of ``context`` tokens, each starting with BOS: int64 ``[N, context]``.

    The remainder that fills no row is dropped.
    """
    body = context - 1
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    rows = flat[: len(flat) // body * body].reshape(-1, body)
    return np.concatenate([np.full((len(rows), 1), bos), rows], axis=1)


def train(
    model: str, rows: np.ndarray, out: Path, *, expansion_factor: int, k: int, lr: float | None, bos: int
) -> Path:
    """Train on rows and save in the folder ``out/layers.N``, which is returned."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    backbone = Backbone(lm)
    number = backbone.layer(-2)
    hookpoint = backbone.residual(number).module
    # Deeper blocks are never read: drop them, so that training only runs the prefix.
    setattr(lm.base_model, backbone.blocks_name, backbone.blocks[: number + 1])
    lm.base_model.config.use_cache = False
    with tempfile.TemporaryDirectory() as work:
        config = TrainConfig(
            SaeConfig(expansion_factor=expansion_factor, k=k),
            batch_size=BATCH_TOKENS // rows.shape[1],
            hookpoints=[hookpoint],
            auxk_alpha=AUXK_ALPHA,
            dead_feature_threshold=DEAD_AFTER_TOKENS,
            lr=lr,
            # The BOS state is the same in every row: nothing to learn, but most of the variance.
            exclude_tokens=[bos],
            save_every=10**9,
            save_dir=work,
            run_name="sae",
            log_to_wandb=False,
        )
        trainer = Trainer(config, Dataset.from_dict({"input_ids": list(rows)}).with_format("torch"), lm.base_model)
        trainer.fit()
        next(iter(trainer.saes.values())).save_to_disk(out / hookpoint)
    return out / hookpoint


@torch.inference_mode()
def first_token_norm_ratio(lm: torch.nn.Module, rows: np.ndarray) -> float:
    """How many times larger the first token's norm is than the others', at the penultimate block."""
    first = other = 0.0
    for block in np.array_split(rows, max(1, len(rows) // 16)):
        hidden = lm(input_ids=torch.from_numpy(block), output_hidden_states=True).hidden_states[-2].norm(dim=-1)
        first, other = first + float(hidden[:, 0].sum()), other + float(hidden[:, 1:].sum())
    return first / len(rows) / (other / rows[:, 1:].size)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=6e6)
    parser.add_argument("--expansion-factor", type=int, default=16)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()

    bos = AutoTokenizer.from_pretrained(args.model).bos_token_id
    tokens = np.load(args.work / "tokens.npy", mmap_mode="r")
    held_out, tokens = tokens[:200_000], tokens[200_000 : 200_000 + int(args.tokens)]
    folder = train(args.model, packed_rows([tokens], bos, args.context), args.out,
                   expansion_factor=args.expansion_factor, k=args.k, lr=args.lr, bos=bos)  # fmt: skip

    lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = packed_rows([held_out], bos, args.context)
    (figures,) = measure_saes(lm, [load_sae(folder)], TokenRows.of(rows, args.context), batch=8192)
    record = SaeRecord(
        model=BUNDLED,
        commit=f"content:{model_hash(Path(args.model))}",
        layer=Backbone(lm).layer(-2),
        license="apache-2.0",
        **asdict(figures),
        loss_recovered=figures.loss_recovered,
        verdict=verdict_of(figures.fvu, figures.dead),
        training={"tokens": int(args.tokens), "k": args.k, "first_token_norm_ratio": first_token_norm_ratio(lm, rows)},
    )
    (folder / SAE_RECORD).write_text(encode(record))
    write_checksums(folder, (*SAE_FILES, SAE_RECORD))
    logging.info("%s: %s", folder, record)


if __name__ == "__main__":
    main()
