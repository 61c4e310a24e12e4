"""Slices of a volume whose voxels say where they are."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from common.evaluation.metrics import axial_slices
from common.evaluation.planes import PLANES, plane_pairs, plane_slices

SHAPE = (3, 4, 5)  # rows (y), columns (x), slices (z)


def volume() -> torch.Tensor:
    """(1, H, W, D), voxel (y, x, z) has the value 100 y + 10 x + z."""
    y, x, z = torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij")
    return (100 * y + 10 * x + z)[None].float()


@pytest.mark.parametrize(
    ("plane", "count", "voxel"),
    [
        ("xy", 5, lambda k, i, j: 100 * i + 10 * j + k),
        ("yz", 4, lambda k, i, j: 100 * i + 10 * k + j),
        ("xz", 3, lambda k, i, j: 100 * k + 10 * i + j),
    ],
)
def test_slices_of_each_plane_hold_the_voxels_they_should(plane, count, voxel):
    slices = plane_slices(volume(), plane)
    rows, columns = slices.shape[2:]
    expected = torch.tensor(
        [[[[voxel(k, i, j) for j in range(columns)] for i in range(rows)]] for k in range(count)]
    ).float()
    assert torch.equal(slices, expected)
    assert slices.numel() == volume().numel() and set(PLANES) == {"xy", "yz", "xz"}


def test_pairs_keep_the_slices_with_a_body_of_all_items_in_order():
    mask = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    mask[0, 1, 2:, 1] = 16  # one row, two columns, one slice
    items = [
        {"pred_slices": volume() + offset, "ct_slices": -volume() - offset, "mask_slices": mask} for offset in (0, 1000)
    ]
    items = [{name: MetaTensor(value) for name, value in item.items()} for item in items]
    occupied = {"xz": [1], "xy": [1], "yz": [2, 3]}
    pairs = plane_pairs(items, list(occupied))
    for (plane, kept), (pred, ct) in zip(occupied.items(), pairs, strict=True):
        of_one = plane_slices(volume(), plane)[kept]
        assert torch.equal(pred, torch.cat([of_one, of_one + 1000]))
        assert torch.equal(ct, -pred) and ct.dtype == torch.float32


def test_axial_pairs_are_what_the_other_metrics_see():
    mask = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    mask[..., [0, 3]] = 6
    items = [{"pred_slices": volume(), "ct_slices": volume() / 2, "mask_slices": mask}]
    [pair] = plane_pairs(items, ["xy"])
    assert all(torch.equal(a, b) for a, b in zip(pair, axial_slices(items), strict=True))
