"""Numbers of a known volume, and pictures that show every volume the same way up."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.ndimage import find_objects, label

from common.labels import BODY, CLASSES
from common.report import (
    HU_BINS,
    colorize,
    fullest_slice,
    hu_histogram,
    hu_statistics,
    label_histogram,
    save_preview,
)

SPLEEN, LIVER = 1, 6


def test_colors_are_those_of_the_classes():
    ids = np.arange(17, dtype=np.uint8).reshape(1, 17)
    colors = colorize(ids)
    assert colors.shape == (1, 17, 3) and colors.dtype == np.uint8
    assert [tuple(color) for color in colors[0].tolist()] == [c.color for c in CLASSES]
    apart = np.linalg.norm(colors[0].astype(float)[:, None] - colors[0], axis=2) + 1000 * np.eye(17)
    assert apart.min() > 30  # told apart by eye


def known_volume() -> tuple[np.ndarray, np.ndarray]:
    """100 liver voxels with HU 1…100, 3 of body with -100, 0, 400, and background."""
    label_map = np.zeros((4, 5, 10), np.uint8)
    hu = np.full(label_map.shape, -1000, np.int16)
    label_map.flat[:100] = LIVER
    hu.flat[:100] = np.arange(1, 101)
    label_map.flat[-3:] = BODY
    hu.flat[-3:] = (-100, 0, 400)
    return label_map, hu


def test_the_histogram_counts_what_is_there():
    assert label_histogram(known_volume()[0]) == {"background": 97, "liver": 100, "body": 3}


def test_hu_statistics_are_those_of_the_known_values():
    statistics = hu_statistics(*known_volume())
    assert statistics == {
        # 1…n: mean (n + 1)/2, variance (n² − 1)/12, quartiles at 1 + (n − 1) q
        "liver": {"mean": 50.5, "std": 28.9, "p25": 25.75, "median": 50.5, "p75": 75.25},
        "body": {"mean": 100.0, "std": 216.0, "p25": -50.0, "median": 0.0, "p75": 200.0},
    }
    assert json.loads(json.dumps(statistics)) == statistics


def test_statistics_of_large_int16_volumes_do_not_overflow():
    hu = np.full((100, 100, 100), 3000, np.int16)
    assert hu_statistics(np.full(hu.shape, BODY, np.uint8), hu)["body"]["mean"] == 3000.0


def test_hu_histograms_count_the_known_values():
    assert HU_BINS == (*range(-160, 240, 20), 240)
    liver, body = [0] * 20, [0] * 20
    liver[8:14] = 19, 20, 20, 20, 20, 1  # 1…19 from 0 on, then twenties, and 100 alone
    body[3] = body[8] = body[19] = 1  # -100, 0, and 400 among the highest
    assert hu_histogram(*known_volume()) == {"liver": liver, "body": body}


def test_hu_histograms_have_every_voxel_and_closed_ends():
    label_map = np.full((6, 1, 1), BODY, np.uint8)
    for dtype in (np.int16, np.float32):
        hu = np.array([-1000, -160, -141, -140, 240, 3000], dtype).reshape(label_map.shape)
        assert hu_histogram(label_map, hu) == {"body": [3, 1, *[0] * 17, 2]}


# -------------------------------------------------------------------------------------------------------- pictures

SPACING = (2.0, 3.0, 5.0)


def marked_corner() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A block of body, stored RAS, whose right, front, upper corner is liver, and bright."""
    label_map = np.full((20, 14, 10), BODY, np.uint8)
    label_map[-6:, -4:, -3:] = LIVER  # the axes run to the right, to the front, upwards
    hu = np.where(label_map == LIVER, 240, -160).astype(np.int16)
    affine = np.diag((*SPACING, 1.0))
    affine[:3, 3] = -30, 40, 500
    return label_map, hu, affine


def stored(axes: str, label_map: np.ndarray, hu: np.ndarray, affine: np.ndarray):
    """The same volume with its voxels in another order."""
    codes = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    images = [nib.Nifti1Image(volume, affine).as_reoriented(codes) for volume in (label_map, hu)]
    assert "".join(nib.aff2axcodes(images[0].affine)) == axes
    return *(np.asarray(image.dataobj) for image in images), images[0].affine


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> np.ndarray:
    path = tmp_path_factory.mktemp("preview") / "ras.png"
    save_preview(path, *marked_corner())
    return np.round(imread(path)[..., :3] * 255).astype(np.uint8)


@pytest.mark.parametrize("axes", ["LPI", "SAL", "PLS"])
def test_the_same_anatomy_is_the_same_picture_however_it_is_stored(tmp_path, picture, axes):
    path = tmp_path / f"{axes}.png"
    save_preview(path, *stored(axes, *marked_corner()))
    np.testing.assert_array_equal(np.round(imread(path)[..., :3] * 255).astype(np.uint8), picture)


def blocks(mask: np.ndarray) -> list[tuple[slice, slice]]:
    """The three largest connected areas, from left to right."""
    areas = find_objects(label(mask)[0])
    largest = sorted(areas, key=lambda a: (a[0].stop - a[0].start) * (a[1].stop - a[1].start))[-3:]
    return sorted(largest, key=lambda area: area[1].start)


def test_planes_are_shown_as_in_radiology(picture):
    top = picture[: len(picture) // 2]
    liver = (top == CLASSES[LIVER].color).all(-1)
    masks, corners = blocks(liver | (top == CLASSES[BODY].color).all(-1)), blocks(liver)
    x, y, z = np.array((20, 14, 10)) * SPACING
    for (rows, columns), (up, left), (height, width) in zip(masks, corners, ((y, x), (z, x), (z, y)), strict=True):
        # right on the left, front or head above: the marked corner is the upper left one, in all three planes
        assert abs(up.start - rows.start) <= 1 and up.stop < (rows.start + rows.stop) / 2
        assert abs(left.start - columns.start) <= 1 and left.stop < (columns.start + columns.stop) / 2
        aspect = (rows.stop - rows.start) / (columns.stop - columns.start)
        assert aspect == pytest.approx(height / width, rel=0.03)  # true to scale


def test_the_ct_stands_below_its_mask(picture):
    middle = len(picture) // 2
    liver = blocks((picture[:middle] == CLASSES[LIVER].color).all(-1))
    bright = blocks((picture[middle:] > 250).all(-1))
    for mask, ct in zip(liver, bright, strict=True):
        assert abs(mask[1].start - ct[1].start) <= 2 and abs(mask[1].stop - ct[1].stop) <= 2


def test_the_slice_with_most_organs_is_fullest():
    labels = np.full((8, 8, 6), BODY, np.uint8)
    labels[1:7, 1:7, 1], labels[7, :, 1] = LIVER, 0  # much of one; background is no organ
    labels[2, 2, 2:5] = SPLEEN
    labels[3, 3, 2:5] = LIVER
    labels[4, 4, 3] = LIVER  # as many organs as its neighbours, but more of them
    for axis, moved in ((2, labels), (0, labels.T), (1, labels.transpose(0, 2, 1))):
        assert fullest_slice(moved, axis) == 3


def test_planes_go_through_the_slice_with_most_organs(tmp_path):
    label_map = np.full((12, 12, 12), BODY, np.uint8)
    label_map[2:10, 2:10, 2] = LIVER  # much of one organ
    label_map[5, 5, 8], label_map[6, 6, 8] = 1, 2  # little of two
    save_preview(tmp_path / "p.png", label_map, np.zeros(label_map.shape, np.int16), np.eye(4))
    pixels = np.round(imread(tmp_path / "p.png")[..., :3] * 255).astype(np.uint8)
    axial = pixels[: len(pixels) // 2, : pixels.shape[1] // 3]
    assert (axial == CLASSES[1].color).all(-1).any() and (axial == CLASSES[2].color).all(-1).any()
    assert not (axial == CLASSES[LIVER].color).all(-1).any()


def test_a_mask_without_organs_and_a_single_slice_have_a_preview_too(tmp_path):
    label_map = np.full((9, 9, 1), BODY, np.uint8)
    save_preview(tmp_path / "p.png", label_map, np.zeros(label_map.shape, np.int16), np.eye(4))
    pixels = np.round(imread(tmp_path / "p.png")[..., :3] * 255).astype(np.uint8)
    assert (pixels == CLASSES[BODY].color).all(-1).sum() > 10_000


def test_the_picture_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "preview.png"
    path.write_bytes(b"old")

    def full_disk(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*preview.png.*No space left"):
        save_preview(path, *marked_corner())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
