"""A seeded phantom of the abdomen: label map and CT volume, for the demo, the tests and the benchmarks.

The same seed is the same patient on every grid. As a command, `python -m common.phantom --output DIR` writes a data set
in AMOS22's layout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from ..files import replacing
from ..labels import BODY, CLASSES, NUM_CLASSES
from .anatomy import BONES, CODES, COLON, FRAME, ORGAN_TABLE, SEX_ORGANS, TISSUES, VESSELS, mesentery, small_bowel
from .canvas import Canvas, smooth_field, smooth_max, vary

FIELD_OF_VIEW = (400.0, 310.0, 400.0)
"""The trunk with some air around it, in mm: what the default spacing fits into the shape."""

TILT = Rotation.from_euler("xyz", (12, -9, 17), degrees=True).as_matrix()
"""How an oblique phantom lies in the world."""


class Phantom(NamedTuple):
    """A label map, its CT and their geometry.

    Attributes:
        label: (X, Y, Z) uint8, ids 0...16.
        hu: (X, Y, Z) int16.
        affine: (4, 4), voxel to world (RAS+) in mm; the axes run to the right, to the front and upwards.
        volumes: number of voxels of each id.
    """

    label: np.ndarray
    hu: np.ndarray
    affine: np.ndarray
    volumes: dict[int, int]


def trunk(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint skin, fat, muscular wall, ribs, diaphragm and lungs."""
    x, y, z = canvas.points
    fat = rng.uniform(9, 24)  # mm under the skin
    noise, seams = smooth_field(canvas.axes, 60, rng), smooth_field(canvas.axes, 42, rng)
    heights = (-210, -130, -60, 0, 100, 210)
    width = np.interp(z, heights, (152, 150, 137, 130, 143, 136)).astype(np.float32)
    thick = np.interp(z, heights, (94, 92, 85, 84, 99, 96)).astype(np.float32)
    back = np.clip(-y / thick, 0, 1)
    thick *= 1 - 0.07 * back * np.exp(-((x / 16) ** 2))  # the groove over the spine
    u, v = np.abs(x) / width, np.abs(y) / thick
    radius = (u**2.3 + v**2.3) ** (1 / 2.3) + 1e-6
    depth = (1 - radius) * radius / np.hypot(u / width, v / thick).clip(1e-4)  # mm below the muscles' surface
    angle = np.arctan2(u, -y / thick)  # 0 at the back, pi at the front

    layer = fat * (1 + 0.4 * back * np.interp(z, (-150, 50), (1, 0.2)) + 0.12 * noise).clip(0.4)
    canvas.put("skin", depth > -layer - 2.2)
    canvas.put("outer fat", depth > -layer)

    angles = (0, 0.35, 0.75, 1.1, 1.6, 2.3, np.pi)
    upper = np.interp(angle, angles, (36, 34, 22, 13, 12, 11, 10)).astype(np.float32)
    lower = np.interp(angle, angles, (22, 30, 56, 78, 80, 30, 10)).astype(np.float32)
    pelvis = np.interp(z, (-140, -50), (1, 0)).astype(np.float32)
    wall = upper + (lower - upper) * pelvis
    septum = (np.minimum(np.abs(noise), np.abs(seams)) < 0.03 + 0.03 * pelvis) & (depth > 3) & (pelvis + back > 0.3)
    septum |= (np.abs(depth / wall - 0.4) < 0.04) & (np.abs(angle - 1.6) < 0.6) & (z < 20) & (z > -70)
    septum |= (np.abs(x) < 2) & (y > 0) & (z < 100)  # linea alba
    canvas.put("muscle", (depth > 0) & ~septum)
    canvas.put("fat", depth > wall)

    # Ribs run downwards to the front within the wall; below the costal margin there are none.
    rise = (z + 130 * angle / np.pi) % 27 - 13.5
    rib = np.hypot(rise / 5.2, (depth - np.minimum(wall, 13) / 2) / 4)
    ribbed = z > np.interp(angle, (0, 0.5, 1.6, 2.4, np.pi), (45, 30, 5, 70, 130))
    canvas.put("cortical bone", (rib < 1) & ribbed)
    canvas.put("spongy bone", (rib < 0.6) & ribbed)

    # The diaphragm: a dome on either side and a lower one under the heart; in the middle stands the mediastinum.
    right, left, middle = (
        top - 120 * (((x - across) / half) ** 2 + ((y - 14) / 92) ** 2) ** 1.4
        for top, across, half in ((184, 64, 76), (174, -64, 76), (162, 0, 70))
    )
    above = z - smooth_max(smooth_max(right, left, 30), middle, 30)
    cavity = depth > np.minimum(wall, 13)
    mediastinum = np.abs(x) < 32 + 0.25 * np.clip(y, 0, None)
    canvas.put("muscle", cavity & (above > 0))
    canvas.put("lung", cavity & (above > 3) & ~mediastinum)
    canvas.put("outer fat", cavity & (above > 3) & mediastinum)


def spine(canvas: Canvas) -> None:
    """Paint vertebrae, discs, spinal canal and processes, from L5 upwards."""
    box = canvas.box((-50, -125, -95), (50, 5, 260))
    x, y, z = canvas.points[(slice(None), *box)]
    y = y - np.interp(z, (-95, -40, 0, 50, 100, 150, 210), (-40, -31, -31, -36, -42, -46, -48)).astype(np.float32)
    h = (z + 92) % 34 - 17  # height over the middle of the vertebra; the discs lie at +-17
    waist = 1 - 0.08 * np.cos(np.pi * h / 17)
    body = np.abs(x / (25 * waist)) ** 2.4 + np.abs(y / (18 * waist)) ** 2.4
    arch = np.hypot(x / 18, (y + 27) / 14) < 1
    spinous = (np.abs(x) < 3.5) & (y < -36) & (y > -56) & (np.abs(h + 4) < 10)
    transverse = (np.abs(y + 22 + np.abs(x) * 0.12) < 4.5) & (np.abs(np.abs(x) - 26) < 14) & (np.abs(h) < 6)
    facet = (np.hypot(np.abs(x) - 18, y + 33) < 8) & (np.abs(h) > 7)
    marrow = (np.abs(x) < 1.6) & spinous | transverse & (np.abs(np.abs(x) - 26) < 9) & (np.abs(h) < 3)
    canvas.put("muscle", (np.hypot(x / 40, (y + 30) / 26) < 1) & (z > -92) & (canvas.tissue[box] != CODES["lung"]), box)
    for tissue, where in (
        ("outer fat", arch),
        ("cortical bone", arch & (np.abs(h + 2) < 11) | spinous | transverse | facet),
        ("spongy bone", marrow),
        ("spinal canal", np.hypot(x / 11, (y + 26) / 8.5) < 1),
        ("cortical bone", body < 1),
        ("spongy bone", (body < 0.82) & (np.abs(h) < 12)),
        ("disc", (body < 1.05) & (np.abs(h) > 13)),
    ):
        canvas.put(tissue, where & (z > -92), box)


def tissue_values(seed: int) -> np.ndarray:
    """HU of every tissue of the patient of this seed, in the order of `anatomy.TISSUES`: 1...15 are the organs."""
    mean, spread = np.transpose([tissue.hu for tissue in TISSUES])
    return mean + spread * np.clip(np.random.default_rng([seed, 1]).standard_normal(len(TISSUES)), -2, 2)


def phantom(
    shape: tuple[int, int, int] = (64, 64, 64),
    seed: int = 0,
    spacing: tuple[float, float, float] | None = None,
    oblique: bool = False,
) -> Phantom:
    """Make the abdomen of one patient, from the dome of the liver to the symphysis.

    All 15 organs are there when the field of view is (up to about 6 mm per voxel: the adrenal glands are small).

    Args:
        shape: voxels to the right, to the front and upwards.
        seed: the patient; 0 or more.
        spacing: mm per voxel; the field of view is shape times spacing, about the middle of the trunk. By default
            `FIELD_OF_VIEW` fits into the shape, with square pixels in the axial plane.
        oblique: tilt the affine as a turned patient does; the voxels stay the same.

    Raises:
        ValueError: when shape or spacing aren't three positive numbers.
    """
    for name, given in (("shape", shape), ("spacing", spacing)):
        if given is not None and (len(given) != 3 or min(given) <= 0):
            raise ValueError(f"{name} must be three positive numbers (right, front, up), not {tuple(given)}")
    if spacing is None:
        plane = max(FIELD_OF_VIEW[0] / shape[0], FIELD_OF_VIEW[1] / shape[1])
        spacing = (plane, plane, FIELD_OF_VIEW[2] / shape[2])
    rng = np.random.default_rng([seed, 0])
    stature = 1 + np.array((0.05, 0.06, 0.02)) * np.clip(rng.standard_normal(3), -1.5, 1.5)
    axes = [(np.arange(n) - (n - 1) / 2) * mm / scale for n, mm, scale in zip(shape, spacing, stature, strict=True)]
    deformation = np.stack([4.5 * smooth_field(axes, 100, rng) + 1.5 * smooth_field(axes, 36, rng) for _ in range(3)])
    canvas = Canvas(axes, CODES, deformation)
    canvas.gas = smooth_field(axes, 60, rng)

    trunk(canvas, rng)
    for structure in FRAME:
        canvas.paint(vary(structure, rng))
    spine(canvas)
    sex_organ = SEX_ORGANS[rng.integers(2)]
    for structure in (*BONES, *small_bowel(rng), mesentery(rng), COLON, *VESSELS, *ORGAN_TABLE, sex_organ):
        canvas.paint(vary(structure, rng))

    label = np.array([tissue.label for tissue in TISSUES], np.uint8)[canvas.tissue]
    hu = tissue_values(seed).astype(np.float32)[canvas.tissue]
    hu += np.array([tissue.texture for tissue in TISSUES], np.float32)[canvas.tissue] * smooth_field(axes, 13, rng)
    hu = gaussian_filter(hu, 0.5)  # the scanner's point spread
    hu += 8 * rng.standard_normal(shape, dtype=np.float32)

    affine = np.diag((*spacing, 1.0))
    if oblique:
        affine[:3, :3] = TILT @ affine[:3, :3]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    counts = np.bincount(label.ravel(), minlength=NUM_CLASSES).tolist()
    return Phantom(label, np.clip(np.rint(hu), -1024, 3071).astype(np.int16), affine, dict(enumerate(counts)))


def write_dataset(
    output: Path, train: int, validation: int, shape: tuple[int, int, int], seed: int = 0, body: bool = True
) -> None:
    """Write phantoms as a data set in AMOS22's layout: imagesTr, labelsTr, imagesVa, labelsVa and dataset.json.

    Cases are amos_0001.nii.gz and so on; case n of seed s is the phantom of seed 500 s + n, so that no two seeds share
    a patient. Images are int16 HU, labels uint8 with the 15 organs and, with `body`, class 16.

    Raises:
        ValueError: unless there are 1 to 499 cases (AMOS22's ids from 500 on are MRI).
    """
    if min(train, validation) < 0 or not 1 <= train + validation <= 499:
        raise ValueError(f"{train} + {validation} cases: AMOS22's CT ids run from 1 to 499; ask for that many at most")
    names = [f"amos_{case:04d}.nii.gz" for case in range(1, train + validation + 1)]
    listing: dict[str, list[dict[str, str]]] = {"training": [], "validation": []}
    for case, name in enumerate(tqdm(names, desc="phantoms", unit="case"), start=1):
        split, suffix = ("training", "Tr") if case <= train else ("validation", "Va")
        made = phantom(shape, 500 * seed + case)
        label = made.label if body else np.where(made.label == BODY, 0, made.label).astype(np.uint8)
        entry = {"image": f"./images{suffix}/{name}", "label": f"./labels{suffix}/{name}"}
        for volume, path in ((made.hu, entry["image"]), (label, entry["label"])):
            nifti = nib.Nifti1Image(volume, made.affine)
            nifti.set_qform(made.affine, code=1)
            nifti.set_sform(made.affine, code=1)
            with replacing(output / path) as temporary:
                nib.save(nifti, temporary)
        listing[split].append(entry)
    content = {
        "name": "Abdomen phantom",
        "description": "Synthetic phantoms, not patients",
        "modality": {"0": "CT"},
        "labels": {str(c.id): c.name for c in CLASSES[: NUM_CLASSES if body else BODY]},
        "numTraining": train,
        "numValidation": validation,
        **listing,
    }
    with replacing(output / "dataset.json") as temporary:
        temporary.write_text(json.dumps(content, indent=4) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line: `python -m common.phantom --help`."""
    parser = argparse.ArgumentParser(prog="python -m common.phantom", description=write_dataset.__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--train", type=int, default=20, help="training cases (20)")
    parser.add_argument("--validation", type=int, default=4, help="validation cases (4)")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(128, 128, 48), metavar=("X", "Y", "Z"), help="voxels (128 128 48)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (0)")
    parser.add_argument("--without-body", action="store_true", help="leave class 16 out, as AMOS22 does")
    options = parser.parse_args(arguments)
    try:
        write_dataset(
            options.output, options.train, options.validation, options.shape, options.seed, not options.without_body
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
