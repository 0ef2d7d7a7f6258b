"""What tests of stores share: where a pool comes from, a store's files, and one shard's path."""

from __future__ import annotations

from pathlib import Path

ABOUT = {"id": "pool", "commit": "content:1"}


def files(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the store, without ``costs/``, which holds seconds."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("costs/")}


def shard(folder: Path, signal: str, number: int) -> Path:
    """A shard of a signal that the store has of one extraction."""
    (place,) = folder.glob(f"{signal}-*")
    return place / f"shard-{number:05d}.parquet"


def shards(folder: Path, number: int) -> list[Path]:
    """The shards of one number, of all signals."""
    return sorted(folder.glob(f"*/shard-{number:05d}.parquet"))
