"""What happens to values: the HU window, the forms of a label map in front of a network, the checks at the door."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from .labels import BACKGROUND, NUM_CLASSES

HU_WINDOW = (-160.0, 240.0)
"""Level 40, width 400 (§4 of the paper): what of a CT the networks see, in HU."""

AIR_HU = -1000

NO_CONDITION = 255
"""The id that fills a label map to say nothing: the unconditional half of classifier-free guidance."""


def window(hu: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """HU to [0, 1] float32 over `HU_WINDOW`; what lies outside the window is clipped."""
    low, high = HU_WINDOW
    hu = hu.float() if isinstance(hu, torch.Tensor) else np.asarray(hu, np.float32)
    return ((hu - low) / (high - low)).clip(0, 1)


def to_hu(x: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """[0, 1] back to HU: the inverse of `window` inside `HU_WINDOW`."""
    low, high = HU_WINDOW
    return x * (high - low) + low


def one_hot(label_map: torch.Tensor) -> torch.Tensor:
    """Label map (B, 1, H, W), ids 0...16, as one channel per class: (B, 17, H, W) float32; other ids give zeros."""
    ids = torch.arange(NUM_CLASSES, dtype=label_map.dtype, device=label_map.device)
    return (label_map == ids.view(-1, 1, 1)).float()


def scalar_map(label_map: torch.Tensor) -> torch.Tensor:
    """Label map (B, 1, H, W) as one channel with the ids 0...16 spread over [-1, 1]: the paper's literal reading.

    `NO_CONDITION` becomes 0, the middle (which is also class 8).
    """
    return (label_map.float() * (2 / (NUM_CLASSES - 1)) - 1).masked_fill(label_map == NO_CONDITION, 0)


def edge_map(label_map: torch.Tensor) -> torch.Tensor:
    """Where a label map (B, 1, H, W) changes: 1.0 in both pixels of a differing pair of 4-neighbours, else 0.0.

    The border of the image makes no edge.
    """
    edge = torch.zeros_like(label_map, dtype=torch.bool)
    below = label_map[..., 1:, :] != label_map[..., :-1, :]
    right = label_map[..., :, 1:] != label_map[..., :, :-1]
    edge[..., 1:, :] |= below
    edge[..., :-1, :] |= below
    edge[..., :, 1:] |= right
    edge[..., :, :-1] |= right
    return edge.float()


class LabelMapError(ValueError):
    """A volume that can't be a label map of the 17 classes; the message is one line that ends with a remedy."""


def check_label_map(volume: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Give a label map (X, Y, Z) as uint8, or say what is wrong with it.

    Floats pass when every value is an integer: many readers give floats.

    Args:
        volume: ids 0...16, any real dtype.
        name: how messages call the volume; best its file name.

    Raises:
        LabelMapError: not 3-D, values that are no integers, ids outside 0...16, or nothing but background.
    """
    volume = volume.detach().cpu().numpy() if isinstance(volume, torch.Tensor) else np.asarray(volume)
    if volume.ndim != 3:
        raise LabelMapError(
            f"{name}: a label map is one 3-D volume of class ids, this is {volume.ndim}-D with shape {volume.shape}; "
            + (
                "save the slice as a volume of shape (X, Y, 1)"
                if volume.ndim < 3
                else "merge its channels or frames into one volume of ids 0...16 (for one-hot channels: argmax)"
            )
        )
    with np.errstate(invalid="ignore"):
        ids = volume.astype(np.uint8)
    if not (ids == volume).all() or ids.max(initial=0) >= NUM_CLASSES:
        raise LabelMapError(f"{name}: {_what_is_wrong(volume)}")
    if not ids.any():
        raise LabelMapError(f"{name}: the label map is empty (no voxel above 0); check that it is the right file")
    return ids


def _what_is_wrong(volume: np.ndarray) -> str:
    """The offending values of a volume, how many voxels hold them, and the remedy."""
    fractional = volume != np.round(volume)  # NaN counts, infinity comes with the ids below
    if fractional.any():
        return (
            f"{np.count_nonzero(fractional)} voxels hold values that are no class ids, such as "
            f"{', '.join(f'{v:g}' for v in np.unique(volume[fractional])[:3])}; "
            "give the label map, not an image, and resample label maps with nearest-neighbour interpolation"
        )
    values, counts = np.unique(volume[(volume < 0) | (volume >= NUM_CLASSES)], return_counts=True)
    shown = ", ".join(f"{v:g} ({n} voxels)" for v, n in zip(values[:6], counts[:6], strict=True))
    more = f" and {len(values) - 6} more ids, {counts.sum()} voxels in all" if len(values) > 6 else ""
    if values[0] < 0:
        remedy = "negative values look like a CT in HU: give the label map instead"
    elif values[-1] <= 117:
        remedy = "looks like TotalSegmentator's 104 or 117 classes: map them by the table in labels.py"
    else:
        remedy = "no known table: map them to the classes in labels.py"
    return f"ids outside 0...{NUM_CLASSES - 1}: {shown}{more}; {remedy}"


class Geometry(NamedTuple):
    """Where a volume lies: shape (X, Y, Z), affine 4x4 from voxel to mm, and a name for messages."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    name: str = "volume"

    @classmethod
    def of(cls, volume: MetaTensor) -> Geometry:
        """Geometry of a MetaTensor (..., X, Y, Z)."""
        return cls(tuple(volume.shape[-3:]), np.asarray(volume.affine.cpu()), file_name(volume))


def file_name(volume: torch.Tensor) -> str:
    """The file a MetaTensor came from, "volume" where it doesn't know."""
    return str(getattr(volume, "meta", {}).get("filename_or_obj", "volume"))


def check_same_geometry(image: MetaTensor | tuple, ct: MetaTensor | tuple) -> None:
    """Check that two volumes share their voxels: equal shapes, and no corner further apart than a tenth of a voxel.

    Args:
        image, ct: MetaTensors (..., X, Y, Z), or tuples (shape, affine) or (shape, affine, name).

    Raises:
        ValueError: one line with both shapes and affines.
    """
    a, b = (Geometry.of(v) if isinstance(v, MetaTensor) else Geometry(*v) for v in (image, ct))
    if tuple(a.shape) == tuple(b.shape):
        corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], float)
        corners[:, :3] *= np.array(a.shape[:3]) - 1
        apart = np.linalg.norm((corners @ (np.asarray(a.affine) - np.asarray(b.affine)).T)[:, :3], axis=1).max()
        voxel = np.linalg.norm(np.asarray(a.affine)[:3, :3], axis=0).min()
        if apart <= 0.1 * voxel:
            return
    described = " but ".join(f"{g.name} has shape {tuple(g.shape)} and affine {_one_line(g.affine)}" for g in (a, b))
    raise ValueError(f"not on the same grid: {described}; resample the label map to the CT with nearest neighbour")


def _one_line(affine: np.ndarray) -> str:
    return "[" + "; ".join(" ".join(f"{v:.6g}" for v in row) for row in np.asarray(affine)[:3]) + "]"


class CheckLabelMapd(MapTransform):
    """`check_label_map` for channel-first tensors: (1, X, Y, Z) of any dtype becomes uint8, all else raises.

    Belongs right after `LoadVolumed`; messages name the file the volume came from.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        data = dict(data)
        for key in self.key_iterator(data):
            volume = torch.as_tensor(data[key])
            # several channels are the frames of a 4-D file: show its shape as the file has it
            spatial = volume[0] if len(volume) == 1 else volume.movedim(0, -1)
            check_label_map(spatial, file_name(data[key]))
            data[key] = volume.to(torch.uint8)
        return data


class CheckHUd(MapTransform):
    """Refuse CTs that can't be in HU: values that aren't finite, or all within [-1, 1].

    Belongs right after `LoadVolumed`; messages name the file the volume came from.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        for key in self.key_iterator(data):
            low, high = (float(value) for value in torch.as_tensor(data[key]).aminmax())
            if not (math.isfinite(low) and math.isfinite(high)) or (low >= -1 and high <= 1):
                raise ValueError(f"{file_name(data[key])}: values from {low:g} to {high:g} are no CT: give one in HU")
        return dict(data)


class CheckSameGeometryd(MapTransform):
    """`check_same_geometry` of the first key with every other key (channel-first MetaTensors); changes nothing."""

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        first, *others = self.key_iterator(data)
        for key in others:
            check_same_geometry(data[first], data[key])
        return dict(data)


class Windowd(MapTransform):
    """`window` of CTs: HU to [0, 1]."""

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        return dict(data) | {key: window(data[key]) for key in self.key_iterator(data)}


class ToHUd(MapTransform):
    """Synthetic CTs in [0, 1] to HU, rounded, int16.

    Args:
        keys: the CTs.
        label_key: their label map, on the same grid.
        air_outside_body: what is background in the label map becomes air, -1000 HU; otherwise it stays at the window's
            floor, -160 HU, or what the network made there.
    """

    def __init__(
        self, keys: KeysCollection, label_key: str, air_outside_body: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key
        self.air_outside_body = air_outside_body

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        data = dict(data)
        for key in self.key_iterator(data):
            hu = to_hu(data[key]).round().to(torch.int16)
            if self.air_outside_body:
                hu[data[self.label_key].to(hu.device) == BACKGROUND] = AIR_HU
            data[key] = hu
        return data
