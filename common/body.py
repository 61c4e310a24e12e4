"""The body class: everything inside the skin that is no organ, from the CT or, without one, as an estimate.

Arrays here are on the axes of `geometry.AXES` (rows to the back, columns to the left, slices upwards), in any spacing;
`AddBodyd` and the command take volumes of any orientation. For a folder of CTs and label maps:

    python -m common.body --images imagesTr --labels labelsTr --output labelsTr_body
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from skimage.morphology import isotropic_dilation, isotropic_opening
from tqdm import tqdm

from .envelope import estimate_envelope
from .files import replacing
from .geometry import Orientation
from .labels import BACKGROUND, BODY
from .loading import load_volume
from .transforms import LabelMapError, check_label_map, check_same_geometry, file_name

TISSUE_HU = -500.0
"""Halfway between air and water: what is denser is body or table."""

CLIPPED_MARGIN_HU = 10.0
"""How far above a clipped volume's floor tissue begins: below fat (-120), above the floor's own rounding."""

TABLE_MM = 5.0
"""Radius of the opening: what is thinner than twice this, as the shells of a table, goes."""

SURROUNDED = 2 / 3
"""The share of its rim by which gas is the patient's; the gap between a back and its table has about half."""


def body_mask(hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Where the patient is: bool, same shape as `hu`.

    Threshold at -500 HU, or, in a volume that was clipped above that (a windowed CT whose air is -160), 10 HU above its
    lowest value; table removal by opening; the largest component of the volume; holes filled slice by slice. Thin walls
    around lung and bowel gas, which the opening breaks as if they were a table, come back with the gas they enclose.

    Args:
        hu: CT in HU, rows, columns, slices.
        spacing: mm between rows, columns and slices.
    """
    in_plane = tuple(spacing[:2])
    tissue = hu > max(TISSUE_HU, float(hu.min()) + CLIPPED_MARGIN_HU)
    core = np.zeros_like(tissue)
    for k in range(hu.shape[2]):
        core[..., k] = isotropic_opening(tissue[..., k], TABLE_MM, spacing=in_plane)
    body = _largest_component(core)
    for k in range(hu.shape[2]):
        gas = _enclosed_gas(tissue[..., k], body[..., k])
        walls = isotropic_dilation(gas, 2 * TABLE_MM, spacing=in_plane) & tissue[..., k]
        body[..., k] = ndimage.binary_fill_holes(body[..., k] | gas | walls)
    return body


def _enclosed_gas(tissue: np.ndarray, core: np.ndarray) -> np.ndarray:
    """The holes in a slice's tissue whose rim is mostly core: gas in the patient, not the gap above a table."""
    holes, _ = ndimage.label(ndimage.binary_fill_holes(tissue) & ~tissue)
    rim = ndimage.grey_dilation(holes, footprint=ndimage.generate_binary_structure(2, 1)) * tissue
    counts = np.bincount(rim.ravel(), minlength=holes.max() + 1)
    in_core = np.bincount(rim[core], minlength=holes.max() + 1)
    accepted = in_core > SURROUNDED * counts
    accepted[0] = False
    return accepted[holes]


def _largest_component(mask: np.ndarray) -> np.ndarray:
    components, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(components.ravel())
    return components == sizes[1:].argmax() + 1


def add_body(label: np.ndarray, hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Label map (uint8) with class 16 wherever `body_mask` of the CT finds body and no organ is labelled."""
    return np.where((label == BACKGROUND) & body_mask(hu, spacing), np.uint8(BODY), label.astype(np.uint8))


def with_body(label: torch.Tensor, affine: np.ndarray | torch.Tensor, hu: torch.Tensor | None) -> torch.Tensor:
    """Label map (X, Y, Z) of any orientation with class 16: `add_body` from its CT, `estimate_envelope` without one."""
    affine = np.asarray(affine, float)
    orientation = Orientation.of(affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[list(orientation.order)]
    oriented = orientation.apply(label).numpy()
    if hu is None:
        result = estimate_envelope(oriented, spacing)
    else:
        result = add_body(oriented, orientation.apply(hu).numpy(), spacing)
    return orientation.undo(torch.from_numpy(result))


class AddBodyd(MapTransform):
    """Give label maps (channel-first MetaTensors (1, X, Y, Z), any orientation) without class 16 their body class.

    Label maps that hold class 16 stay as they are. Belongs between `CheckLabelMapd` and `ToAxialGridd`.

    Args:
        keys: the label maps.
        ct_key: CT in HU on the same grid; where the data holds it, the body comes from it.
        missing: without a CT: "error", or "estimate" an outline around the organs.

    Raises:
        LabelMapError: no class 16, no CT, and `missing` is "error".
        ValueError: label map and CT are on different grids.
    """

    def __init__(
        self,
        keys: KeysCollection,
        ct_key: str | None = None,
        missing: Literal["error", "estimate"] = "error",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if missing not in ("error", "estimate"):
            raise ValueError(f"missing is 'error' or 'estimate', not {missing!r}")
        self.ct_key = ct_key
        self.missing = missing

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        data = dict(data)
        for key in self.key_iterator(data):
            label = data[key]
            if (label == BODY).any():
                continue
            ct = data.get(self.ct_key)
            if ct is not None:
                check_same_geometry(label, ct)
            elif self.missing == "error":
                raise LabelMapError(
                    f"{file_name(label)}: no body class (id {BODY}); make it from the CTs with `python -m {__package__}"
                    ".body --images DIR --labels DIR --output DIR` from the bundle's folder, or estimate it with "
                    "--missing_body estimate"
                )
            hu = None if ct is None else ct.as_tensor()[0].cpu()
            result = with_body(label.as_tensor()[0].cpu(), label.affine.cpu(), hu)
            data[key] = MetaTensor(result[None], meta=label.meta)
        return data


def _header(path: Path) -> nib.Nifti1Image:
    """The volume, of which nothing but the header has been read."""
    try:
        return nib.load(path)
    except (OSError, EOFError, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f"cannot read {path}: {error}; a damaged or incomplete file has to be replaced") from error


def _pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """(CT, label map) of equal names in two folders, their grids compared by their headers alone."""
    for folder in (images, labels):
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}; give --images and --labels the folders of the NIfTI files")
    names = sorted(path.name for pattern in ("*.nii", "*.nii.gz") for path in labels.glob(pattern))
    if not names:
        raise ValueError(f"no .nii or .nii.gz in {labels}; give --labels the folder of the label maps")
    pairs = [(images / name, labels / name) for name in names]
    for image, label in pairs:
        if not image.is_file():
            raise ValueError(f"{label} has no CT of the same name in {images}; add it or take the label map away")
        ct, mask = _header(image), _header(label)
        check_same_geometry((mask.shape, mask.affine, label), (ct.shape, ct.affine, image))
    return pairs


def main(arguments: Sequence[str] | None = None) -> None:
    """Write 17-class label maps for a folder of CTs and label maps: same names, headers and affines."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of CTs in HU (.nii, .nii.gz)")
    parser.add_argument("--labels", type=Path, required=True, help="folder of label maps with the CTs' file names")
    parser.add_argument("--output", type=Path, required=True, help="folder for the label maps with class 16")
    options = parser.parse_args(arguments)
    if options.output.resolve() in (options.labels.resolve(), options.images.resolve()):
        parser.error("--output is a folder of the input: choose another one")
    try:
        for image, label in tqdm(_pairs(options.images, options.labels), unit="case"):
            volume = load_volume(label)
            ids = torch.from_numpy(check_label_map(volume, str(label)))
            if not (ids == BODY).any():
                ids = with_body(ids, volume.affine, load_volume(image).as_tensor())
            result = nib.Nifti1Image(ids.numpy(), None, _header(label).header)
            result.set_data_dtype(np.uint8)
            with replacing(options.output / label.name) as path:
                nib.save(result, path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
