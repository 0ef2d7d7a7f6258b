"""Small pictures of numbers as PNG, without a library: a page holds them as data."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def png(pixels: np.ndarray) -> bytes:
    """A PNG file.

    Args:
        pixels: uint8 ``[height, width, 4]``: red, green, blue and opacity.
    """
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.tobytes() for line in np.ascontiguousarray(pixels, np.uint8))
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits, RGB and opacity
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def data_url(pixels: np.ndarray) -> str:
    """The same as an address that holds the picture."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
