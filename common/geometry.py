"""How a volume of any orientation, spacing and size becomes the square axial slices a network sees, and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch.nn.functional import interpolate, pad

from .labels import BACKGROUND
from .transforms import HU_WINDOW

AXES = "PLS"
"""Rows run to the patient's back, columns to the left, slices upwards: a slice looks as on a radiologist's screen."""


@dataclass(frozen=True, eq=False)
class Orientation:
    """Axis order and directions that bring a volume of a given affine to `AXES`: an exact permutation, no resampling.

    Attributes:
        order: for each new axis the axis of the volume it comes from.
        flips: the axes of the volume that change direction.
        codes: the same as a `nibabel.orientations` array, for its affine algebra.
    """

    order: tuple[int, ...]
    flips: tuple[int, ...]
    codes: np.ndarray

    @classmethod
    def of(cls, affine: np.ndarray) -> Orientation:
        """Orientation of a volume with this affine (4x4, may be oblique: the nearest axes count).

        Raises:
            ValueError: an affine that maps two axes onto one, or that isn't finite.
        """
        affine = np.asarray(affine, float)
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            raise ValueError(f"no orientation in the affine {affine.tolist()}; repair the file's header")
        codes = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(AXES))
        order = tuple(int(axis) for axis in np.argsort(codes[:, 0]))
        return cls(order, tuple(axis for axis in range(3) if codes[axis, 1] < 0), codes)

    def apply(self, volume: torch.Tensor) -> torch.Tensor:
        """(X, Y, Z) to rows, columns, slices."""
        return volume.flip(self.flips).permute(self.order)

    def undo(self, volume: torch.Tensor) -> torch.Tensor:
        """Rows, columns, slices to (X, Y, Z)."""
        return volume.permute(*np.argsort(self.order)).flip(self.flips)


@dataclass(frozen=True, eq=False)
class AxialGrid:
    """The network's grid over one volume: all its axial slices, padded to squares and resized to size x size.

    Slices are padded (centred) so that anatomy isn't stretched; the slice direction is never resampled.

    Attributes:
        orientation: between the volume's axes and `AXES`.
        plane: rows and columns of the oriented volume.
        size: rows and columns of the network grid.
        affine: 4x4, voxel of the network grid to mm.
    """

    orientation: Orientation
    plane: tuple[int, int]
    size: int
    affine: np.ndarray

    @classmethod
    def of(cls, shape: Sequence[int], affine: np.ndarray | torch.Tensor, size: int) -> AxialGrid:
        """Grid for a volume of `shape` (X, Y, Z) and `affine` (4x4, voxel to mm).

        Raises:
            ValueError: a shape that isn't 3-D, or an affine without orientation.
        """
        if len(shape) != 3:
            raise ValueError(f"an axial grid needs a 3-D volume, not one of shape {tuple(shape)}")
        affine = np.asarray(affine, float)
        orientation = Orientation.of(affine)
        rows, columns, _ = (int(shape[axis]) for axis in orientation.order)
        # pixel i of the resized slice covers `shrink` padded pixels: its centre is at (i + 1/2) shrink - 1/2
        shrink = max(rows, columns) / size
        top, left = _margin(rows, columns)
        to_oriented = np.diag([shrink, shrink, 1.0, 1.0])
        to_oriented[:2, 3] = shrink / 2 - 0.5 - top, shrink / 2 - 0.5 - left
        to_volume = nib.orientations.inv_ornt_aff(orientation.codes, tuple(int(n) for n in shape))
        return cls(orientation, (rows, columns), size, affine @ to_volume @ to_oriented)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between rows, columns and slices of the network grid, in mm."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))

    def to_slices(self, volume: torch.Tensor, label: bool) -> torch.Tensor:
        """Volume (X, Y, Z) to slices (size, size, D).

        Args:
            volume: label map, or CT in HU.
            label: True: nearest neighbour, padded with background, uint8. False: clipped to `HU_WINDOW` first (as
                the window is linear inside, this is resizing the windowed CT), bilinear, antialiased where it shrinks,
                padded with the window's floor, float32 HU.
        """
        volume = _typed(volume, label)
        volume = volume if label else volume.clamp(*HU_WINDOW)
        slices = self.orientation.apply(volume).movedim(2, 0)[:, None]
        rows, columns = self.plane
        side, (top, left) = max(self.plane), _margin(rows, columns)
        margins = (left, side - columns - left, top, side - rows - top)
        slices = pad(slices, margins, value=BACKGROUND if label else HU_WINDOW[0])
        return _resize(slices, self.size, label)[:, 0].movedim(0, 2)

    def from_slices(self, slices: torch.Tensor, label: bool = False) -> torch.Tensor:
        """Slices (size, size, D) back to (X, Y, Z): the volume's own shape, axis order and directions.

        Label maps come back as uint8 by nearest neighbour, all else as float32, bilinear.
        """
        rows, columns = self.plane
        top, left = _margin(rows, columns)
        slices = _resize(_typed(slices, label).movedim(2, 0)[:, None], max(self.plane), label)[:, 0]
        return self.orientation.undo(slices[:, top : top + rows, left : left + columns].movedim(0, 2))


def _margin(rows: int, columns: int) -> tuple[int, int]:
    """Rows above and columns before a slice that is padded to a square."""
    side = max(rows, columns)
    return (side - rows) // 2, (side - columns) // 2


def _typed(volume: torch.Tensor, label: bool) -> torch.Tensor:
    return volume.to(torch.uint8 if label else torch.float32)


def _resize(slices: torch.Tensor, size: int, label: bool) -> torch.Tensor:
    """(D, 1, n, n) to (D, 1, size, size), slice by slice."""
    if label:
        return interpolate(slices, (size, size), mode="nearest-exact")
    return interpolate(slices, (size, size), mode="bilinear", antialias=True)


class ToAxialGridd(MapTransform):
    """Bring channel-first MetaTensors (1, X, Y, Z) to the network grid: (1, size, size, D) with that grid's affine.

    The meta remembers the volume's own grid (`source_shape`, `source_affine`) for `FromAxialGridd`.

    Args:
        keys: label maps, and CTs in HU, which come out clipped to the window (`Windowd` makes them [0, 1] afterwards).
        size: rows and columns of the network grid.
        label_keys: those of `keys` that are label maps.
    """

    def __init__(
        self, keys: KeysCollection, size: int, label_keys: KeysCollection = ("image",), allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.size = size
        self.label_keys = (label_keys,) if isinstance(label_keys, str) else tuple(label_keys)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        data = dict(data)
        for key in self.key_iterator(data):
            volume = data[key]
            grid = AxialGrid.of(volume.shape[1:], volume.affine.cpu(), self.size)
            slices = grid.to_slices(volume.as_tensor()[0], key in self.label_keys)
            # tensors, because tuples and arrays don't survive a loader's collating and decollating unchanged
            source = {"source_shape": torch.tensor(volume.shape[1:]), "source_affine": volume.affine.clone()}
            meta = volume.meta | source | {"affine": torch.from_numpy(grid.affine)}
            data[key] = MetaTensor(slices[None], meta=meta)
        return data


class FromAxialGridd(MapTransform):
    """Bring channel-first tensors (1, size, size, D) back to the grid that `orig_key` had before `ToAxialGridd`.

    The results have that volume's shape, affine and meta. Integer tensors are label maps, floating ones are images.

    Args:
        keys: what to bring back, such as the prediction.
        orig_key: MetaTensor whose meta remembers the grid.

    Raises:
        KeyError: `orig_key` never went through `ToAxialGridd`.
    """

    def __init__(self, keys: KeysCollection, orig_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orig_key = orig_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        data = dict(data)
        meta = dict(data[self.orig_key].meta)
        if "source_shape" not in meta:
            raise KeyError(f"{self.orig_key!r} remembers no grid of its own: put ToAxialGridd before FromAxialGridd")
        shape, affine = meta.pop("source_shape").tolist(), meta.pop("source_affine")
        meta["affine"] = affine
        for key in self.key_iterator(data):
            slices = torch.as_tensor(data[key])
            slices = slices.as_tensor() if isinstance(slices, MetaTensor) else slices
            grid = AxialGrid.of(shape, affine.cpu(), slices.shape[1])
            volume = grid.from_slices(slices[0], label=not slices.is_floating_point())
            data[key] = MetaTensor(volume[None], meta=meta)
        return data
