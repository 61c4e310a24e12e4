"""Mask faithfulness: how well a CT obeys its label map, from intensities alone, in seconds and without a segmenter.

The measures take volumes as `geometry.AXES` has them: rows, columns, slices. `faithfulness` brings any volume there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .geometry import Orientation
from .labels import BACKGROUND, BODY, CLASSES, ORGANS
from .transforms import HU_WINDOW

SPREADS = 2.0
"""How far an organ's expected range reaches about its mean, in spreads: 19 of 20 patients' means lie within."""

_DISTINCT = torch.tensor(
    [[a.hu is None or b.hu is None or abs(a.hu[0] - b.hu[0]) > a.hu[1] + b.hu[1] for b in CLASSES] for a in CLASSES]
)
"""Between which classes an edge in HU is expected; background and body are mixtures, where it always is."""


def faithfulness(
    label_map: np.ndarray | torch.Tensor,
    hu: np.ndarray | torch.Tensor,
    affine: np.ndarray,
    real: np.ndarray | torch.Tensor | None = None,
) -> dict:
    """Measure a CT against its label map; the same measures of the map's real CT, when given, stand beside.

    All is measured within `HU_WINDOW`, the only HU that a synthetic CT has. Organs that are absent are left out; what
    can't be measured is None: no mean without organs, no change along z in a single slice.

    Args:
        label_map: (X, Y, Z), ids 0...16.
        hu: the CT on the same grid, in HU.
        affine: 4x4, voxel to mm.
        real: the real CT on the same grid, in HU.

    Returns:
        For JSON: `organs` with `hu_deviation` and `edge_alignment` of each by name, the means of both over the organs
        under the same names, and `z_change`. With `real` also `real`, the same of the real CT, and `z_change_ratio`,
        synthetic over real: 1 when the CT varies along z as a real one, above it when its slices flicker.
    """
    orientation = Orientation.of(affine)
    spacing = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)[list(orientation.order)]
    volumes = (label_map, hu) if real is None else (label_map, hu, real)
    labels, *cts = (orientation.apply(torch.from_numpy(np.ascontiguousarray(volume))) for volume in volumes)
    result, *reference = (_measure(labels, ct.float().clamp(*HU_WINDOW), spacing[:2].tolist()) for ct in cts)
    for other in reference:
        result |= {"real": other, "z_change_ratio": None}
        if other["z_change"]:
            result["z_change_ratio"] = result["z_change"] / other["z_change"]
    return result


def _measure(labels: torch.Tensor, hu: torch.Tensor, spacing: list[float]) -> dict:
    box = _box_of_organs(labels)
    deviation, alignment = hu_deviation(labels[box], hu[box]), edge_alignment(labels[box], hu[box], spacing)
    return {
        "organs": {name: {"hu_deviation": deviation[name], "edge_alignment": alignment[name]} for name in deviation},
        "hu_deviation": _mean(deviation.values()),
        "edge_alignment": _mean(alignment.values()),
        "z_change": z_change(labels, hu),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def hu_deviation(labels: torch.Tensor, hu: torch.Tensor) -> dict[str, float]:
    """Mean distance in HU of each organ's voxels from its expected range, by name; 0 for voxels within.

    The range is mean -+ `SPREADS` spreads of `labels.CLASSES`. Noise, gas and stones lie outside of it: compare with
    the real CT rather than with 0.
    """
    deviation = {}
    for organ in ORGANS:
        values = hu[labels == organ.id].double()
        if len(values):
            mean, spread = organ.hu
            deviation[organ.name] = float(((values - mean).abs() - SPREADS * spread).clamp(min=0).mean())
    return deviation


def edge_alignment(labels: torch.Tensor, hu: torch.Tensor, spacing: Iterable[float]) -> dict[str, float | None]:
    """How much steeper a CT is at each organ's boundary than inside the organs, by name.

    Cliff's delta of in-plane gradient magnitudes (central differences, HU/mm),

        P(boundary > interior) - P(boundary < interior),

    between the organ's boundary pixels and the interior pixels of all organs: 1 when every boundary is steeper than any
    place inside, 0 when the mask's boundaries say nothing about the CT (an edge elsewhere, or none), below 0 when the
    CT is flatter there. It depends neither on the scale of HU nor on how steep an edge is. A boundary pixel has one of
    another class among its 4 neighbours in the slice, unless both organs are expected at the same HU (ranges of one
    spread overlap); interior pixels have none of another class. None without boundary or without any interior.

    Args:
        labels, hu: rows, columns, slices.
        spacing: mm between rows and between columns.
    """
    touching, boundary = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels, dtype=torch.bool)
    steepness = torch.zeros_like(hu)
    for axis, mm in enumerate(spacing):
        length = labels.shape[axis]
        if length < 2:
            continue
        near, far = (slice(None),) * axis + (slice(0, -1),), (slice(None),) * axis + (slice(1, None),)
        differ = labels[near] != labels[far]
        distinct = differ.clone()
        distinct[differ] = _DISTINCT[labels[near][differ].long(), labels[far][differ].long()]
        for side in (near, far):
            touching[side] |= differ
            boundary[side] |= distinct
        steepness += torch.gradient(hu, spacing=mm, dim=axis)[0].square()
    inside = (labels != BACKGROUND) & (labels != BODY) & ~touching
    interior = steepness[inside].sort().values  # squares have the order of magnitudes
    alignment = {}
    for organ in ORGANS:
        mine = labels == organ.id
        if mine.any():
            alignment[organ.name] = _cliffs_delta(steepness[mine & boundary], interior)
    return alignment


def _box_of_organs(labels: torch.Tensor) -> tuple[slice, ...]:
    """The box around all organs with a voxel of margin: what lies outside changes none of their measures."""
    organs = (labels != BACKGROUND) & (labels != BODY)
    box = []
    for axis in range(3):
        where = organs.any(dim=(axis + 1) % 3, keepdim=True).any(dim=(axis + 2) % 3, keepdim=True).flatten().nonzero()
        box.append(slice(max(int(where.min()) - 1, 0), int(where.max()) + 2) if len(where) else slice(0, 0))
    return tuple(box)


def _cliffs_delta(values: torch.Tensor, others: torch.Tensor) -> float | None:
    """P(value > other) - P(value < other) over all pairs; `others` sorted."""
    if not len(values) or not len(others):
        return None
    below, not_above = (torch.searchsorted(others, values, right=right).double().mean() for right in (False, True))
    return float((below + not_above) / len(others) - 1)


def z_change(labels: torch.Tensor, hu: torch.Tensor) -> float | None:
    """Mean |HU| between voxels of neighbouring slices that are both in the body; None without such a pair."""
    inside = labels != BACKGROUND
    pairs = inside[..., 1:] & inside[..., :-1]
    return float((hu[..., 1:] - hu[..., :-1])[pairs].abs().double().mean()) if pairs.any() else None
