"""Mask faithfulness on constructed volumes, where each number is known beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from common.faithfulness import edge_alignment, faithfulness, hu_deviation, z_change
from common.labels import CLASSES
from common.phantom import phantom

LIVER, SPLEEN, GALLBLADDER, BODY = 6, 1, 4, 16
LOW, HIGH = 105 - 2 * 15, 105 + 2 * 15
"""The liver's expected range in HU."""


def square(organ: int = LIVER, side: int = 24, slices: int = 3) -> torch.Tensor:
    """An organ of side / 2 in the middle of a body that fills all."""
    labels = torch.full((side, side, slices), BODY, dtype=torch.uint8)
    labels[side // 4 : -side // 4, side // 4 : -side // 4] = organ
    return labels


def painted(labels: torch.Tensor, hu: dict[int, float]) -> torch.Tensor:
    """A CT with one value a class."""
    table = torch.zeros(len(CLASSES))
    table[list(hu)] = torch.tensor([float(value) for value in hu.values()])
    return table[labels.long()]


# -------------------------------------------------------------------------------------------- deviation of HU


@pytest.mark.parametrize(("value", "deviation"), [(105, 0), (LOW, 0), (HIGH, 0), (HIGH + 7, 7), (LOW - 20, 20)])
def test_deviation_is_the_distance_from_the_expected_range(value, deviation):
    labels = square()
    assert hu_deviation(labels, painted(labels, {LIVER: value})) == {"liver": pytest.approx(deviation)}


def test_deviation_is_a_mean_over_voxels_and_not_of_their_mean():
    labels = square(slices=2)
    hu = painted(labels, {LIVER: 105.0})
    hu[..., 0] += 50  # 20 above the range
    hu[..., 1] -= 50  # 20 below it, while the mean is right in its middle
    assert hu_deviation(labels, hu) == {"liver": pytest.approx(20)}
    hu[..., 1] = 105
    assert hu_deviation(labels, hu) == {"liver": pytest.approx(10)}


# -------------------------------------------------------------------------------------------- edges


def test_an_edge_at_every_boundary_and_nowhere_else_is_1():
    labels = square()
    for contrast in (1, 250, -90):
        hu = painted(labels, {LIVER: 50 + contrast, BODY: 50})
        assert edge_alignment(labels, hu, (1.5, 0.7)) == {"liver": 1}


def test_a_ct_without_edges_is_0():
    labels = square()
    assert edge_alignment(labels, torch.full(labels.shape, 40.0), (1, 1)) == {"liver": 0}


def test_noise_that_knows_no_mask_is_about_0():
    labels = square(side=96, slices=6)
    noise = 30 * torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    assert edge_alignment(labels, noise, (1, 1))["liver"] == pytest.approx(0, abs=0.05)


def test_alignment_counts_pairs_and_the_border_of_the_image_is_no_edge():
    labels = square()
    labels[18:, 6:18] = LIVER  # rows 6...23, to the image's border, and columns 6...17
    hu = (torch.arange(24.0) ** 2)[:, None, None].expand(labels.shape)  # steeper from row to row
    boundary = [6] * 12 + [row for row in range(7, 24) for _ in range(2)]
    interior = [row for row in range(7, 24) for _ in range(10)]
    expected = np.sign(np.subtract.outer(boundary, interior)).mean()
    assert edge_alignment(labels, hu, (1, 1)) == {"liver": pytest.approx(expected)}
    assert expected < -0.2


def test_alignment_is_the_rank_statistic_of_boundary_and_interior():
    """Against SciPy's U test on gradients and masks made another way, spacings and noise included."""
    labels = square(slices=4)
    labels[10:14, 10:14] = GALLBLADDER
    generator = torch.Generator().manual_seed(1)
    hu = painted(labels, {LIVER: 105, GALLBLADDER: 60, BODY: 20}) + 25 * torch.randn(labels.shape, generator=generator)
    rows, columns = np.gradient(hu.numpy(), 1.5, 0.75, axis=(0, 1))
    steepness = np.hypot(rows, columns)
    ids = labels.numpy()
    padded = np.pad(ids, ((1, 1), (1, 1), (0, 0)), mode="edge")
    neighbours = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    touching = np.any([n != ids for n in neighbours], axis=0)
    interior = steepness[(ids != BODY) & ~touching]
    expected = {}
    for name, organ in (("gallbladder", GALLBLADDER), ("liver", LIVER)):
        boundary = steepness[(ids == organ) & touching]
        expected[name] = 2 * mannwhitneyu(boundary, interior).statistic / boundary.size / interior.size - 1
    assert edge_alignment(labels, hu, (1.5, 0.75)) == pytest.approx(expected, abs=1e-4)
    assert 0.2 < expected["gallbladder"] < 0.99


def test_alignment_does_not_depend_on_the_scale_of_hu():
    labels = square()
    hu = painted(labels, {LIVER: 100}) + 20 * torch.randn(labels.shape, generator=torch.Generator().manual_seed(2))
    assert edge_alignment(labels, 3 * hu + 7, (1, 1)) == pytest.approx(edge_alignment(labels, hu, (1, 1)), abs=1e-3)


def test_no_edge_is_expected_between_organs_of_the_same_hu():
    """Liver and spleen side by side at one value, with edges to the body alone: still 1."""
    labels = square()
    labels[:, 12:][labels[:, 12:] == LIVER] = SPLEEN  # 115 +- 15 beside 105 +- 15
    hu = painted(labels, {LIVER: 110, SPLEEN: 110, BODY: -90})
    assert edge_alignment(labels, hu, (1, 1)) == {"liver": 1, "spleen": 1}
    hu = painted(labels, {LIVER: 110, SPLEEN: 190, BODY: 100})  # nor does one there count, as boundary or as interior
    assert edge_alignment(labels, hu, (1, 1)) == {"liver": 1, "spleen": 1}
    labels[labels == SPLEEN] = GALLBLADDER  # 12 +- 6: here an edge is expected, and missing
    missing = edge_alignment(labels, painted(labels, {LIVER: 110, GALLBLADDER: 110, BODY: -90}), (1, 1))
    # of each half's boundary, two rows of 6, two columns of 12, 4 corners shared: 32 pixels, 10 see no edge
    assert missing == pytest.approx({"liver": 22 / 32, "gallbladder": 22 / 32})


def test_alignment_is_within_slices():
    """What changes between slices makes no edge: neither for the mask nor for the CT."""
    labels = torch.full((8, 8, 4), LIVER, dtype=torch.uint8)
    labels[..., 2:] = GALLBLADDER
    hu = painted(labels, {LIVER: 105, GALLBLADDER: 10})
    assert edge_alignment(labels, hu, (1, 1)) == {"gallbladder": None, "liver": None}


# -------------------------------------------------------------------------------------------- along z


def test_change_along_z_is_measured_inside_the_body():
    labels = square(slices=4)
    labels[..., 3] = 0  # the pair (2, 3) doesn't count
    labels[:12, :, 1] = 0  # in slice 1 half the body
    hu = torch.zeros(labels.shape) + torch.tensor([0.0, 4.0, 10.0, 500.0])
    hu[:12, :, 1] = -1000
    assert z_change(labels, hu) == pytest.approx((4 + 6) / 2)


def test_a_single_slice_has_no_change_along_z():
    assert z_change(square(slices=1), torch.zeros(24, 24, 1)) is None
    assert z_change(torch.zeros(4, 4, 3, dtype=torch.uint8), torch.rand(4, 4, 3)) is None


# -------------------------------------------------------------------------------------------- all together


def test_measures_follow_the_patients_axes_and_not_the_files():
    """The same patient stored with other axes has the same numbers, and slices are axial in both."""
    labels = square(side=24, slices=5)
    labels[8:11, 9:16] = GALLBLADDER
    noise = 20 * torch.randn(24, 24, 1, generator=torch.Generator().manual_seed(3))
    stripes = torch.tensor([0, 8, 0, 8, 0])
    hu = (painted(labels, {LIVER: 120, GALLBLADDER: 30, BODY: -20}) + noise + stripes).numpy()
    axial = faithfulness(labels, hu, np.diag((0.8, 2.0, 5, 1)))
    assert axial["z_change"] == pytest.approx(8)
    assert 0 < axial["edge_alignment"] < 1
    # voxel axes along z downwards, x, y backwards
    turned = np.array([[0, 0.8, 0, 0], [0, 0, -2.0, 0], [-5, 0, 0, 0], [0, 0, 0, 1]])
    stored = faithfulness(*(np.moveaxis(v[:, ::-1, ::-1], 2, 0) for v in (labels.numpy(), hu)), turned)
    for name, organ in axial.pop("organs").items():
        assert stored["organs"][name] == pytest.approx(organ)
    del stored["organs"]
    assert stored == pytest.approx(axial)


def test_a_report_has_every_organ_and_the_means_over_organs():
    labels = square()
    labels[10:14, 10:14] = GALLBLADDER
    hu = painted(labels, {LIVER: HIGH + 10, GALLBLADDER: 12 - 2 * 6 - 4, BODY: -100}).numpy()
    report = faithfulness(labels, hu, np.eye(4))
    assert list(report["organs"]) == ["gallbladder", "liver"]
    assert report["organs"]["liver"] == pytest.approx({"hu_deviation": 10, "edge_alignment": 1})
    assert report["organs"]["gallbladder"] == pytest.approx({"hu_deviation": 4, "edge_alignment": 1})
    assert (report["hu_deviation"], report["edge_alignment"], report["z_change"]) == (pytest.approx(7), 1, 0)
    assert json.loads(json.dumps(report)) == report


def test_the_real_ct_stands_beside_within_the_same_window():
    labels = square(slices=2).numpy()
    hu = np.zeros(labels.shape, np.int16)
    hu[..., 1] = 30
    real = np.full(labels.shape, -150, np.int16)
    real[..., 1] = -1000  # by the window -160: a change of 10
    report = faithfulness(labels, hu, np.eye(4), real=real)
    assert (report["z_change"], report["real"]["z_change"], report["z_change_ratio"]) == (30, 10, 3)
    assert report["real"] == faithfulness(labels, real, np.eye(4))
    assert report["real"]["hu_deviation"] == pytest.approx((LOW + 150 + LOW + 160) / 2)
    flat = faithfulness(labels, hu, np.eye(4), real=np.zeros_like(hu))
    assert flat["real"]["z_change"] == 0 and flat["z_change_ratio"] is None


@pytest.mark.parametrize("shape", [(24, 24, 1), (1, 24, 6), (24, 1, 6)])
def test_volumes_one_voxel_thick_are_defined(shape):
    labels = np.full(shape, BODY, np.uint8)
    labels[tuple(slice(n // 4, n - n // 4) if n > 6 else slice(None) for n in shape)] = LIVER
    hu = np.where(labels == LIVER, 100, -100).astype(np.int16)
    report = faithfulness(labels, hu, np.eye(4), real=hu)
    assert report["edge_alignment"] == 1 and report["hu_deviation"] == 0
    assert report["z_change"] == (None if shape[2] == 1 else 0)
    assert report["z_change_ratio"] is None


def test_a_label_map_without_organs_has_no_organs_to_measure():
    labels = np.full((8, 8, 3), BODY, np.uint8)
    expected = {"organs": {}, "hu_deviation": None, "edge_alignment": None, "z_change": 0}
    assert faithfulness(labels, np.zeros((8, 8, 3)), np.eye(4)) == expected


def test_a_phantoms_ct_obeys_its_mask_and_another_does_not():
    made = phantom((64, 64, 32), seed=3)
    own = faithfulness(made.label, made.hu, made.affine)
    moved = faithfulness(made.label, np.roll(made.hu, 6, axis=0), made.affine)
    flickering = made.hu + np.random.default_rng(0).normal(0, 40, (1, 1, 32))
    assert own["hu_deviation"] < 20 < 50 < moved["hu_deviation"]
    assert moved["edge_alignment"] < 0.4 < 0.6 < own["edge_alignment"]
    assert faithfulness(made.label, flickering, made.affine, real=made.hu)["z_change_ratio"] > 1.2
