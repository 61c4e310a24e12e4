"""An estimated body for label maps without CT: a trunk around the organs.

Arrays are on the axes of `geometry.AXES`: rows to the back, columns to the left, slices upwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from .labels import BACKGROUND, BODY
from .transforms import LabelMapError

FRONT_MM, SIDE_MM, BACK_MM = 25.0, 30.0, 50.0
"""Wall between the organs and the skin; behind them lie spine and back muscles."""

SHARED_DEPTH, SHARED_WIDTH = 0.5, 0.9
"""What the whole trunk decides of a slice's outline, the rest its neighbourhood: a pelvis is as wide as the abdomen,
though nothing but a bladder is labelled in it, but its front and back lie elsewhere."""

SMOOTH_MM = 60.0
"""How far along the body the outline of a slice depends on other slices."""

MARGIN_MM = 10.0
"""No organ comes closer to the estimated skin than this (unless the volume itself ends)."""

ROUNDNESS = 2.3
"""Exponent of the outline |x|^n + |y|^n = 1: 2 is an ellipse, trunks are a little squarer."""


def estimate_envelope(label: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Label map with class 16 as an estimated trunk around the organs, for label maps without CT: uint8.

    Each slice from the first to the last one with an organ gets a superellipse around the organs' extent: a mixture of
    their extent in its neighbourhood and in the whole trunk. Organs keep their labels; slices beyond them stay empty.

    Args:
        label: ids 0...15, rows to the back, columns to the left, slices upwards.
        spacing: mm between rows, columns and slices.

    Raises:
        LabelMapError: no organ to put a body around.
    """
    organs = label > BACKGROUND
    reached = np.flatnonzero(organs.any(axis=(0, 1)))
    if len(reached) == 0:
        raise LabelMapError("no organ to estimate a body around; check that it is the right label map")
    slices = slice(reached[0], reached[-1] + 1)
    organs = organs[..., slices]
    reach = max(1, round(SMOOTH_MM / spacing[2]))

    rows = _outline(organs.any(axis=1), spacing[0], (FRONT_MM, BACK_MM), SHARED_DEPTH, reach)
    columns = _outline(organs.any(axis=0), spacing[1], (SIDE_MM, SIDE_MM), SHARED_WIDTH, reach)
    # where organs fill the corners of their box, the outline grows until they lie inside it
    need = np.ones(organs.shape[2])
    for k in range(organs.shape[2]):
        radius = _radius(rows, columns, organs.shape, spacing, k, MARGIN_MM)
        need[k] = max(1, radius[organs[..., k]].max(initial=0))
    growth = _smooth_above(need, reach)

    result = label.astype(np.uint8)
    for k in range(organs.shape[2]):
        inside = _radius(rows, columns, organs.shape, spacing, k, 0) <= growth[k]
        result[..., slices.start + k][inside & ~organs[..., k]] = BODY
    return result


def _outline(
    present: np.ndarray, spacing: float, walls: tuple[float, float], shared: float, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width (mm, per slice) of the outline along one axis, of which organs occupy `present` (N, D)."""
    slices = np.arange(present.shape[1])
    filled = present.any(axis=0)
    low = present.argmax(axis=0)[filled] * spacing
    high = (len(present) - 1 - present[::-1].argmax(axis=0)[filled]) * spacing
    ends = []
    for sign, positions, wall in ((-1, low, walls[0]), (1, high, walls[1])):
        outwards = sign * np.interp(slices, slices[filled], positions)
        extent = shared * outwards.max() + (1 - shared) * _smooth_above(outwards, reach)
        ends.append(sign * (extent + wall))
    return (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2


def _smooth_above(values: np.ndarray, reach: int) -> np.ndarray:
    """A smooth curve that nowhere lies below `values`: a Gaussian mean of maxima, both over `reach` slices each way."""
    highest = ndimage.maximum_filter1d(values, 2 * reach + 1, mode="nearest")
    return ndimage.gaussian_filter1d(highest, reach / 3, radius=reach, mode="nearest")


def _radius(
    rows: tuple[np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray],
    shape: Sequence[int],
    spacing: Sequence[float],
    k: int,
    margin: float,
) -> np.ndarray:
    """Superelliptic distance of each pixel of slice k from the outline's centre: 1 lies `margin` mm inside the skin."""
    (row, half_height), (column, half_width) = ((centre[k], half[k] - margin) for centre, half in (rows, columns))
    y = np.abs(np.arange(shape[0]) * spacing[0] - row) / half_height
    x = np.abs(np.arange(shape[1]) * spacing[1] - column) / half_width
    return np.add.outer(y**ROUNDNESS, x**ROUNDNESS) ** (1 / ROUNDNESS)
