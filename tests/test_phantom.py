"""The phantom: its shapes against closed forms, its anatomy against what every atlas says."""

from __future__ import annotations

import json
from functools import cache

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from scipy.ndimage import label as components

from common.labels import BODY, NUM_CLASSES, ORGANS
from common.phantom import FIELD_OF_VIEW, Phantom, main, phantom, tissue_values, write_dataset
from common.phantom.anatomy import CODES, TISSUES
from common.phantom.canvas import Blob, Canvas, Structure, Tube, mirrored, smooth_field

NAMES = {organ.name: organ.id for organ in ORGANS}

made = cache(phantom)


def centre(volume: Phantom, name: str) -> np.ndarray:
    """World coordinates (right, front, up) of an organ's centroid."""
    voxels = np.argwhere(volume.label == NAMES[name])
    return nib.affines.apply_affine(volume.affine, voxels.mean(0))


def painted(*parts: Blob | Tube, carve: tuple[Blob, ...] = (), blend: float = 0.01) -> tuple[Canvas, float]:
    """An undeformed canvas of 1.5 mm with one structure, and the structure's volume in mm³."""
    canvas = Canvas([np.arange(-60, 60.1, 1.5)] * 3, {"air": 0, "liver": 6})
    canvas.paint(Structure("liver", parts, carve, ("air",), blend))
    return canvas, (canvas.tissue == 6).sum() * 1.5**3


def test_painted_ellipsoid_has_the_volume_of_its_formula_however_it_is_turned():
    expected = 4 / 3 * np.pi * 40 * 25 * 15
    for turn in ((0, 0, 0), (30, -50, 70)):
        assert painted(Blob((3, -5, 7), (40, 25, 15), turn))[1] == pytest.approx(expected, rel=0.01)


def test_painted_tube_is_a_cylinder_with_round_ends():
    expected = np.pi * 12**2 * 70 + 4 / 3 * np.pi * 12**3
    for run in ((70, 0, 0), (-60, 30, -20)):  # both 70 mm
        start, end = np.array((0.4, -0.3, 0.6)) - np.array(run) / 2, np.array((0.4, -0.3, 0.6)) + np.array(run) / 2
        assert painted(Tube(((*start, 12), (*end, 12))))[1] == pytest.approx(expected, rel=0.01)


def test_parts_outside_of_each_other_add_up_and_carving_takes_away():
    ball = 4 / 3 * np.pi * 20**3
    assert painted(Blob((-30, 0, 0), (20,) * 3), Blob((30, 0, 0), (20,) * 3))[1] == pytest.approx(2 * ball, rel=0.01)
    shell = painted(Blob((0, 0, 0), (40,) * 3), carve=(Blob((0, 0, 0), (20,) * 3),))[1]
    assert shell == pytest.approx(7 * ball, rel=0.01)


def test_turn_is_about_x_then_y_then_z_and_mirroring_reflects_it():
    part = Blob((20, 5, -10), (30, 18, 8), (25, -40, 65), 2.5)
    canvas, _ = painted(part)
    reflected, _ = painted(mirrored(part))
    assert (reflected.tissue == canvas.tissue[::-1]).mean() > 0.9999
    tilted, _ = painted(Blob((0, 0, 0), (5, 5, 40), (90, 0, 0)))  # the upright axis turned to the front
    assert np.ptp(np.argwhere(tilted.tissue), axis=0).argmax() == 1


def test_smooth_field_is_the_same_function_on_every_grid():
    fine, coarse = (np.linspace(-200, 200, n) for n in (41, 21))
    one = smooth_field([fine] * 3, 60, np.random.default_rng(3))
    assert np.allclose(one[::2, ::2, ::2], smooth_field([coarse] * 3, 60, np.random.default_rng(3)), atol=1e-4)
    assert 0.3 < one.std() < 1.5


def test_volumes_are_the_counts_of_the_label_map():
    volume = made()
    assert volume.volumes == {c: int((volume.label == c).sum()) for c in range(NUM_CLASSES)}
    assert volume.label.dtype == np.uint8 and volume.hu.dtype == np.int16


@pytest.mark.parametrize("seed", range(8))
def test_every_organ_is_there_at_the_smallest_size(seed):
    assert [name for name, c in NAMES.items() if made(seed=seed).volumes[c] < 3] == []


def test_a_seed_is_one_patient_and_another_seed_another():
    again = phantom(seed=0)
    assert np.array_equal(again.label, made().label) and np.array_equal(again.hu, made().hu)
    assert (made(seed=1).label != made().label).mean() > 0.02
    assert not np.array_equal(tissue_values(0), tissue_values(1))


def test_a_seed_is_the_same_patient_on_every_grid():
    coarse, fine = made(), made((96, 96, 80))
    for name in ("liver", "spleen", "aorta", "stomach", "bladder"):
        millilitres = [v.volumes[NAMES[name]] * np.linalg.det(v.affine[:3, :3]) / 1000 for v in (coarse, fine)]
        assert millilitres[0] == pytest.approx(millilitres[1], rel=0.12), name
        assert np.linalg.norm(centre(coarse, name) - centre(fine, name)) < 3, name


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_organs_lie_where_an_atlas_has_them(seed, oblique):
    volume = made(seed=seed, oblique=oblique)
    at = {name: centre(volume, name) for name in NAMES}

    def ordered(axis, *names):
        """The centroids rise along an axis (0 to the right, 1 to the front, 2 upwards)."""
        return np.all(np.diff([at[name][axis] for name in names]) > 0)

    assert ordered(0, "spleen", "aorta", "postcava", "liver")
    assert ordered(0, "left kidney", "aorta", "right kidney") and ordered(0, "stomach", "gallbladder")
    assert ordered(0, "left adrenal gland", "right adrenal gland") and ordered(0, "left kidney", "duodenum")
    assert ordered(1, "aorta", "pancreas", "gallbladder") and ordered(1, "left kidney", "stomach")
    assert ordered(2, "prostate/uterus", "duodenum", "liver", "esophagus")
    assert ordered(2, "bladder", "left kidney", "left adrenal gland", "esophagus")
    assert ordered(2, "bladder", "right kidney", "right adrenal gland")


def test_oblique_turns_the_world_and_leaves_the_voxels():
    straight, tilted = made(), made(oblique=True)
    assert np.array_equal(straight.label, tilted.label) and np.array_equal(straight.hu, tilted.hu)
    turn = tilted.affine[:3, :3] @ np.linalg.inv(straight.affine[:3, :3])
    assert np.allclose(turn @ turn.T, np.eye(3)) and np.linalg.det(turn) == pytest.approx(1)
    assert np.abs(turn - np.eye(3)).max() > 0.1


def test_default_spacing_fits_the_trunk_and_a_given_one_is_kept():
    for shape in ((64, 64, 64), (128, 128, 48), (96, 64, 40)):
        fitted = np.diag(made(shape).affine)[:3]
        assert fitted[0] == fitted[1] and np.all(fitted * shape >= np.array(FIELD_OF_VIEW) - 1e-6)
    given = made((64, 48, 40), spacing=(6.0, 7.0, 10.0))
    assert np.array_equal(np.diag(given.affine), (6, 7, 10, 1))
    assert np.allclose(given.affine[:3] @ [31.5, 23.5, 19.5, 1], 0)  # the middle of the volume is the world's origin


@pytest.mark.parametrize("seed", [0, 5])
def test_organs_have_the_attenuation_drawn_for_the_patient(seed):
    whole = made((128, 128, 64), seed=seed)
    close = made((128, 96, 112), seed=seed, spacing=(1.2, 1.2, 2.0))  # the adrenal glands, without their fat
    for name, c in NAMES.items():
        volume = close if "adrenal" in name else whole
        organ = volume.label == c
        inner = binary_erosion(organ)
        values = volume.hu[inner if inner.sum() > 60 else organ]
        assert np.median(values) == pytest.approx(tissue_values(seed)[c], abs=8), name


def test_body_is_one_piece_in_air_and_holds_fat_muscle_bone_and_gas():
    volume = made((128, 128, 48))
    outside = volume.label == 0
    assert components(~outside)[1] == 1
    assert volume.hu[binary_erosion(outside, iterations=2)].mean() == pytest.approx(-1000, abs=2)
    body = volume.hu[volume.label == BODY]
    shares = [
        np.mean((body > low) & (body < high)) for low, high in ((-140, -60), (20, 90), (250, 1500), (-1000, -700))
    ]
    assert shares[0] > 0.25 and shares[1] > 0.15 and 0.02 < shares[2] < 0.15 and shares[3] > 0.02
    skin = binary_erosion(~outside) ^ ~outside
    assert np.all(volume.label[skin][np.argwhere(skin)[:, 2] % 47 != 0] == BODY)  # no organ reaches the air


def test_the_codes_of_organs_are_their_ids():
    assert all(CODES[organ.name] == organ.id == TISSUES[organ.id].label for organ in ORGANS)


def test_command_writes_a_data_set_that_reads_back(tmp_path, capsys):
    main(
        [
            "--output",
            str(tmp_path / "set"),
            "--train",
            "2",
            "--validation",
            "1",
            "--shape",
            "32",
            "32",
            "24",
            "--seed",
            "3",
        ]
    )
    assert "phantoms" in capsys.readouterr().err  # the progress bar
    content = json.loads((tmp_path / "set/dataset.json").read_text())
    assert (content["numTraining"], content["numValidation"], len(content["labels"])) == (2, 1, NUM_CLASSES)
    assert [e["image"] for e in content["training"]] == ["./imagesTr/amos_0001.nii.gz", "./imagesTr/amos_0002.nii.gz"]
    assert len([path for path in (tmp_path / "set").rglob("*") if path.is_file()]) == 7
    expected = phantom((32, 32, 24), 500 * 3 + 3)
    for key, array in (("image", expected.hu), ("label", expected.label)):
        nifti = nib.load(tmp_path / "set" / content["validation"][0][key])
        assert np.array_equal(np.asanyarray(nifti.dataobj), array) and nifti.get_data_dtype() == array.dtype
        assert np.allclose(nifti.affine, expected.affine, atol=1e-5)
        assert int(nifti.header["qform_code"]) == int(nifti.header["sform_code"]) == 1


def test_without_body_only_the_organs_remain(tmp_path):
    write_dataset(tmp_path, 1, 0, (32, 32, 24), seed=3, body=False)
    label = np.asanyarray(nib.load(tmp_path / "labelsTr/amos_0001.nii.gz").dataobj)
    full = phantom((32, 32, 24), 500 * 3 + 1).label
    assert label.max() <= 15 and np.array_equal(label > 0, (full > 0) & (full < BODY))
    assert "16" not in json.loads((tmp_path / "dataset.json").read_text())["labels"]


@pytest.mark.parametrize("cases", [(490, 10), (0, 0), (-1, 5)])
def test_an_impossible_number_of_cases_is_refused_before_anything_is_written(tmp_path, cases):
    with pytest.raises(ValueError, match="from 1 to 499"):
        write_dataset(tmp_path / "set", *cases, (32, 32, 24))
    assert not (tmp_path / "set").exists()


def test_shape_and_spacing_must_be_three_positive_numbers():
    for arguments in (((64, 64),), ((64, 64, 0),), ((64, 64, 64), 0, (1.0, 1.0)), ((64, 64, 64), 0, (1.0, 1.0, -1.0))):
        with pytest.raises(ValueError, match="three positive numbers"):
            phantom(*arguments)
