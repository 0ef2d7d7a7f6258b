"""The model, SAE, pool and targets inside the package: what runs where nothing is named."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from .features.extractor import NeuronFeatureExtractor

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "model"
SAE = ASSETS / "sae"


def extractor(**options: object) -> NeuronFeatureExtractor:
    """An extractor of the bundled model and SAE; options as in ``NeuronFeatureExtractor.from_pretrained``."""
    options.setdefault("sae", str(SAE))
    return NeuronFeatureExtractor.from_pretrained(str(MODEL), **options)  # type: ignore[arg-type]


def pool() -> Dataset:
    """The demo pool: permissively licensed instruction rows; ``source`` is the label."""
    return Dataset.from_parquet(str(ASSETS / "demo" / "pool.parquet"))


def targets() -> dict[str, Dataset]:
    """Exemplars of the demo's targets, by name."""
    files = sorted((ASSETS / "demo" / "targets").glob("*.parquet"))
    return {file.stem: Dataset.from_parquet(str(file)) for file in files}


def related_sources() -> dict[str, list[str]]:
    """Target -> the pool's sources that count as right for it, said before anything was selected."""
    found: dict[str, list[str]] = json.loads((ASSETS / "demo" / "related_sources.json").read_text(encoding="utf-8"))
    return found
