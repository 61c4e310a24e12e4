"""Slices of a volume in the three planes: axial ones as in the paper, and sagittal and coronal beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..labels import BACKGROUND

PLANES = {"xy": 3, "yz": 2, "xz": 1}
"""Axial, sagittal, coronal, and which axis of a volume on the network grid (1, H, W, D) counts their slices."""


def plane_slices(volume: Tensor, plane: str) -> Tensor:
    """Slices (N, 1, ·, ·) of a volume (1, H, W, D) on the network grid.

    "xy" gives D axial slices (H, W), "yz" W sagittal ones (H, D), "xz" H coronal ones (W, D). Voxels are taken as they
    are: where slices lie further apart than pixels, sagittal and coronal ones look flattened.
    """
    return volume.movedim(PLANES[plane], 0)


def plane_pairs(output: Sequence[dict[str, Tensor]], planes: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Synthetic and real slices with a body, (N, 1, ·, ·) each, a pair a plane: `output_transform` of a metric.

    Args:
        output: decollated, with `pred_slices`, `ct_slices` and `mask_slices` on the network grid, (1, H, W, D).
        planes: of `PLANES`.
    """
    pairs = []
    for plane in planes:
        of_items = [_pair(item, plane) for item in output]
        pairs.append((torch.cat([pred for pred, _ in of_items]), torch.cat([ct for _, ct in of_items])))
    return pairs


def _pair(item: dict[str, Tensor], plane: str) -> tuple[Tensor, Tensor]:
    mask, pred, ct = (
        plane_slices(torch.as_tensor(item[key]), plane).cpu() for key in ("mask_slices", "pred_slices", "ct_slices")
    )
    occupied = (mask != BACKGROUND).flatten(1).any(dim=1)
    return pred[occupied].float(), ct[occupied].float()
