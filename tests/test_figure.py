"""The picture grid's pixels: colours, grey levels, which slice, which way up."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.ndimage import find_objects, label

from common.evaluation.figure import main
from common.labels import BODY, CLASSES

SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, LIVER = 1, 2, 3, 6
SPACING = (2.0, 3.0, 5.0)


@pytest.fixture(autouse=True)
def _fewer_pixels(monkeypatch):
    monkeypatch.setattr("common.evaluation.figure.DPI", 100)


def marked_corner() -> tuple[np.ndarray, np.ndarray]:
    """Label map and CT, 20x14x4, stored RAS: body all over; right, in front, in slice 2 alone liver, and bright."""
    labels = np.full((20, 14, 4), BODY, np.uint8)
    labels[-6:, -4:, 2] = LIVER
    return labels, np.where(labels == LIVER, 200, 40).astype(np.int16)


def save(path: Path, volume: np.ndarray, axes: str = "RAS", spacing: tuple[float, ...] = SPACING) -> None:
    """Write a RAS volume with its voxels in the order of `axes`."""
    image = nib.Nifti1Image(volume, np.diag((*spacing, 1.0)))
    wanted = nib.orientations.axcodes2ornt(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)), path)


@pytest.fixture
def case(tmp_path):
    """`case(name, labels, real, **made)`: files of a case, in every run the volume of its name."""

    def write(name: str, labels: np.ndarray, real: np.ndarray, axes: str = "RAS", **made: np.ndarray) -> None:
        save(tmp_path / "masks" / f"{name}.nii.gz", labels, axes)
        save(tmp_path / "real" / f"{name}.nii.gz", real, axes)
        for run, volume in made.items():
            save(tmp_path / run / f"{name}_ct.nii.gz", volume, axes)
            report = tmp_path / run / "report.json"
            cases = json.loads(report.read_text())["cases"] if report.is_file() else []
            cases.append({"case": name, "ct": f"{name}_ct.nii.gz"})
            content = {"started": "2026-01-01T00:00:00+00:00", "weights": None, "settings": None, "cases": cases}
            report.write_text(json.dumps(content))

    return write


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """`draw(runs, *options)`: the picture as (rows, columns, 3) uint8, and matplotlib's figure of it."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))

    def make(runs: str, *options: str) -> tuple[np.ndarray, Figure]:
        folders = [f"{run}={tmp_path / run}" for run in runs.split()]
        inputs = ["--masks", str(tmp_path / "masks"), "--real", str(tmp_path / "real")]
        main([*folders, *inputs, *options, "--output", str(tmp_path / "figure.png")])
        return np.round(imread(tmp_path / "figure.png")[..., :3] * 255).astype(np.uint8), figures[-1]

    return make


def cells(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """The pictures in the grid, row by row: the largest areas that aren't white, without their blurred rims."""
    areas = find_objects(label((picture < 240).any(-1))[0])
    areas = sorted(areas, key=lambda a: (a[0].stop - a[0].start) * (a[1].stop - a[1].start))[-count:]
    areas.sort(key=lambda a: (round(a[0].start / 20), a[1].start))
    return [picture[a.start + 2 : a.stop - 2, b.start + 2 : b.stop - 2] for a, b in areas]


def is_color(pixels: np.ndarray, of: int) -> np.ndarray:
    return (pixels == CLASSES[of].color).all(-1)


def test_columns_are_mask_methods_real_and_grey_levels_are_those_of_the_window(case, draw):
    labels = np.full((16, 16, 1), BODY, np.uint8)
    flat = {n: np.full(labels.shape, hu, np.int16) for n, hu in {"first": -60, "second": 140, "third": -1000}.items()}
    case("a", labels, np.full(labels.shape, 40, np.int16), **flat)
    picture, figure = draw("third first second")
    mask, *cts = cells(picture, 5)
    assert is_color(mask, BODY).all()
    for pixels, grey in zip(cts, (0.0, 0.25, 0.75, 0.5), strict=True):  # (HU + 160) / 400, clipped
        assert (pixels == pixels[0, 0, 0]).all() and abs(pixels[0, 0, 0] - 255 * grey) <= 1
    assert [ax.get_title() for ax in figure.axes] == ["Mask", "third", "first", "second", "Real"]


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAL"])
def test_slices_are_shown_as_in_radiology_however_they_are_stored(case, draw, tmp_path, axes):
    labels, hu = marked_corner()
    case("a", labels, hu, axes, run=hu)
    save(tmp_path / "real" / "a.nii.gz", hu, "LAI")  # on other axes than its mask
    mask, *cts = cells(draw("run", "--slices", "a:2")[0], 3)
    for marked in (is_color(mask, LIVER), *(ct[..., 0] > 215 for ct in cts)):
        rows, columns = (np.flatnonzero(marked.any(axis)) for axis in (1, 0))
        height, width = marked.shape
        assert height / width == pytest.approx(14 * 3 / (20 * 2), rel=0.05)  # true to scale
        # right on the left, front above: 4 of 14 rows from the top, 6 of 20 columns from the left
        assert rows[0] == 0 and rows[-1] / height == pytest.approx(4 / 14, abs=0.06)
        assert columns[0] == 0 and columns[-1] / width == pytest.approx(6 / 20, abs=0.06)


@pytest.mark.parametrize("axes", ["RAS", "RAI"])
def test_slices_count_from_the_feet_and_methods_show_the_mask_s(case, draw, axes):
    labels = np.full((16, 16, 5), BODY, np.uint8)
    hu = np.zeros(labels.shape, np.int16)
    for level, organ in enumerate((SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, LIVER, 7)):
        labels[4:12, 4:12, level] = organ
        hu[..., level] = 60 * level - 100
    case("a", labels, hu, axes, run=hu)
    case("b", labels, hu, axes, run=hu)
    picture, figure = draw("run", "--slices", "b:3,0", "--slices", "a:1")
    shown = cells(picture, 9)
    for row, (organ, level) in enumerate(((LIVER, 3), (SPLEEN, 0), (RIGHT_KIDNEY, 1))):
        mask, made, real = shown[3 * row : 3 * row + 3]
        assert is_color(mask, organ).mean() == pytest.approx(0.25, abs=0.05)
        for pixels in (made, real):
            assert abs(int(pixels[5, 5, 0]) - 255 * (60 * level + 60) / 400) <= 1
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["b\nslice 3", "b\nslice 0", "a\nslice 1"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["spleen", "right kidney", "liver", "body"]  # what is shown, no more
    for organ in (SPLEEN, RIGHT_KIDNEY, LIVER):
        assert is_color(picture[-60:], organ).any()
    assert not is_color(picture, LEFT_KIDNEY).any()


def test_without_slices_every_case_of_all_runs_shows_its_fullest(case, draw):
    labels, hu = marked_corner()
    for name in ("b", "a"):
        case(name, labels, hu, one=hu, two=hu)
    case("c", labels, hu, one=hu)
    _, figure = draw("one two")
    assert [ax.get_ylabel() for ax in figure.axes[::4]] == ["a\nslice 2", "b\nslice 2"]
    _, figure = draw("one", "--slices", "c")
    assert figure.axes[0].get_ylabel() == "c\nslice 2"


def test_a_mask_without_body_gets_it_from_the_real_ct(case, draw):
    x, y = np.mgrid[:40, :40] - 19.5
    inside = np.repeat((np.hypot(x, y) < 15)[..., None], 3, axis=2)
    labels = np.zeros((40, 40, 3), np.uint8)
    labels[18:22, 18:22] = LIVER
    case("a", labels, np.where(inside, 40, -1000).astype(np.int16), run=np.full(labels.shape, -60, np.int16))
    mask = cells(draw("run")[0], 3)[0]
    assert is_color(mask, BODY).mean() == pytest.approx((np.pi * 15**2 - 16) / 1600, abs=0.04)
    assert is_color(mask, LIVER).any() and is_color(mask, 0)[:5, :5].all()


def test_iterations_stand_below_the_name(case, draw, tmp_path):
    labels, hu = marked_corner()
    case("a", labels, hu, run=hu)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    report["weights"] = {"bundle": "abdominal_ct_oasis", "iteration": 488_800}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    assert draw("run")[1].axes[1].get_title() == "run\n488,800 iterations"


def test_what_is_not_there_is_refused_before_a_picture_is_written(case, draw, capsys, tmp_path):
    labels, hu = marked_corner()
    case("a", labels, hu, one=hu, other=hu[:, :, :3])
    case("b", labels, hu, two=hu)
    for runs, options, message in (
        ("one", ("--slices", "a:4"), "a has no slice 4: choose from 0 (feet) to 3 (head)"),
        ("one", ("--slices", "a:-1"), "a has no slice -1: choose from 0"),
        ("one", ("--slices", "a:x"), "--slices a:x isn't CASE:Z,Z"),
        ("one", ("--slices", "b:1"), f"no volume of b in {tmp_path / 'one'}"),
        ("one", ("--slices", "z"), f"no volume of z in {tmp_path / 'masks'}"),
        ("one two", (), "no case in common"),
        ("other", (), "not on the same grid"),
    ):
        with pytest.raises(SystemExit):
            draw(runs, *options)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()
