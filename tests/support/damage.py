"""Random damage of a folder's files, as disks, copies and editors do it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

KINDS = ("flip", "truncate", "swap ranges", "swap files", "delete", "empty", "overwrite")


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(folder: Path, draw: np.random.Generator, files: list[Path] | None = None) -> str:
    """Damage one or two of the files in one way; says which and how."""
    files = files or files_in(folder)
    path, other = (files[int(i)] for i in draw.integers(len(files), size=2))
    kind = KINDS[int(draw.integers(len(KINDS)))]
    content = bytearray(path.read_bytes())
    size = len(content)
    if kind == "swap files" and other == path:
        kind = "flip"
    if kind == "delete":
        path.unlink()
    elif kind == "empty" or not size:
        path.write_bytes(b"")
    elif kind == "swap files":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        at = int(draw.integers(size))
        if kind == "flip":
            content[at] ^= 1 << int(draw.integers(8))
        elif kind == "truncate":
            del content[at:]
        elif kind == "overwrite":
            content[at : at + 16] = draw.bytes(len(content[at : at + 16]))
        else:
            length = int(draw.integers(1, max(2, size // 3)))
            a, b = sorted(int(i) for i in draw.integers(max(1, size - length), size=2))
            b = max(b, min(a + length, size - 1))
            first, second = content[a : a + length], content[b : b + length]
            content[b : b + len(first)], content[a : a + len(second)] = first[: size - b], second
        path.write_bytes(bytes(content[:size]))
    return f"{kind} {path.relative_to(folder)}" + (f" and {other.relative_to(folder)}" if kind == "swap files" else "")
