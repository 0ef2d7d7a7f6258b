"""Random damage of a folder's files, as disks, copies and editors do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf_neuronselect.core.seals import SEAL, encode

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


# -------------------------------------------------------------------------------------------- hostile values
RECORDS = {"list": b"[]", "text": b'"x"', "null": b"null", "number": b"1e400", "empty": b"", "bad byte": b'{"a": "\xff"}',
           "deep": b"[" * 100_000, "deep object": b'{"method":' * 100_000, "list of objects": b"[{}]",
           "mark": b"\xef\xbb\xbf{}", "zeros": bytes(64), "no number": b"NaN"}  # fmt: skip
VALUES: list[Any] = [[], {}, "x", "", None, True, -1, 0, 1.5, 1e308, 10**9, 10**11, 10**30, "\x1b]0;x\x07", "\x00", [[[]]],
                     {"a": {"b": []}}, [1, 2], "../../x", float("nan"), float("inf")]  # fmt: skip


def change_json(path: Path, draw: np.random.Generator) -> str:
    """Replace or remove one value of a JSON file, under a new seal where it has one; says which."""
    values = json.loads(path.read_bytes())
    places: list[tuple[Any, Any]] = []
    waiting = [values]
    while waiting:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        places += [(inside, key) for key in keys]
        waiting += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
    if not places:
        return f"nothing in {path.name}"
    inside, key = places[int(draw.integers(len(places)))]
    value = VALUES[int(draw.integers(len(VALUES)))]
    if draw.random() < 0.2:
        del inside[key]
    else:
        inside[key] = value
    sealed = isinstance(values, dict) and values.pop(SEAL, None) is not None
    path.write_text(encode(values) if sealed else json.dumps(values))
    return f"{path.name}: {key!r} is {value!r}"
