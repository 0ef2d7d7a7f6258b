"""Write a selection as another trainer reads it."""

from __future__ import annotations

from pathlib import Path

from ..core.configs import ExportConfig
from ..export.export import export_selection
from ..selection.selection import Selection


def export(config: ExportConfig) -> list[Path]:
    """The files written: data first, then the configuration."""
    name = config.folder.resolve().name
    out = config.out or config.folder.resolve().parent / f"{name}-{config.format}"
    return export_selection(Selection.from_pretrained(config.folder), config.format, out, base_model=config.base_model)
