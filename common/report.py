"""Pictures and numbers about a label map and its CT."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.figure import Figure

from .files import replacing
from .geometry import Orientation
from .labels import CLASSES, ORGANS
from .transforms import HU_WINDOW

HU_BINS = tuple(range(int(HU_WINDOW[0]), int(HU_WINDOW[1]) + 1, 20))
"""Edges of the bins of `hu_histogram`, in HU."""


def colorize(label_map: np.ndarray) -> np.ndarray:
    """Label map of any shape to RGB uint8, shape (..., 3)."""
    return np.array([c.color for c in CLASSES], np.uint8)[label_map]


def label_histogram(label_map: np.ndarray) -> dict[str, int]:
    """Voxels of each class that is present, by name."""
    counts = np.bincount(label_map.ravel(), minlength=len(CLASSES))
    return {c.name: int(counts[c.id]) for c in CLASSES if counts[c.id]}


def hu_statistics(label_map: np.ndarray, hu: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and quartiles of HU within each class that is present, by name."""
    statistics = {}
    for name, values in _by_class(label_map, hu):
        low, median, high = np.percentile(values, (25, 50, 75))
        statistics[name] = {
            "mean": round(float(values.mean()), 1),
            "std": round(float(values.std()), 1),
            "p25": float(low),
            "median": float(median),
            "p75": float(high),
        }
    return statistics


def hu_histogram(label_map: np.ndarray, hu: np.ndarray) -> dict[str, list[int]]:
    """Voxels of each class that is present in each bin of `HU_BINS`, by name; the outermost take what lies beyond."""
    return {
        name: np.histogram(values.clip(*HU_WINDOW), HU_BINS)[0].tolist() for name, values in _by_class(label_map, hu)
    }


def _by_class(label_map: np.ndarray, hu: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The HU of each class that is present, without background."""
    for c in CLASSES[1:]:
        values = hu[label_map == c.id]
        if values.size:
            yield c.name, values


def fullest_slice(label_map: np.ndarray, axis: int) -> int:
    """The slice along an axis (of three) that shows the most organs, and of several the one that shows most of them."""
    others = tuple(a for a in range(3) if a != axis)
    kinds = sum((label_map == c.id).any(axis=others).astype(int) for c in ORGANS)
    share = np.isin(label_map, [c.id for c in ORGANS]).mean(axis=others)
    return int(np.argmax(kinds + share))


def save_preview(path: str | os.PathLike, label_map: np.ndarray, hu: np.ndarray, affine: np.ndarray) -> None:
    """Write a PNG of three planes through the organs, the mask above the CT.

    Planes are shown as in radiology: the patient's right on the left, the head or the front above.

    Args:
        path: file to write.
        label_map, hu: volumes (X, Y, Z).
        affine: 4x4, voxel to mm.
    """
    orientation = Orientation.of(affine)
    labels, ct = (orientation.apply(torch.from_numpy(np.ascontiguousarray(v))).numpy() for v in (label_map, hu))
    spacing = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)[list(orientation.order)]
    row, column, level = (fullest_slice(labels, axis) for axis in range(3))
    planes = {
        "axial": (lambda v: v[:, :, level], spacing[0] / spacing[1]),
        "coronal": (lambda v: v[row].T[::-1], spacing[2] / spacing[1]),
        "sagittal": (lambda v: v[:, column].T[::-1], spacing[2] / spacing[0]),
    }
    figure = Figure(figsize=(12, 8), facecolor="black", layout="constrained")
    for axes, (name, (cut, aspect)) in zip(figure.subplots(2, 3).T, planes.items(), strict=True):
        axes[0].imshow(colorize(cut(labels)), aspect=aspect, interpolation="nearest")
        axes[1].imshow(cut(ct), cmap="gray", vmin=HU_WINDOW[0], vmax=HU_WINDOW[1], aspect=aspect)
        axes[0].set_title(name, color="white")
        for ax in axes:
            ax.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)
