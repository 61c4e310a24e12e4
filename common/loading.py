"""Volumes from files of any format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cache
from os import PathLike
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, MapTransform, Orientation
from torch.nn.functional import pad

from .dicom.reading import read_dicom
from .dicom.slices import DicomError, dicom_files
from .transforms import file_name


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
        volume = read_dicom(path) if Path(path).is_dir() or dicom_files(path) else _reader()(path)
    except DicomError:
        raise
    except Exception as error:  # from zlib.error to RuntimeError: readers have no exception in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"cannot read {path}: {reason}; a damaged or incomplete file has to be replaced") from error
    return volume if like is None else _turned(volume, like)


@cache
def _reader() -> LoadImage:
    """One for all volumes: to make it, MONAI looks for every reader there is, and says which it misses."""
    return LoadImage(image_only=True)


def _turned(volume: MetaTensor, like: MetaTensor) -> MetaTensor:
    """A 3-D volume with its axes permuted and flipped to run along those of another."""
    own, wanted = ("".join(map(str, nib.aff2axcodes(v.affine.cpu().numpy()))) for v in (volume, like))
    if own == wanted or volume.ndim != 3 or "None" in own + wanted:
        return volume
    return Orientation(axcodes=wanted, labels=(("L", "R"), ("P", "A"), ("I", "S")))(volume[None])[0]


def fill(label: MetaTensor, ct: MetaTensor) -> MetaTensor:
    """Bring a SEG's label map (..., X, Y, Z) to the grid of its CT: slices that a SEG leaves out are empty.

    Args:
        label: volume that `load_volume` read; one that isn't of a SEG, or doesn't lie within the CT voxel on voxel,
            comes back as it is.
        ct: its CT, on the same axes.
    """
    if not dicom_files(file_name(label)) or label.shape[-3:] == ct.shape[-3:]:
        return label
    to_ct = np.linalg.solve(ct.affine.numpy(), label.affine.numpy())
    before = np.round(to_ct[:3, 3]).astype(int)
    after = np.array(ct.shape[-3:]) - label.shape[-3:] - before
    apart = np.abs(to_ct[:3, :3] - np.eye(3)) * np.array(label.shape[-3:])
    if max(apart.max(), np.abs(to_ct[:3, 3] - before).max()) > 0.1 or min(before.min(), after.min()) < 0:
        return label
    margins = [int(n) for axis in (2, 1, 0) for n in (before[axis], after[axis])]
    return MetaTensor(pad(label.as_tensor(), margins), affine=ct.affine, meta=label.meta)


class LoadVolumed(MapTransform):
    """`load_volume` for the files at the keys, with the channel first, (1, X, Y, Z).

    The first is the label map; all come on its axes, and it on the grid of the second (see `fill`).
    """

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, torch.Tensor]:
        label, *others = self.key_iterator(data)
        data = dict(data)
        data[label] = EnsureChannelFirst()(load_volume(data[label]))
        for key in others:
            data[key] = EnsureChannelFirst()(load_volume(data[key], data[label]))
        if others:
            data[label] = fill(data[label], data[others[0]])
        return data
