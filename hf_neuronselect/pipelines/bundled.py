"""The bundled model, pool and targets, loaded."""

from __future__ import annotations

from datasets import Dataset

from ..core import bundled
from ..signals.extractor import NeuronFeatureExtractor


def extractor(**options: object) -> NeuronFeatureExtractor:
    """An extractor of the bundled model and SAE; options as in ``NeuronFeatureExtractor.from_pretrained``."""
    options.setdefault("sae", str(bundled.SAE))
    return NeuronFeatureExtractor.from_pretrained(str(bundled.MODEL), **options)  # type: ignore[arg-type]


def pool() -> Dataset:
    """The demo pool: permissively licensed instruction rows; ``source`` is the label."""
    return Dataset.from_parquet(str(bundled.POOL))


def targets() -> dict[str, Dataset]:
    """Exemplars of the demo's targets, by name."""
    return {name: Dataset.from_parquet(str(file)) for name, file in bundled.TARGETS.items()}
