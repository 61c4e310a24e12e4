"""The body class against bodies that are known: the phantom, cylinders on tables, outlines in closed form."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from common.body import AddBodyd, add_body, body_mask, main, with_body
from common.envelope import estimate_envelope
from common.labels import BODY
from common.phantom import phantom
from common.transforms import LabelMapError

AIR, FAT, SOFT, LUNG, PLATE = -1000, -100, 40, -850, 200
SPACING = (2.0, 2.0, 5.0)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def disc(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """Pixels within `radius` mm of `centre` (mm)."""
    y, x = np.arange(shape[0]) * SPACING[0], np.arange(shape[1]) * SPACING[1]
    return np.add.outer((y - centre[0]) ** 2, (x - centre[1]) ** 2) <= radius**2


def patient(table_gap: float | None = None, depth: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A cylinder of 80 mm with fat, two lungs and a bowel full of gas, on a table of two plates; CT and true body."""
    shape = (120, 128)
    body = disc(shape, (100, 128), 80)
    hu = np.where(body, FAT, AIR)
    hu[disc(shape, (100, 128), 68)] = SOFT
    for lung in ((95, 90), (95, 166)):
        hu[disc(shape, lung, 25)] = LUNG
    hu[disc(shape, (60, 128), 12)] = AIR
    if table_gap is not None:
        rows = np.arange(shape[0]) * SPACING[0]
        for top in (181 + table_gap, 205 + table_gap):  # the cylinder's lowest row lies at 180 mm
            hu[((rows >= top) & (rows < top + 6))[:, None] & ~body & (np.arange(128) > 8) & (np.arange(128) < 120)] = (
                PLATE
            )
    noise = np.random.default_rng(0).normal(0, 15, (*shape, depth))
    return hu[..., None] + noise, np.repeat(body[..., None], depth, axis=2)


def test_lungs_and_bowel_gas_are_inside_the_body():
    hu, body = patient()
    assert dice(body_mask(hu, SPACING), body) > 0.995


@pytest.mark.parametrize("gap", [10.0, 0.0])
def test_the_table_goes_whether_it_touches_or_not(gap):
    hu, body = patient(table_gap=gap)
    found = body_mask(hu, SPACING)
    assert dice(found, body) > 0.99
    assert not found[97:].any()  # from 194 mm on there is only table


def test_a_plate_thicker_than_the_opening_goes_when_it_lies_apart():
    hu, body = patient()
    hu[100:112, 10:118] = PLATE
    assert dice(body_mask(hu, SPACING), body) > 0.99


@pytest.mark.parametrize("floor", [-160, -200])
def test_a_clipped_ct_gives_the_body_of_the_whole_one(floor):
    hu, body = patient(table_gap=0)
    clipped = hu.clip(floor, 240)
    assert (clipped == floor).mean() > 0.4
    assert dice(body_mask(clipped, SPACING), body) > 0.99


@pytest.mark.parametrize(("centre", "radius", "content"), [((40, 128), 14, AIR), ((100, 84), 30, LUNG)])
def test_walls_that_the_opening_breaks_keep_bowel_gas_and_lung_inside(centre, radius, content):
    hu, body = patient(table_gap=0)
    hu[disc(hu.shape[:2], centre, radius)] = content  # 6 mm below the skin
    assert dice(body_mask(hu, SPACING), body) > 0.99


def test_the_gap_between_a_back_and_its_table_is_not_the_body():
    hu, body = patient(table_gap=0)
    for column in (40, 86):  # what the patient lies on holds the table's edges: it encloses air at both sides
        hu[80:94, column : column + 2] = np.maximum(hu[80:94, column : column + 2], PLATE)
    assert ndimage.binary_fill_holes(hu[..., 0] > -500).sum() > body[..., 0].sum() * 1.05
    assert dice(body_mask(hu, SPACING), body) > 0.985


def test_a_body_cut_by_the_field_of_view_reaches_its_border():
    hu, body = patient()
    hu, body = hu[:, 30:100], body[:, 30:100]
    found = body_mask(hu, SPACING)
    assert dice(found, body) > 0.995
    assert np.array_equal(found[:, 0], body[:, 0])


@pytest.mark.parametrize("seed", [0, 3])
def test_the_phantoms_body_is_found_in_its_ct(seed):
    made = phantom(seed=seed)
    organs = np.where(made.label == BODY, 0, made.label)
    result = with_body(torch.from_numpy(organs), made.affine, torch.from_numpy(made.hu.astype(np.float32))).numpy()
    assert dice(result > 0, made.label > 0) > 0.97
    assert np.array_equal(result[organs > 0], organs[organs > 0])


def test_organs_win_over_the_body_and_stay_outside_it():
    hu, _ = patient()
    label = np.zeros(hu.shape, np.uint8)
    label[40:50, 60:70] = 6
    label[2:4, 2:4] = 1  # in the air: what was labelled stays labelled
    expected = np.where(body_mask(hu, SPACING), BODY, 0)
    expected[label > 0] = label[label > 0]
    result = add_body(label, hu, SPACING)
    assert result.dtype == np.uint8
    assert np.array_equal(result, expected)


def organ_cylinder(radius: float, slices=slice(3, 9), shape=(120, 140, 12)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[disc(shape[:2], (120, 140), radius), slices] = 6
    return label


def test_the_envelope_of_a_cylinder_is_its_superellipse():
    result = estimate_envelope(organ_cylinder(40), SPACING)
    assert not result[..., :3].any() and not result[..., 9:].any()
    # 25 mm in front, 30 at each side, 50 behind: half axes 77.5 and 70 around a centre 12.5 mm further back
    y, x = np.arange(120) * 2.0, np.arange(140) * 2.0
    expected = np.add.outer(np.abs((y - 132.5) / 77.5) ** 2.3, np.abs((x - 140) / 70) ** 2.3) <= 1
    for k in range(3, 9):
        assert np.array_equal(result[..., k] > 0, expected)
    assert np.array_equal(result == 6, organ_cylinder(40) == 6)


def test_no_organ_comes_near_the_envelopes_skin_and_the_outline_is_smooth():
    label = organ_cylinder(40, slices=slice(2, 30), shape=(150, 170, 40))
    label[30:104, 40:116, 20:24] = 6  # a box fills the corners of its outline
    label[60:62, 60:66, 34:38] = 14  # far below: the slices between hold no organ
    inside = estimate_envelope(label, SPACING) > 0
    assert np.array_equal(np.flatnonzero(inside.any(axis=(0, 1))), np.arange(2, 38))
    for k in range(2, 38):
        assert ndimage.label(inside[..., k])[1] == 1
        depth = ndimage.distance_transform_edt(inside[..., k], sampling=SPACING[:2])
        assert depth[label[..., k] > 0].min(initial=np.inf) > 8  # 10 mm along the radius
    areas = inside.sum(axis=(0, 1))[2:38]
    assert np.abs(np.diff(areas)).max() < 0.04 * areas.max()
    assert areas.min() > 0.5 * areas.max()


def test_the_envelope_of_the_phantom_is_its_trunk():
    made = phantom()
    organs = np.where(made.label == BODY, 0, made.label)
    estimated = with_body(torch.from_numpy(organs), made.affine, None).numpy()
    reached = (organs > 0).any(axis=(0, 1))
    assert dice(estimated[..., reached] > 0, made.label[..., reached] > 0) > 0.85


def test_a_label_map_without_organs_has_no_envelope():
    with pytest.raises(LabelMapError, match="no organ"):
        estimate_envelope(np.zeros((5, 5, 5), np.uint8), SPACING)


@pytest.mark.parametrize("has_ct", [True, False])
def test_the_result_does_not_depend_on_how_the_volume_is_stored(has_ct):
    hu, _ = patient(table_gap=0, depth=6)
    label = np.zeros(hu.shape, np.uint8)
    label[30:60, 40:80, 1:5] = 6
    pls = np.array([[0, -2.0, 0, 9], [-2.0, 0, 0, 5], [0, 0, 5.0, 1], [0, 0, 0, 1]])  # rows to P, columns to L
    expected = with_body(torch.from_numpy(label), pls, torch.from_numpy(hu) if has_ct else None).numpy()
    assert (expected == BODY).any()
    for order, signs in list(zip(permutations(range(3)), product((1, -1), repeat=3), strict=False)):
        codes = np.array([[order[i], signs[i]] for i in range(3)])
        stored, ct = (nib.orientations.apply_orientation(volume, codes) for volume in (label, hu))
        affine = pls @ nib.orientations.inv_ornt_aff(codes, label.shape)
        item = {"image": MetaTensor(stored[None].copy(), affine=affine)}
        if has_ct:
            item["ct"] = MetaTensor(ct[None].copy(), affine=affine)
        result = AddBodyd("image", ct_key="ct", missing="estimate")(item)["image"]
        assert np.array_equal(result[0].numpy(), nib.orientations.apply_orientation(expected, codes))
        assert np.array_equal(result.affine.numpy(), affine)


def test_a_label_map_without_body_is_refused_by_name_and_one_with_body_left_alone():
    label = MetaTensor(torch.full((1, 4, 4, 4), 6, dtype=torch.uint8), affine=np.eye(4))
    label.meta["filename_or_obj"] = "mask_3.nii.gz"
    with pytest.raises(LabelMapError) as error:
        AddBodyd("image")({"image": label})
    message = str(error.value)
    assert message.startswith("mask_3.nii.gz: no body class (id 16)")
    assert "python -m common.body --images" in message and "missing_body" in message and "\n" not in message
    label[0, 0, 0, 0] = BODY
    for missing in ("error", "estimate"):
        assert torch.equal(AddBodyd("image", missing=missing)({"image": label})["image"], label)
    with pytest.raises(ValueError, match="'guess'"):
        AddBodyd("image", missing="guess")


def test_a_ct_on_another_grid_is_refused():
    item = {
        "image": MetaTensor(torch.full((1, 4, 4, 4), 6, dtype=torch.uint8), affine=np.eye(4)),
        "ct": MetaTensor(torch.zeros(1, 4, 4, 4), affine=np.diag([1.0, 1, 2, 1])),
    }
    with pytest.raises(ValueError, match="not on the same grid"):
        AddBodyd("image", ct_key="ct")(item)


def write_pair(folder, name: str, ct_affine=None) -> tuple[np.ndarray, np.ndarray]:
    """A CT and its label map, rows to the back; the header says how it was measured."""
    hu, body = patient(table_gap=0)
    label = np.zeros(hu.shape, np.int16)
    label[40:50, 60:70, 1:3] = 6
    affine = np.array([[0, -2.0, 0, 9], [-2.0, 0, 0, 5], [0, 0, 5.0, 1], [0, 0, 0, 1]])
    for kind, volume, its in (("images", hu.astype(np.int16), ct_affine), ("labels", label, None)):
        image = nib.Nifti1Image(volume, affine if its is None else its)
        image.set_qform(image.affine, code=1)
        image.set_sform(image.affine, code=2)
        image.header["descrip"] = b"portal venous"
        (folder / kind).mkdir(exist_ok=True)
        nib.save(image, folder / kind / name)
    return label, body


def run(folder) -> None:
    main(["--images", f"{folder}/images", "--labels", f"{folder}/labels", "--output", f"{folder}/output"])


def test_the_command_writes_17_classes_with_the_headers_of_the_label_maps(tmp_path):
    for name in ("a.nii.gz", "b.nii"):
        label, body = write_pair(tmp_path, name)
    run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["a.nii.gz", "b.nii"]
    for name in ("a.nii.gz", "b.nii"):
        source, result = nib.load(tmp_path / "labels" / name), nib.load(tmp_path / "output" / name)
        ids = np.asarray(result.dataobj)
        assert ids.dtype == np.uint8
        assert np.array_equal(ids == 6, label == 6)
        assert set(np.unique(ids)) == {0, 6, BODY}
        assert dice(ids > 0, body) > 0.99
        assert np.array_equal(result.affine, source.affine)
        for field in ("qform_code", "sform_code", "quatern_b", "srow_x", "pixdim", "descrip"):
            assert np.array_equal(result.header[field], source.header[field])


def test_the_command_names_what_is_missing_before_it_writes_anything(tmp_path):
    write_pair(tmp_path, "a.nii.gz")
    write_pair(tmp_path, "b.nii.gz", ct_affine=np.diag([2.0, 2.0, 5.0, 1.0]))
    with pytest.raises(SystemExit, match=r"error: not on the same grid: .*labels/b.nii.gz has shape"):
        run(tmp_path)
    (tmp_path / "images" / "b.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"labels/b.nii.gz has no CT of the same name"):
        run(tmp_path)
    assert not (tmp_path / "output").exists()
    with pytest.raises(SystemExit, match=r"no such folder: .*/nowhere/images"):
        run(tmp_path / "nowhere")
    for path in (tmp_path / "labels").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match=r"no .nii or .nii.gz in"):
        run(tmp_path)


def test_the_command_names_a_file_that_is_cut_short(tmp_path):
    write_pair(tmp_path, "a.nii.gz")
    ct = tmp_path / "images" / "a.nii.gz"
    ct.write_bytes(ct.read_bytes()[:-5000])
    with pytest.raises(SystemExit, match=r"error: cannot read .*images/a.nii.gz: .*replaced"):
        run(tmp_path)
    ct.write_bytes(b"no volume")
    with pytest.raises(SystemExit, match=r"error: cannot read .*images/a.nii.gz: .*replaced"):
        run(tmp_path)
    assert not (tmp_path / "output").exists()
