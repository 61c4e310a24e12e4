"""Values at the door: the window in closed form, label-map forms against loops, and what the checks say."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from common.transforms import (
    NO_CONDITION,
    CheckHUd,
    CheckLabelMapd,
    CheckSameGeometryd,
    LabelMapError,
    ToHUd,
    Windowd,
    check_label_map,
    check_same_geometry,
    edge_map,
    one_hot,
    scalar_map,
    to_hu,
    window,
)

LOAD = [LoadImaged("image", image_only=True), EnsureChannelFirstd("image")]


def random_labels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def saved(path: Path, array: np.ndarray) -> dict[str, str]:
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0])), path)
    return {"image": str(path)}


HU = [-1024, -161, -160, -60, 40, 240, 3071]
WINDOWED = [0.0, 0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("hu", [np.array(HU, np.int16), torch.tensor(HU, dtype=torch.int16), torch.tensor(HU) * 1.0])
def test_window_maps_level_40_width_400_to_the_unit_interval(hu):
    values = window(hu)
    assert values.tolist() == WINDOWED
    assert values.dtype in (np.float32, torch.float32)
    assert to_hu(values).tolist() == [-160, -160, -160, -60, 40, 240, 240]


def test_one_hot_has_its_one_at_the_id():
    labels = random_labels(2, 1, 5, 6)
    expected = torch.zeros(2, 17, 5, 6)
    for b, i, j in np.ndindex(2, 5, 6):
        expected[b, int(labels[b, 0, i, j]), i, j] = 1
    assert torch.equal(one_hot(labels), expected)
    for dtype in (torch.int16, torch.int64, torch.float32):
        assert torch.equal(one_hot(labels.to(dtype)), expected)
    assert one_hot(labels).dtype == torch.float32


@pytest.mark.parametrize("other", [17, NO_CONDITION])
def test_ids_of_no_class_have_no_channel(other):
    labels = torch.tensor([[[[0, other], [other, 16]]]], dtype=torch.uint8)
    expected = torch.zeros(1, 17, 2, 2)
    expected[0, 0, 0, 0] = expected[0, 16, 1, 1] = 1
    assert torch.equal(one_hot(labels), expected)


def test_no_condition_says_nothing_in_any_form():
    labels = torch.full((2, 1, 5, 6), NO_CONDITION, dtype=torch.uint8)
    for form in (one_hot, scalar_map, edge_map):
        assert not form(labels).any()


def test_scalar_map_spreads_the_ids_over_the_network_space():
    ids = torch.arange(17, dtype=torch.uint8).reshape(1, 1, 1, 17)
    assert torch.equal(scalar_map(ids), torch.linspace(-1, 1, 17).reshape(1, 1, 1, 17))


@pytest.mark.parametrize("shape", [(2, 1, 7, 9), (1, 1, 1, 6), (1, 1, 5, 1), (1, 1, 1, 1)])
def test_edge_map_marks_both_pixels_of_every_differing_pair(shape):
    labels = random_labels(*shape, seed=3) // 6  # 0...2: equal neighbours happen
    expected = torch.zeros(shape)
    for b, _, i, j in np.ndindex(*shape):
        for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if 0 <= k < shape[2] and 0 <= m < shape[3] and labels[b, 0, k, m] != labels[b, 0, i, j]:
                expected[b, 0, i, j] = 1
    assert torch.equal(edge_map(labels), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_integral_values_of_any_type_are_a_label_map(dtype):
    labels = random_labels(4, 5, 6).numpy()
    checked = check_label_map(labels.astype(dtype), "case")
    assert checked.dtype == np.uint8
    assert np.array_equal(checked, labels)


def label_map_with(*values: float) -> np.ndarray:
    volume = np.full((3, 4, 5), 6.0)
    volume.flat[: len(values)] = values
    return volume


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        (np.ones((4, 5)), ["2-D", "(4, 5)", "(X, Y, 1)"]),
        (np.ones((4, 5, 6, 17)), ["4-D", "(4, 5, 6, 17)", "argmax"]),
        (label_map_with(40, 40, 104), ["outside 0...16", "40 (2 voxels)", "104 (1 voxels)", "TotalSegmentator"]),
        (label_map_with(255, 255, 255), ["255 (3 voxels)", "no known table", "labels.py"]),
        (label_map_with(256), ["256 (1 voxels)"]),  # 0 in eight bits
        (label_map_with(-1024, 17), ["-1024 (1 voxels)", "17 (1 voxels)", "CT in HU"]),
        (label_map_with(*range(20, 30)), ["25 (1 voxels) and 4 more ids, 10 voxels in all"]),
        (label_map_with(0.25, 5.5), ["2 voxels", "0.25, 5.5", "nearest-neighbour"]),
        (label_map_with(np.nan), ["1 voxels", "nan", "nearest-neighbour"]),
        (label_map_with(np.inf), ["inf (1 voxels)"]),
        (np.zeros((3, 4, 5)), ["empty", "right file"]),
    ],
)
def test_what_is_no_label_map_is_named_counted_and_given_a_remedy(volume, said):
    with pytest.raises(LabelMapError) as error:
        check_label_map(volume, "liver_7.nii.gz")
    message = str(error.value)
    assert message.startswith("liver_7.nii.gz: ")
    assert "\n" not in message
    for words in said:
        assert words in message


def test_label_maps_read_as_floats_come_out_as_uint8(tmp_path):
    labels = random_labels(4, 5, 6).numpy()
    item = Compose([*LOAD, CheckLabelMapd("image")])(saved(tmp_path / "a.nii.gz", labels.astype(np.float32)))
    assert item["image"].dtype == torch.uint8
    assert np.array_equal(item["image"][0].numpy(), labels)
    assert np.array_equal(item["image"].affine.numpy(), np.diag([2.0, 3.0, 4.0, 1.0]))


@pytest.mark.parametrize(("shape", "said"), [((6, 5), r"2-D with shape \(6, 5\)"), ((6, 5, 4, 3), r"\(6, 5, 4, 3\)")])
def test_files_that_are_no_volume_are_named_with_the_shape_they_have(tmp_path, shape, said):
    item = Compose(LOAD)(saved(tmp_path / "flat.nii.gz", np.ones(shape, np.uint8)))
    with pytest.raises(LabelMapError, match=said) as error:
        CheckLabelMapd("image")(item)
    assert str(error.value).startswith(str(tmp_path / "flat.nii.gz"))


def test_geometry_within_a_tenth_of_a_voxel_is_the_same():
    affine = np.diag([0.8, 0.8, 5.0, 1.0])
    nudged = affine.copy()
    nudged[0, 3] = 0.079
    check_same_geometry(((4, 5, 6), affine), ((4, 5, 6), nudged))
    nudged[0, 3] = 0.081
    with pytest.raises(ValueError, match="not on the same grid"):
        check_same_geometry(((4, 5, 6), affine), ((4, 5, 6), nudged))


def test_geometry_is_compared_at_the_far_corner():
    affine, stretched = np.eye(4), np.diag([1.0099, 1, 1, 1])
    check_same_geometry(((11, 5, 6), affine), ((11, 5, 6), stretched))  # 10 voxels x 0.99 % = 0.099 voxel
    with pytest.raises(ValueError, match="not on the same grid"):
        check_same_geometry(((14, 5, 6), affine), ((14, 5, 6), stretched))


def test_different_grids_are_both_printed_in_one_line():
    image = MetaTensor(torch.zeros(1, 4, 5, 6), affine=np.diag([2.0, 2.0, 5.0, 1.0]))
    image.meta["filename_or_obj"] = "label.nii"
    ct = MetaTensor(torch.zeros(1, 4, 5, 7), affine=np.diag([2.0, 2.0, 2.5, 1.0]))
    with pytest.raises(ValueError) as error:
        CheckSameGeometryd(["image", "ct"])({"image": image, "ct": ct})
    message = str(error.value)
    assert "label.nii has shape (4, 5, 6) and affine [2 0 0 0; 0 2 0 0; 0 0 5 0]" in message
    assert "volume has shape (4, 5, 7) and affine [2 0 0 0; 0 2 0 0; 0 0 2.5 0]" in message
    assert "\n" not in message and "resample" in message


def test_hu_go_through_the_network_space_and_back_with_air_where_the_label_map_has_none():
    item = {"ct": torch.tensor([[[-500.0, -160, 40, 240]]]), "label": torch.tensor([[[0, 16, 6, 0]]])}
    item = Windowd("ct")(item)
    assert item["ct"].tolist() == [[[0, 0, 0.5, 1]]]
    assert ToHUd("ct", "label")(item)["ct"].tolist() == [[[-160, -160, 40, 240]]]
    filled = ToHUd("ct", "label", air_outside_body=True)(item)["ct"]
    assert filled.tolist() == [[[-1000, -160, 40, -1000]]]
    assert filled.dtype == torch.int16


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (float("nan"), 200), (-160, float("inf"))])
def test_what_is_no_ct_in_hu_is_refused(low, high):
    volume = MetaTensor(torch.tensor([low, high]).reshape(1, 2, 1, 1), meta={"filename_or_obj": "folder/case.nii.gz"})
    with pytest.raises(ValueError, match=r"case\.nii\.gz: values from .* to .* are no CT: give one in HU$"):
        CheckHUd("ct")({"ct": volume})


def test_a_ct_in_hu_passes():
    for values in ([-1024.0, 3071.0], [40.0, 40.0], [0.0, 1.5]):
        ct = torch.tensor(values).reshape(1, 2, 1, 1)
        assert CheckHUd(["ct", "made"], allow_missing_keys=True)({"ct": ct})["ct"] is ct
