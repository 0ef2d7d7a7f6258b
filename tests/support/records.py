"""Changes of a record under a seal of its own, as somebody makes them who knows how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_neuronselect.core.seals import encode, unseal


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a record and seal it again."""
    values = unseal(path.read_bytes())
    change(values)
    path.write_text(encode(values), encoding="utf-8")
