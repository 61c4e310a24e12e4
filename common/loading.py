"""Volumes from files of any format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from os import PathLike
from pathlib import Path

import nibabel as nib
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, MapTransform, Orientation

from .dicom.reading import read_dicom
from .dicom.slices import DicomError, dicom_files


def load_volume(path: str | PathLike, like: MetaTensor | None = None) -> MetaTensor:
    """Read a volume (X, Y, Z) as MetaTensor float32: DICOM by `read_dicom`, all else by MONAI's reader for it.

    Args:
        path: file, or folder with the files of a DICOM series.
        like: a volume (..., X, Y, Z) whose axes this one is to have. Programs that convert DICOM flip axes, so a label
            map and its CT may have the same voxels in another order; turning them around moves none of them.

    Raises:
        OSError: whatever the reader raised, as one line that names the file.
        DicomError: DICOM that can't be used.
    """
    try:
        volume = read_dicom(path) if Path(path).is_dir() or dicom_files(path) else LoadImage(image_only=True)(path)
    except DicomError:
        raise
    except Exception as error:  # from zlib.error to RuntimeError: readers have no exception in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"cannot read {path}: {reason}; a damaged or incomplete file has to be replaced") from error
    return volume if like is None else _turned(volume, like)


def _turned(volume: MetaTensor, like: MetaTensor) -> MetaTensor:
    """A 3-D volume with its axes permuted and flipped to run along those of another."""
    own, wanted = ("".join(map(str, nib.aff2axcodes(v.affine.cpu().numpy()))) for v in (volume, like))
    if own == wanted or volume.ndim != 3 or "None" in own + wanted:
        return volume
    return Orientation(axcodes=wanted, labels=(("L", "R"), ("P", "A"), ("I", "S")))(volume[None])[0]


class LoadVolumed(MapTransform):
    """`load_volume` for the files at the keys, with the channel first, (1, X, Y, Z), all on the axes of the first."""

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, torch.Tensor]:
        data, first = dict(data), None
        for key in self.key_iterator(data):
            data[key] = EnsureChannelFirst()(load_volume(data[key], first))
            first = data[key] if first is None else first
        return data
