"""CountSketch: a random projection of long vectors that keeps their inner products, without a matrix."""

from __future__ import annotations

import hashlib

import torch

CHUNK = 8192
"""Columns at a time, so that what is computed from them stays in the caches."""


class CountSketch:
    """``(S g)[k] = sum of s_i g_i over coordinates i with h(i) = k``: a random bucket ``h(i)`` and sign ``s_i`` each.

    Inner products are right on average and vary as with a dense Rademacher matrix: ``E <Sx, Sy> = <x, y>``, variance at
    most ``2 |x|^2 |y|^2 / dim``. It costs one addition a coordinate instead of ``dim`` (Charikar, Chen, Farach-Colton 2002).

    Args:
        dim: length of the projection. seed: of buckets and signs, which also depend on a vector's name.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self.seed = dim, seed
        self._maps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, total: torch.Tensor, name: str, values: torch.Tensor) -> None:
        """Add the projection of one part of the vectors.

        Args:
            total: float32 ``[rows, dim]``, changed. name: of the part. values: float32 ``[rows, coordinates]``.
        """
        bucket, sign = self._map(name, values.shape[1], values.device)
        for start in range(0, values.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            total.index_add_(1, bucket[part], values[:, part] * sign[part])

    def _map(self, name: str, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Bucket int64 and sign float32 of each coordinate, the same on every machine."""
        key = f"{name}\0{device}"
        if key not in self._maps:
            own = hashlib.blake2b(f"{self.seed}\0{name}".encode(), digest_size=7).digest()
            drawn = torch.Generator().manual_seed(int.from_bytes(own, "little"))
            bucket = torch.randint(
                self.dim, (length,), generator=drawn
            )  # int64: index_add_ is 10 times slower with int32
            sign = torch.randint(2, (length,), generator=drawn, dtype=torch.int8).mul_(2).sub_(1)
            self._maps[key] = bucket.to(device), sign.float().to(device)
        return self._maps[key]
