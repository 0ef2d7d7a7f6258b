"""Paths of the model, SAE, pool and targets inside the package: what is used where nothing is named."""

from __future__ import annotations

import json
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
MODEL = ASSETS / "model"
SAE = ASSETS / "sae"
SAES = (SAE, ASSETS / "saes" / "smollm2-135m-instruct")  # each has a folder a layer, with the record of its model
POOL = ASSETS / "demo" / "pool.parquet"
TARGETS = {file.stem: file for file in sorted((ASSETS / "demo" / "targets").glob("*.parquet"))}


def related_sources() -> dict[str, list[str]]:
    """Target -> the pool's sources that count as right for it, fixed before anything was selected."""
    found: dict[str, list[str]] = json.loads((ASSETS / "demo" / "related_sources.json").read_text(encoding="utf-8"))
    return found
