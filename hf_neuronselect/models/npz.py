"""What an npz archive states about its arrays, checked before it is unpacked."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

_MOST_PACKED = 20  # times smaller than unpacked: weights hardly pack at all


def check_npz(path: Path) -> None:
    """Compare the sizes that an archive states with what it holds, before memory is taken for them.

    Raises:
        ValueError: they differ, or the archive unpacks to far more than weights do.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > _MOST_PACKED * path.stat().st_size:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        for member in members:
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                if version == (1, 0):
                    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                else:
                    shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
                stated, held = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
                if stated != held and not dtype.hasobject:  # numpy refuses a pickle
                    raise ValueError(f"{member.filename} states {stated:,} bytes and holds {held:,}")
