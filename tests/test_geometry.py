"""Geometry that must come back: every orientation, oblique affines, odd and single slices, a loader in between."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from common.geometry import AxialGrid, FromAxialGridd, Orientation, ToAxialGridd

ORIENTATIONS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]
SPACING = (0.7, 1.3, 2.9)  # of the volume's axes


def affine_of(order=(0, 1, 2), signs=(1, 1, 1), tilt=0.0, origin=(11.0, -23.0, 37.0)) -> np.ndarray:
    """Affine whose axis i runs along world axis order[i] in direction signs[i]; `tilt` degrees off the axes."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis in range(3):
        affine[order[axis], axis] = signs[axis] * SPACING[axis]
    affine[:3, :3] = Rotation.from_euler("xyz", [tilt, -tilt / 2, tilt / 3], degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


def random_labels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(5)).to(torch.uint8)


def world(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(X, Y, Z, 3) world coordinates of the voxels' centres."""
    return apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))


@pytest.mark.parametrize("tilt", [0, 20])
@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_label_maps_of_every_orientation_come_back_voxel_by_voxel(order, signs, tilt):
    labels = random_labels(7, 4, 6)
    affine = affine_of(order, signs, tilt)
    side = max(AxialGrid.of(labels.shape, affine, 8).plane)
    for factor in (1, 2, 5):
        grid = AxialGrid.of(labels.shape, affine, factor * side)
        slices = grid.to_slices(labels, label=True)
        assert slices.shape == (factor * side, factor * side, labels.shape[order.index(2)])
        assert nib.aff2axcodes(grid.affine) == ("P", "L", "S")
        assert torch.equal(grid.from_slices(slices, label=True), labels)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_orientation_is_nibabels(order, signs):
    affine = affine_of(order, signs, tilt=10)
    volume = np.random.default_rng(0).normal(size=(3, 4, 5))
    codes = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("PLS"))
    oriented = Orientation.of(affine).apply(torch.from_numpy(volume))
    assert np.array_equal(oriented.numpy(), nib.orientations.apply_orientation(volume, codes))
    assert np.array_equal(Orientation.of(affine).undo(oriented).numpy(), volume)


@pytest.mark.parametrize(("box", "size"), [((19, 13, 4), 38), ((19, 13, 4), 8), ((12, 17, 4), 23), ((13, 18, 1), 30)])
@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::5])
def test_the_grids_affine_says_where_its_voxels_lie(order, signs, box, size):
    """A CT that is its own world coordinate: what the slices hold is where the grid's affine must point."""
    shape = tuple(box[axis] for axis in order)
    affine = affine_of(order, signs, tilt=15)
    grid = AxialGrid.of(shape, affine, size)
    expected = world(grid.affine, (size, size, box[2]))
    voxels = apply_affine(np.linalg.inv(affine), expected)
    reach = np.array([0 if axis == 2 else 0.5 + max(1, max(box[:2]) / size) for axis in order])
    inside = ((voxels > reach - 1e-6) & (voxels < np.array(shape) - 1 - reach + 1e-6)).all(axis=-1)
    assert inside.any()
    for axis in range(3):
        ramp = torch.from_numpy(world(affine, shape)[..., axis])
        slices = grid.to_slices(ramp, label=False).numpy()
        assert np.abs(slices - expected[..., axis])[inside].max() < 0.1  # mm; half a voxel would be 0.35 and more


@pytest.mark.parametrize(("shape", "size"), [((8, 6, 3), 20), ((6, 8, 3), 4), ((7, 7, 2), 256)])
def test_the_padded_square_keeps_the_centre_and_the_spacing_is_what_it_shows(shape, size):
    affine = affine_of(tilt=25)
    grid = AxialGrid.of(shape, affine, size)
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    assert np.allclose(apply_affine(grid.affine, [(size - 1) / 2, (size - 1) / 2, (shape[2] - 1) / 2]), centre)
    side = max(shape[:2])
    assert grid.spacing == pytest.approx((SPACING[1] * side / size, SPACING[0] * side / size, SPACING[2]))


def test_corners_of_the_network_grid_are_the_corners_of_the_padded_volume():
    # x to the left, y to the back, z up; 4 rows (y) of 1.3 mm in a square of 7 columns (x): 1 row above, 2 below
    affine = np.diag([-0.7, -1.3, 2.9, 1])
    grid = AxialGrid.of((7, 4, 5), affine, 21)
    near = apply_affine(affine, [-0.5, -1 - 0.5, 0])
    far = apply_affine(affine, [6.5, 5 + 0.5, 4])
    assert np.allclose(apply_affine(grid.affine, [-0.5, -0.5, 0]), near)
    assert np.allclose(apply_affine(grid.affine, [20.5, 20.5, 4]), far)


@pytest.mark.parametrize("size", [5, 9, 30])
def test_constants_come_back_and_what_is_padded_is_air(size):
    grid = AxialGrid.of((9, 9, 3), affine_of(), size)
    constant = torch.full((9, 9, 3), 40.0)
    assert torch.allclose(grid.from_slices(grid.to_slices(constant, label=False)), constant, atol=1e-4)

    oblong = AxialGrid.of((9, 3, 2), affine_of(), 9)  # 9 columns, 3 rows between 3 and 3
    slices = oblong.to_slices(torch.full((9, 3, 2), 40.0), label=False)
    assert torch.equal(slices[3:6], torch.full((3, 9, 2), 40.0))
    assert torch.equal(slices[:3], torch.full((3, 9, 2), -160.0))
    assert torch.equal(slices[6:], torch.full((3, 9, 2), -160.0))
    labels = oblong.to_slices(torch.full((9, 3, 2), 6), label=True)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[:, 0, 0], torch.tensor([0, 0, 0, 6, 6, 6, 0, 0, 0], dtype=torch.uint8))


def test_a_ramp_comes_back_inside():
    volume = torch.arange(12.0)[:, None, None] * 9 + torch.arange(10.0)[None, :, None] * 4 + torch.arange(3.0) - 80
    for size, tolerance in ((12, 0), (24, 1e-4), (37, 0.1)):  # torch's antialiasing rounds its taps at odd ratios
        grid = AxialGrid.of(volume.shape, affine_of(), size)
        back = grid.from_slices(grid.to_slices(volume, label=False))
        assert torch.allclose(back[2:-2, 2:-2], volume[2:-2, 2:-2], atol=tolerance, rtol=0)
    assert torch.equal(
        AxialGrid.of(volume.shape, affine_of(), 12).to_slices(volume, label=False)[1:11].sum(), volume.sum()
    )


def test_a_ct_is_clipped_before_it_is_resized():
    bone_beside_air = torch.tensor([-1000.0, 3000.0])[:, None, None].expand(2, 2, 1)
    grid = AxialGrid.of((2, 2, 1), affine_of(), 1)
    assert grid.to_slices(bone_beside_air, label=False).item() == pytest.approx(40)  # mean of -160 and 240


@pytest.mark.parametrize(
    ("affine", "said"), [(np.diag([1.0, 1.0, 0.0, 1.0]), "no orientation"), (np.full((4, 4), np.nan), "no orientation")]
)
def test_affines_without_orientation_are_refused(affine, said):
    with pytest.raises(ValueError, match=said):
        AxialGrid.of((4, 4, 4), affine, 8)
    with pytest.raises(ValueError, match="3-D volume, not one of shape"):
        AxialGrid.of((4, 4), np.eye(4), 8)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_prediction_returns_to_the_grid_of_its_mask_through_a_loader(tmp_path, batch_size):
    labels, items = {}, []
    for number, (order, signs) in enumerate(ORIENTATIONS[7::23]):
        # two orientations of the same patient box, so that their slices share one shape and can be collated
        shape = tuple((12, 9, 5)[axis] for axis in order)
        labels[number] = random_labels(*shape).numpy() + number % 2
        path = tmp_path / f"case_{number}.nii.gz"
        image = nib.Nifti1Image(labels[number], affine_of(order, signs, tilt=8))
        image.set_qform(image.affine, code=1)
        nib.save(image, path)
        items.append({"image": str(path)})
    load = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), ToAxialGridd("image", 24)])
    returned = []
    for batch in DataLoader(Dataset(items, load), batch_size=batch_size):
        assert batch["image"].shape[1:] == (1, 24, 24, 5)
        assert batch["image"].dtype == torch.uint8
        batch["pred"] = batch["image"].as_tensor().float() / 16  # a network's output knows no meta
        returned += [FromAxialGridd(["pred", "image"], "image")(item) for item in decollate_batch(batch)]

    assert len(returned) == len(items) == 2
    for number, item in enumerate(returned):
        file = nib.load(items[number]["image"])
        assert item["pred"].shape == (1, *file.shape)
        assert np.array_equal(item["pred"].affine.numpy(), file.affine)
        assert item["pred"].meta["filename_or_obj"] == items[number]["image"]
        assert np.array_equal(item["image"][0].numpy(), labels[number])
        # bilinear up by 2 and antialiased down by 2 keeps the mean of every slice's inside
        flat = item["pred"][0].numpy() * 16
        assert np.abs(flat.mean() - labels[number].mean()) < 1.0


def test_what_never_left_its_grid_cannot_return():
    item = {"image": MetaTensor(torch.zeros(1, 4, 4, 4)), "pred": torch.zeros(1, 4, 4, 4)}
    with pytest.raises(KeyError, match="put ToAxialGridd before"):
        FromAxialGridd("pred", "image")(item)


def test_absent_keys_are_passed_over_when_allowed():
    item = {"image": MetaTensor(random_labels(4, 4, 2)[None], affine=affine_of())}
    grids = ToAxialGridd(["image", "ct"], 8, allow_missing_keys=True)(item)
    assert sorted(grids) == ["image"]
    with pytest.raises(KeyError, match="ct"):
        ToAxialGridd(["image", "ct"], 8)(item)
