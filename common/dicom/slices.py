"""What reading and writing DICOM share: which files are DICOM, and where slices lie."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

SUFFIX = ".dcm"

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From DICOM's patient coordinates (left, posterior, superior) to MONAI's and NIfTI's; and back."""

SAME_SLICE = 0.01
"""Slices that are less than this apart along their normal, in mm, are the same."""

UNEVEN = 0.1
"""How far, in slice distances, a slice may lie from where even distances would put it."""


INSTALL = "python -m pip install 'pydicom>=3.0'"


class DicomError(ValueError):
    """DICOM that can't be used; the message is one line that ends with a remedy."""


def pydicom() -> ModuleType:
    """The package of that name, which is needed for DICOM alone.

    Raises:
        DicomError: it isn't installed, or too old.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DicomError(f"DICOM needs pydicom (the extra `dicom`): {INSTALL}") from error
    if int(pydicom.__version__.partition(".")[0]) < 3:
        raise DicomError(f"DICOM needs pydicom 3, not {pydicom.__version__}: {INSTALL}")
    return pydicom


def dicom_files(path: str | PathLike) -> list[Path]:
    """The DICOM files in a folder, or a file itself that ends in `.dcm`; none where it is no such thing.

    In a folder the content counts ("DICM" at byte 128), not the name: many exports have no suffix.
    """
    path = Path(path)
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if file.is_file() and _is_dicom(file)]
    return [path] if path.name.lower().endswith(SUFFIX) else []


def _is_dicom(file: Path) -> bool:
    with open(file, "rb") as content:
        content.seek(128)
        return content.read(4) == b"DICM"


class Grid(NamedTuple):
    """Where slices lie: the place of each in the stack, how many places there are, the affine (RAS).

    Axes are columns, rows, slices, as ITK and MONAI have them.
    """

    levels: np.ndarray
    depth: int
    affine: np.ndarray


def even_grid(
    orientation: Sequence[float],
    spacing: Sequence[float],
    positions: np.ndarray,
    distances: Sequence[float | None],
    name: str,
) -> Grid:
    """The evenly spaced stack that slices belong to, ascending along their normal; it may lean.

    Places may be empty (a SEG leaves out empty slices) and hold several slices (of several segments).

    Args:
        orientation: ImageOrientationPatient.
        spacing: PixelSpacing: between rows, between columns.
        positions: ImagePositionPatient of each slice (N, 3).
        distances: of slices, in mm; the first that fits all gaps counts. None is the smallest gap, or what isn't known.
        name: how messages call them.

    Raises:
        DicomError: uneven distances.
    """
    along_row, along_column = np.reshape(np.asarray(orientation, float), (2, 3))
    normal = np.cross(along_row, along_column)
    order = np.argsort(positions @ normal, kind="stable")
    ascending = positions[order]
    gaps = np.diff(ascending @ normal)
    gaps[gaps < SAME_SLICE] = 0
    if gaps.any():
        tried = (_stacked(ascending, gaps, distance or gaps[gaps > 0].min()) for distance in distances)
        found = next((stack for stack in tried if stack), None)
    else:
        found = np.zeros(len(positions), int), normal * next(filter(None, distances), 1)
    if found is None:
        raise DicomError(f"{name}: slices lie at uneven distances; resample it to even ones and export it again")
    levels, step = found
    affine = np.eye(4)
    affine[:3, :3] = np.stack([along_row * float(spacing[1]), along_column * float(spacing[0]), step], axis=1)
    affine[:3, 3] = ascending[0]
    return Grid(levels[np.argsort(order)], int(levels[-1]) + 1, LPS_TO_RAS @ affine)


def _stacked(positions: np.ndarray, gaps: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Places of ascending positions in a stack of about this distance, and its step in mm; None: they don't fit."""
    counts = gaps / distance
    levels = np.concatenate([[0], np.cumsum(np.round(counts).astype(int))])
    step = (positions[-1] - positions[0]) / max(levels[-1], 1)
    apart = np.linalg.norm(positions - positions[0] - levels[:, None] * step, axis=1) / np.linalg.norm(step)
    fits = max(apart.max(), np.abs(counts - np.round(counts)).max()) <= UNEVEN
    return (levels, step) if fits else None
