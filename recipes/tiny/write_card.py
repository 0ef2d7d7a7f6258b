"""Write ``model_cards/bundled.md`` from the records of the bundled files; no figure is typed by hand.

python recipes/tiny/write_card.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open
from transformers import AutoConfig

from hf_neuronselect.core import bundled

ROOT = Path(__file__).parent.parent.parent
LICENCES = {
    "afriqa": "CC BY 4.0",
    "arcd": "MIT",
    "banking77": "CC BY 4.0",
    "clinc150": "CC BY 3.0",
    "flan_cot_aqua": "Apache-2.0",
    "flan_cot_creak": "Apache-2.0",
    "flan_cot_ecqa": "Apache-2.0",
    "flan_cot_qasc": "Apache-2.0",
    "flan_cot_sensemaking": "Apache-2.0",
    "flan_cot_strategyqa": "Apache-2.0",
    "gpteacher_code": "MIT (GPT-4 generated)",
    "gpteacher_roleplay": "MIT (GPT-4 generated)",
    "gpteacher_toolformer": "MIT (GPT-4 generated)",
    "gsm8k_train": "MIT",
    "mbpp_train": "CC BY 4.0",
    "nl2bash": "MIT (data)",
    "octopack_oasst": "MIT; OASST Apache-2.0, CommitPackFT permissive code",
    "pydocs_translate_es": "CC0 translations; documentation PSF-2.0",
    "pydocs_translate_ja": "PSF-2.0",
    "selfinstruct_seed": "Apache-2.0",
}


def main() -> None:
    model = bundled.MODEL / "model.safetensors"
    with safe_open(model, framework="np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]
    parameters = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        parameters += size
    sae = next(bundled.SAE.glob("*/training.json"))
    counts = Counter(pq.read_table(bundled.POOL, columns=["source"]).column("source").to_pylist())
    loader = FileSystemLoader(ROOT / "model_cards")
    text = (
        Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
        .get_template("bundled.md.jinja")
        .render(
            card_data=ModelCardData(
                license="apache-2.0", language=["en", "multilingual"], tags=["neuronselect", "sparse-autoencoder"]
            ).to_yaml(),
            config=AutoConfig.from_pretrained(bundled.MODEL),
            parameters=parameters,
            model_bytes=model.stat().st_size,
            model=json.loads((bundled.MODEL / "training.json").read_text()),
            sae=json.loads(sae.read_text()),
            pool_rows=counts.total(),
            targets=", ".join(bundled.TARGETS),
            sources=[(name, counts[name], LICENCES[name]) for name in sorted(counts)],
        )
    )
    (ROOT / "model_cards" / "bundled.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
