"""Train the bundled SAE on the penultimate block of the bundled model, on the same text.

python recipes/tiny/train_sae.py --work WORK --model WORK/model --out WORK/sae --tokens 6e6
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from hf_neuronselect.core.digests import SAE_FILES
from hf_neuronselect.core.seals import write_checksums
from hf_neuronselect.training.sae import measure_sae, packed_rows, train_sae


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

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = np.load(args.work / "tokens.npy", mmap_mode="r")
    held_out, tokens = tokens[:200_000], tokens[200_000 : 200_000 + int(args.tokens)]
    bos = tokenizer.bos_token_id
    folder = train_sae(
        args.model,
        packed_rows([tokens], bos, args.context),
        args.out,
        expansion_factor=args.expansion_factor,
        k=args.k,
        lr=args.lr,
        # The BOS state is the same in every row: nothing to learn, but most of the variance.
        exclude_tokens=[bos],
    )
    record = measure_sae(args.model, str(folder), packed_rows([held_out], bos, args.context))
    record |= {"trained_on_tokens": int(args.tokens), "k": args.k, "expansion_factor": args.expansion_factor}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_checksums(folder, SAE_FILES)
    logging.info("%s: %s", folder, record)


if __name__ == "__main__":
    main()
