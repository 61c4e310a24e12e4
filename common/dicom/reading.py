"""DICOM in: a series of slices, or a segmentation object (SEG) as a label map.

pydicom reads what the files say of themselves; ITK reads the pixels of a series, because it knows the compressed ones.
ITK's geometry of a series isn't taken: it spreads slices over the gap of a missing one, straightens a leaning stack and
stacks slices of different directions, all without an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from ..labels import BACKGROUND, BODY, CLASSES, OTHER_NAMES
from .slices import DicomError, dicom_files, even_grid, pydicom

UNKNOWN = 255
"""Instead of a class id."""


def read_dicom(path: str | PathLike) -> MetaTensor:
    """Read a folder with the slices of one series, or a SEG: its file, or a folder with nothing else.

    Axes are columns, rows, and slices along their normal; the stack may lean. Of a SEG, the slices between its first
    and its last one that it leaves out are background.

    Returns:
        (X, Y, Z) float32: the values of a series, rescaled as its files ask for (HU of a CT, class ids of a label map),
        or the class ids of a SEG; with the affine in RAS.

    Raises:
        DicomError: not one series alone; slices that are missing or lie unevenly; a fractional SEG, or one whose organs
            overlap or are of no known class.
    """
    files = dicom_files(path)
    if not files:
        raise DicomError(f"{path}: no DICOM file there; give the folder that holds the files themselves")
    found = {file: pydicom().dcmread(file, stop_before_pixels=True) for file in files}
    files, headers = zip(*((f, h) for f, h in found.items() if "DirectoryRecordSequence" not in h), strict=True)
    if len(files) == 1 and "SegmentSequence" in headers[0]:
        volume, affine = _label_map(pydicom().dcmread(files[0]), str(files[0]))
    elif Path(path).is_dir():
        volume, affine = _series(files, headers, str(path))
    else:
        raise DicomError(f"{path}: no SEG; put the slices of a series into a folder of their own, one folder a case")
    meta = {"filename_or_obj": str(path), "original_channel_dim": float("nan")}  # as MONAI's readers say "no channel"
    return MetaTensor(torch.from_numpy(np.array(volume, np.float32)), affine=torch.from_numpy(affine), meta=meta)


def _series(files: Sequence[Path], headers: Sequence[Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Volume (X, Y, Z) and affine of single slices."""
    import itk  # takes seconds

    series = sorted({f"{header.get('Modality')} {header.get('SeriesInstanceUID')}" for header in headers})
    if len(series) > 1:
        raise DicomError(f"{name}: {len(series)} series, {', '.join(series)}; leave one of them in this folder")
    if any("ImagePositionPatient" not in header for header in headers):
        raise DicomError(f"{name}: files that don't say where they lie; give a series of one file a slice")
    if not _are_close([(*header.ImageOrientationPatient, *header.PixelSpacing) for header in headers]):
        raise DicomError(f"{name}: slices of different directions or spacing; leave those of one volume in this folder")
    positions = np.array([header.ImagePositionPatient for header in headers], float)
    first = headers[0]
    grid = even_grid(first.ImageOrientationPatient, first.PixelSpacing, positions, (None, _distance(first)), name)
    places = len(set(grid.levels.tolist()))
    if places < grid.depth:
        raise DicomError(f"{name}: {grid.depth - places} of {grid.depth} slices are missing; export the series again")
    if places < len(files):
        raise DicomError(f"{name}: {len(files)} files for {places} slices; leave one file a slice in this folder")
    ascending = [str(files[k]) for k in np.argsort(grid.levels)]
    # As float, because slices may be rescaled in different ways, and ITK would take the first one's type for all.
    volume = itk.array_from_image(itk.imread(ascending if places > 1 else ascending[0], itk.F))
    if volume.ndim != 3:
        raise DicomError(f"{name}: slices in colour; give a CT in HU, or a label map of class ids")
    return volume.T, grid.affine


def _label_map(seg: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Label map (X, Y, Z) and affine of a SEG."""
    if seg.SegmentationType == "FRACTIONAL":
        raise DicomError(f"{name}: a fractional SEG, of how likely or how full a voxel is; save it as a binary one")
    ids = class_ids(seg.SegmentSequence, name)
    frames = seg.PerFrameFunctionalGroupsSequence
    positions = np.array([_group(seg, f, "PlanePositionSequence").ImagePositionPatient for f in frames], float)
    orientations = [_group(seg, f, "PlaneOrientationSequence").ImageOrientationPatient for f in frames]
    if not _are_close(orientations):
        raise DicomError(f"{name}: frames of different directions; save one volume in a SEG")
    measures = _group(seg, frames[0], "PixelMeasuresSequence")
    # Which slices are empty and left out, positions don't say; the distance that the file states does.
    stated = float(measures.get("SpacingBetweenSlices") or 0) or None
    distances = (stated, None, _distance(measures))
    grid = even_grid(orientations[0], measures.PixelSpacing, positions, distances, name)

    volume = np.zeros((seg.Columns, seg.Rows, grid.depth), np.uint8)
    # at once, because pydicom 3.0's iter_pixels stumbles over bits of frames that end within a byte
    masks = seg.pixel_array.reshape(len(frames), seg.Rows, seg.Columns)
    for frame, level, numbers in zip(frames, grid.levels, masks.transpose(0, 2, 1), strict=True):
        if seg.SegmentationType == "BINARY":  # a LABELMAP holds the segments' numbers
            numbers = numbers * np.uint16(_group(seg, frame, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        _add(volume[..., level], ids[numbers], name)
    return volume, grid.affine


def _add(labels: np.ndarray, more: np.ndarray, name: str) -> None:
    """Lay further labels over those of a slice, in place; organs go before the body, which is what they leave."""
    both = (labels != more) & _is_organ(labels) & _is_organ(more)
    if both.any():
        one, other = (CLASSES[int(slice_[both][0])].name for slice_ in (labels, more))
        raise DicomError(f"{name}: {one} and {other} overlap; give each voxel to one of them (body may lie under all)")
    new = (more != BACKGROUND) & ~_is_organ(labels)
    labels[new] = more[new]


def _is_organ(labels: np.ndarray) -> np.ndarray:
    return (labels != BACKGROUND) & (labels != BODY)


def class_ids(segments: Sequence[Any], name: str) -> np.ndarray:
    """The class id of each segment number, 0...65535.

    A segment's label counts: a class by our name or another's, whatever its case, separators and order of words
    ("kidney_right"), or its id ("6", "Label 6"; not "Segment 6", which may be the liver's sixth). A segment's number
    doesn't count: DICOM numbers segments from 1 on without gaps, whatever they show.

    Args:
        segments: SegmentSequence of a SEG.
        name: how messages call it.

    Raises:
        DicomError: segments of no known class.
    """
    known = {_words(c.name): c.id for c in CLASSES} | {(str(c.id),): c.id for c in CLASSES}
    known |= {_words(other): known[_words(ours)] for other, ours in OTHER_NAMES.items()}
    ids = np.full(1 << 16, UNKNOWN, np.uint8)
    ids[0] = BACKGROUND
    unknown = []
    for segment in segments:
        words = _words(re.sub(r"^(label|class)\b", "", str(segment.SegmentLabel).lower().replace("_", " ")))
        id_ = known.get(words, UNKNOWN)
        ids[segment.SegmentNumber] = id_
        if id_ == UNKNOWN:
            unknown.append(str(segment.SegmentLabel))
    if unknown:
        shown = ", ".join(f'"{label}"' for label in unknown[:5]) + (
            f" and {len(unknown) - 5} more" if unknown[5:] else ""
        )
        names = ", ".join(c.name for c in CLASSES[1:])
        raise DicomError(f"{name}: segments of no known class: {shown}; leave them out, or call them one of: {names}")
    return ids


def _words(label: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"[^\W\d_]+|\d+", label)))


def _are_close(directions: Sequence[Sequence[float]]) -> bool:
    """Whether all are the same but for rounding."""
    return np.ptp(np.array(directions, float), axis=0).max() < 1e-4


def _group(seg: Any, frame: Any, name: str) -> Any:
    """A functional group of a frame: its own, or the one that all frames share."""
    groups = frame if name in frame else seg.SharedFunctionalGroupsSequence[0]
    return groups[name][0]


def _distance(header: Any) -> float | None:
    """The distance of slices that a header states, in mm."""
    return float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 0) or None
