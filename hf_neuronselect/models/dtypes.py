"""Number formats that models run in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..core.options import Dtype
from .checkpoint import block_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 50_000_000
"""Parameters in blocks from which on speed matters more than that scores do not move with the batch size."""


def auto_dtype(config: Any, device: str = "auto") -> Dtype:
    """What ``auto`` means for a model: the checkpoint's format on a GPU, and on a CPU that has bfloat16 for a large model in it.

    Args:
        config: of the model. device: as the option of this name.

    Returns:
        Never ``auto``.
    """
    stored: Any = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    stored = stored if stored in DTYPES else "float32"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return stored
    # The rounding of bfloat16 depends on a batch's shape, so a score moves a little with the batch size. For a model that
    # takes hours that is worth its speed where the CPU has the instructions (without them it is slower than float32).
    large = block_parameters(config) >= LARGE and device in ("auto", "cpu")
    return stored if stored == "bfloat16" and large and cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 natively (AVX512-BF16, AMX, or Arm's BF16)."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    if any(one is not None and one() for one in asked):
        return True
    try:
        said = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return said is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(said[1].split())
