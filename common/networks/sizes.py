"""Sizes of slices."""

from __future__ import annotations

from torch import Tensor


def check_halvable(x: Tensor, factor: int) -> None:
    """Raise ValueError unless rows and columns of x (B, C, H, W) are multiples of factor."""
    height, width = x.shape[2:]
    if height % factor or width % factor:
        raise ValueError(f"slices of {height}x{width} can't be halved at every level; use multiples of {factor}")
