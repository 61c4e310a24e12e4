"""DICOM in and out: every voxel where it was, with its value; what a synthetic series says; what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.transforms import LoadImage
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from scipy.spatial.transform import Rotation

from common.data import case_list, mask_list
from common.dicom.reading import read_dicom
from common.dicom.slices import DicomError
from common.dicom.writing import check_series, save_series
from common.evaluation.runs import read_run
from common.labels import BODY, CLASSES
from common.loading import LoadVolumed, load_volume
from common.phantom import phantom
from common.transforms import check_same_geometry

STRAIGHT = np.eye(3)
TURN = Rotation.from_euler("xyz", (8, -11, 17), degrees=True).as_matrix()
ORIGIN = (-91.25, 40.5, 803.0625)


def affine(axes: Sequence[Sequence[float]], turn: np.ndarray = STRAIGHT) -> np.ndarray:
    """Voxel to mm (RAS), with these columns."""
    made = np.eye(4)
    made[:3, :3] = turn @ np.array(axes, float).T
    made[:3, 3] = ORIGIN
    return made


LPS = ((-0.8, 0, 0), (0, -1.3, 0), (0, 0, 2.5))  # as scanners have it
RAS = ((0.8, 0, 0), (0, 1.3, 0), (0, 0, 2.5))
AFFINES = {
    "LPS": affine(LPS),
    "RAS": affine(RAS),
    "left-handed": affine(((-0.8, 0, 0), (0, 1.3, 0), (0, 0, 2.5))),
    "feet last": affine(((0.8, 0, 0), (0, 1.3, 0), (0, 0, -2.5))),
    "sagittal": affine(((0, -0.8, 0), (0, 0, -2.5), (1.3, 0, 0))),
    "oblique": affine(RAS, TURN),
    "oblique and left-handed": affine(((0, 0, 2.5), (0.8, 0, 0), (0, 1.3, 0)), TURN @ np.diag((-1.0, 1, 1))),
}


@pytest.fixture(params=AFFINES)
def grid(request) -> np.ndarray:
    return AFFINES[request.param]


def volume(*shape: int) -> np.ndarray:
    """Distinct values over more than the range of CT, negative ones too."""
    return np.random.default_rng(0).permutation(np.arange(-3000, 4100, dtype=np.int16))[: np.prod(shape)].reshape(shape)


HU = volume(7, 6, 5)


def assert_same_voxels(values: np.ndarray, points: np.ndarray, expected: np.ndarray, grid: np.ndarray) -> None:
    """Values at these points (N, 3), mm in RAS, are all voxels of a volume, each once, within 1/1000 of a voxel."""
    indices = np.linalg.solve(grid, np.c_[points, np.ones(len(points))].T)[:3].T
    np.testing.assert_allclose(indices, np.round(indices), atol=1e-3)
    indices = np.round(indices).astype(int)
    assert len({tuple(index) for index in indices.tolist()}) == len(values) == expected.size
    np.testing.assert_array_equal(values, expected[tuple(indices.T)])


def voxels(values: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All values of a volume and where they lie."""
    indices = np.indices(values.shape).reshape(3, -1)
    return values.ravel(), (grid[:3, :3] @ indices).T + grid[:3, 3]


def by_pydicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """By the equation of DICOM PS3.3 C.7.6.2.1.1, slice by slice."""
    values, points = [], []
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        along, down = np.reshape(np.array(image.ImageOrientationPatient, float), (2, 3))
        down_mm, along_mm = (float(spacing) for spacing in image.PixelSpacing)
        rows, columns = (index.reshape(-1, 1) for index in np.indices((image.Rows, image.Columns)))
        points.append(np.array(image.ImagePositionPatient, float) + columns * along * along_mm + rows * down * down_mm)
        values.append(image.pixel_array.ravel() * float(image.RescaleSlope) + float(image.RescaleIntercept))
    return np.concatenate(values), np.concatenate(points) * (-1, -1, 1)


def by_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    names = itk.GDCMSeriesFileNames.New(Directory=str(folder))
    (series,) = names.GetSeriesUIDs()
    image = itk.imread(names.GetFileNames(series))
    assert dict(image).get("ITK_non_uniform_sampling_deviation", 0) < 1e-6
    values = itk.array_from_image(image)
    indices = [tuple(reversed(index)) for index in np.ndindex(values.shape)]
    points = np.array([tuple(image.TransformIndexToPhysicalPoint(index)) for index in indices])
    return values.ravel(), points * (-1, -1, 1)


def by_monai(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    read = LoadImage(reader="ITKReader", image_only=True)(folder)
    return voxels(read.numpy(), read.affine.numpy())


def by_us(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    read = load_volume(folder)
    return voxels(read.numpy(), read.affine.numpy())


# ------------------------------------------------------------------------------------------------------ DICOM out


@pytest.mark.parametrize("reader", [by_pydicom, by_itk, by_monai, by_us])
def test_a_series_reads_back_with_the_same_geometry_and_hu(reader, grid, tmp_path):
    save_series(tmp_path / "ct", HU, grid)
    assert_same_voxels(*reader(tmp_path / "ct"), HU, grid)


def test_a_volume_on_a_scanners_axes_comes_back_as_it_was(tmp_path):
    save_series(tmp_path / "ct", HU, AFFINES["LPS"])
    read = LoadImage(reader="ITKReader", image_only=True)(tmp_path / "ct")
    np.testing.assert_array_equal(read.numpy(), HU)
    np.testing.assert_allclose(read.affine, AFFINES["LPS"], atol=1e-9)


def test_slices_look_as_on_a_radiologists_screen(grid, tmp_path):
    """Columns run to the patient's left, rows to the back, slices upwards."""
    save_series(tmp_path / "ct", HU, grid)
    first, second = (pydicom.dcmread(tmp_path / "ct" / f"000{k}.dcm") for k in (1, 2))
    along, down = np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3))
    up = np.subtract(second.ImagePositionPatient, first.ImagePositionPatient)
    assert along[0] > 0.9 and down[1] > 0.9 and up[2] > 0
    assert (first.InstanceNumber, second.InstanceNumber) == (1, 2)


def slices_of(folder: Path) -> list[Dataset]:
    return [pydicom.dcmread(file) for file in sorted(folder.iterdir())]


def test_the_files_say_that_they_are_synthetic_and_of_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    save_series(tmp_path / "ct", HU, AFFINES["oblique"])
    images = slices_of(tmp_path / "ct")
    assert len(images) == 5
    for image in images:
        assert image.file_meta.MediaStorageSOPClassUID == image.SOPClassUID == pydicom.uid.CTImageStorage
        assert list(image.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"] and image.SyntheticData == "YES"
        for name in ("SeriesDescription", "DerivationDescription", "ImageComments"):
            assert "synthetic" in image[name].value
        of_patient = [element for element in image.iterall() if element.tag.group == 0x0010]
        assert {element.keyword for element in of_patient} == {
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
        }
        assert all(element.is_empty for element in of_patient)
        for name in ("AccessionNumber", "StudyID", "ReferringPhysicianName"):
            assert image[name].is_empty
        assert image.BurnedInAnnotation == "NO" and (image.WindowCenter, image.WindowWidth) == (40, 400)


def test_uids_are_new_and_unique(tmp_path):
    for run in "ab":
        save_series(tmp_path / run, HU, AFFINES["RAS"])
    runs = [slices_of(tmp_path / run) for run in "ab"]
    assert len({image.SOPInstanceUID for images in runs for image in images}) == 10
    assert all(image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID for image in runs[0])
    shared = [
        {(image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID) for image in images}
        for images in runs
    ]
    assert [len(uids) for uids in shared] == [1, 1]
    assert len({uid for uids in shared for uid in uids.pop()}) == 6


def test_an_identity_is_kept_when_it_is_asked_for(tmp_path):
    patient = {"PatientName": "Müller^Änne", "PatientID": "P-7", "PatientBirthDate": "19500102", "PatientSex": "F"}
    study = {"StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid(), "AccessionNumber": "A1"}
    other = {"InstitutionName": "Hospital", "PatientAddress": "Street 1", "OperatorsName": "B", "StationName": "CT1"}
    write_series(
        tmp_path / "source", HU, AFFINES["LPS"], SpecificCharacterSet="ISO_IR 100", **patient, **study, **other
    )
    source = pydicom.dcmread(tmp_path / "source" / "0")
    save_series(tmp_path / "ct", HU, AFFINES["LPS"], tmp_path / "source")
    for image in slices_of(tmp_path / "ct"):
        assert {name: str(image[name].value) for name in patient | study} == patient | study
        assert not any(name in image for name in other)
        assert image.StudyID == "" and image.SeriesInstanceUID != source.SeriesInstanceUID
    save_series(tmp_path / "ct", HU, AFFINES["LPS"])
    image = slices_of(tmp_path / "ct")[0]
    written = {str(element.value) for element in image.iterall()}
    assert not written & {*patient.values(), *study.values(), *other.values()} - {"F"}


def test_what_a_source_does_not_know_is_new(tmp_path):
    write_series(tmp_path / "source", HU, AFFINES["LPS"], StudyInstanceUID="", PatientID="P-7", StudyID=None)
    save_series(tmp_path / "ct", HU, AFFINES["LPS"], tmp_path / "source")
    images = slices_of(tmp_path / "ct")
    assert {(image.PatientID, image.StudyID) for image in images} == {("P-7", "")}
    assert len({image.StudyInstanceUID for image in images}) == 1 and images[0].StudyInstanceUID.is_valid
    assert {(image.StudyDate, image.StudyTime) for image in images} == {("", "")}  # not the date of today
    assert all(image.SeriesDate for image in images)


@pytest.mark.parametrize("column", [0, 2])
def test_axes_that_are_not_perpendicular_are_refused(column, tmp_path):
    skewed = AFFINES["RAS"].copy()
    skewed[:3, column] += (0, 0.1, 0)
    with pytest.raises(DicomError, match=r"aren't perpendicular.*output_format nifti$"):
        save_series(tmp_path / "ct", HU, skewed)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    save_series(tmp_path / "ct", HU, AFFINES["RAS"])
    save_series(tmp_path / "ct", HU[..., :2], AFFINES["RAS"])
    before = {file: file.read_bytes() for file in (tmp_path / "ct").iterdir()}
    assert len(before) == 2

    written = []
    save_as = Dataset.save_as

    def fails(image: Dataset, path: Path, **options) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_as(image, path, **options)

    monkeypatch.setattr(Dataset, "save_as", fails)
    with pytest.raises(OSError, match=r"cannot write .*ct: No space left on device; free the disk"):
        save_series(tmp_path / "ct", HU, AFFINES["RAS"])
    assert len(written) == 3 and [path.name for path in tmp_path.iterdir()] == ["ct"]
    assert {file: file.read_bytes() for file in (tmp_path / "ct").iterdir()} == before


# ------------------------------------------------------------------------------------------------- a series comes in


def written_by(path: Path, image: Dataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.save_as(path, enforce_file_format=True)


def geometry(grid: np.ndarray, first: int = 0, last: int = 0) -> list[tuple[list, list, list]]:
    """Orientation, spacing and positions of the slices first...last along the third axis of a volume in RAS."""
    lps = np.diag((-1.0, -1, 1, 1)) @ grid
    lengths = np.linalg.norm(lps[:3], axis=0)
    orientation = [f"{cosine:.12f}" for cosine in (lps[:3, :2] / lengths[:2]).T.ravel()]
    spacing = [f"{lengths[1]:.9g}", f"{lengths[0]:.9g}"]
    return [(orientation, spacing, [f"{v:.10g}" for v in lps[:3] @ (0, 0, k, 1)]) for k in range(first, last)]


def write_series(folder: Path, values: np.ndarray, grid: np.ndarray, slope: float = 1, intercept: float = 0, **tags):
    """A volume (X, Y, Z) as a series of files without suffix, whose names say nothing of their order."""
    uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    for k, (orientation, spacing, position) in enumerate(geometry(grid, 0, values.shape[2])):
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = pydicom.uid.CTImageStorage, generate_uid()
        image.Modality, image.SeriesNumber, image.InstanceNumber = "CT", 1, 3 * k % 7
        image.ImageOrientationPatient, image.PixelSpacing, image.ImagePositionPatient = orientation, spacing, position
        image.RescaleSlope, image.RescaleIntercept = slope, intercept
        for name, value in (uids | tags).items():
            setattr(image, name, value)
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.set_pixel_data(np.ascontiguousarray(values[..., k].T), "MONOCHROME2", 8 * values.itemsize)
        folder.mkdir(parents=True, exist_ok=True)
        image.save_as(folder / str(5 * k % 11), enforce_file_format=True)


def reads_as(path: Path, values: np.ndarray, grid: np.ndarray) -> None:
    """Axes and all are those of the file."""
    read = load_volume(path)
    assert read.dtype == torch.float32 and read.meta["filename_or_obj"] == str(path)
    np.testing.assert_array_equal(read.numpy(), values)
    np.testing.assert_allclose(read.affine, grid, atol=1e-6)


RIGHT_HANDED = [name for name in AFFINES if np.linalg.det(AFFINES[name]) > 0]


@pytest.mark.parametrize("name", RIGHT_HANDED)
def test_a_series_is_the_volume_that_was_written(name, tmp_path):
    write_series(tmp_path / "ct", (HU // 2).astype(np.uint16), AFFINES[name], slope=2, intercept=-1024)
    expected = (HU // 2).astype(np.uint16).astype(float) * 2 - 1024
    reads_as(tmp_path / "ct", expected, AFFINES[name])


def test_each_slice_is_rescaled_as_it_says(tmp_path):
    stored = (HU // 2 + 1600).astype(np.uint16)
    write_series(tmp_path / "ct", stored, AFFINES["LPS"])
    expected = stored.astype(float)
    places = {position[2]: k for k, (*_, position) in enumerate(geometry(AFFINES["LPS"], 0, HU.shape[2]))}
    for file in (tmp_path / "ct").iterdir():
        image = pydicom.dcmread(file)
        k = places[str(image.ImagePositionPatient[2])]
        image.RescaleSlope, image.RescaleIntercept = 1 + k / 2, -1024 * k
        image.save_as(file)
        expected[..., k] = stored[..., k] * (1 + k / 2) - 1024 * k
    reads_as(tmp_path / "ct", expected, AFFINES["LPS"])


def test_roundings_of_directions_and_a_directory_beside_the_slices_do_not_matter(tmp_path):
    write_series(tmp_path / "ct", HU, AFFINES["oblique"])
    for k, file in enumerate(sorted((tmp_path / "ct").iterdir())):
        image = pydicom.dcmread(file)
        image.ImageOrientationPatient[k] = f"{float(image.ImageOrientationPatient[k]) + 1e-6:.12f}"
        image.save_as(file)
    directory = item(SOPClassUID="1.2.840.10008.1.3.10", SOPInstanceUID=generate_uid(), DirectoryRecordSequence=[])
    written_by(tmp_path / "ct" / "DICOMDIR", directory)
    read = load_volume(tmp_path / "ct")
    np.testing.assert_array_equal(read.numpy(), HU)
    np.testing.assert_allclose(read.affine, AFFINES["oblique"], atol=1e-4)


def test_slices_ascend_along_their_normal_whatever_their_order(tmp_path):
    grid = AFFINES["oblique and left-handed"]
    write_series(tmp_path / "ct", HU, grid)
    reads_as(tmp_path / "ct", HU[..., ::-1], grid @ nib.orientations.inv_ornt_aff([[0, 1], [1, 1], [2, -1]], HU.shape))


def test_a_leaning_stack_keeps_its_lean(tmp_path):
    """ITK would straighten it: a gantry tilt of 20 degrees is lost without a word."""
    leaning = AFFINES["LPS"].copy()
    leaning[1, 2] = 0.9
    write_series(tmp_path / "ct", HU, leaning)
    reads_as(tmp_path / "ct", HU, leaning)


def test_compressed_slices_and_a_single_one(tmp_path):
    values = np.sort(volume(64, 48, 1), axis=None).reshape(64, 48, 1)  # without noise, which RLE makes longer
    write_series(tmp_path / "ct", values, AFFINES["LPS"], SliceThickness=2.5)
    image = pydicom.dcmread(tmp_path / "ct" / "0")
    image.compress(RLELossless)
    image.save_as(tmp_path / "ct" / "0")
    reads_as(tmp_path / "ct", values, AFFINES["LPS"])


def edit(**tags) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        image = pydicom.dcmread(file)
        for name, value in tags.items():
            setattr(image, name, value)
        image.save_as(file)

    return change


def without_position(file: Path) -> None:
    image = pydicom.dcmread(file)
    del image.ImagePositionPatient
    image.save_as(file)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def doubled(file: Path) -> None:
    shutil.copy(file, file.with_name("again"))


SPOILT = {
    "missing": (Path.unlink, DicomError, "1 of 5 slices are missing; export"),
    "uneven": (edit(ImagePositionPatient=[91.25, -40.5, 804.2]), DicomError, "at uneven distances; resample"),
    "aside": (edit(ImagePositionPatient=[96.25, -40.5, 805.5625]), DicomError, "at uneven distances; resample"),
    "two series": (edit(SeriesInstanceUID="1.2.3"), DicomError, "2 series, CT .*; leave one of them"),
    "directions": (edit(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), DicomError, "different directions.*; leave"),
    "twice": (doubled, DicomError, "6 files for 5 slices; leave one file a slice"),
    "nowhere": (without_position, DicomError, "don't say where they lie; give a series of one file a slice"),
    "cut short": (cut_short, OSError, "cannot read .*has to be replaced"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_series_that_is_no_volume_is_refused_in_one_line(kind, tmp_path):
    write_series(tmp_path / "ct", HU, AFFINES["LPS"])
    spoil, error, message = SPOILT[kind]
    spoil(tmp_path / "ct" / "5")  # the second of five
    with pytest.raises(error, match=message) as caught:
        load_volume(tmp_path / "ct")
    assert str(tmp_path / "ct") in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_volume_are_refused_in_one_line(tmp_path):
    write_series(tmp_path / "ct", HU, AFFINES["LPS"])
    (tmp_path / "ct" / "0").rename(tmp_path / "slice.dcm")
    with pytest.raises(DicomError, match=r"slice\.dcm: no SEG; put the slices of a series into a folder of their own"):
        load_volume(tmp_path / "slice.dcm")
    with pytest.raises(DicomError, match="no DICOM file there; give the folder that holds the files themselves"):
        load_volume(tmp_path.parent)


def test_without_pydicom_dicom_alone_is_refused(tmp_path, monkeypatch):
    write_series(tmp_path / "ct", HU, AFFINES["LPS"])
    nib.save(nib.Nifti1Image(HU, AFFINES["LPS"]), tmp_path / "ct.nii")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for act in (lambda: load_volume(tmp_path / "ct"), lambda: save_series(tmp_path / "out", HU, AFFINES["LPS"])):
        with pytest.raises(DicomError, match=r"^DICOM needs pydicom \(.*\): python -m pip install 'pydicom>=3\.0'$"):
            act()
    reads_as(tmp_path / "ct.nii", HU, AFFINES["LPS"])


def test_an_old_pydicom_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom, "__version__", "2.4.5")
    with pytest.raises(DicomError, match=r"^DICOM needs pydicom 3, not 2\.4\.5: python -m pip install"):
        check_series(AFFINES["LPS"], "mask.nii")


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_other_formats_have_the_same_geometry(suffix, grid, tmp_path):
    lps = np.diag((-1.0, -1, 1, 1)) @ grid
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = itk.image_from_array(np.ascontiguousarray(HU.T))
    image.SetSpacing(spacing)
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    image.SetOrigin(lps[:3, 3])
    itk.imwrite(image, str(tmp_path / f"ct{suffix}"))
    read = load_volume(tmp_path / f"ct{suffix}")
    np.testing.assert_array_equal(read.numpy(), HU)
    np.testing.assert_allclose(read.affine, grid, atol=1e-4)  # float32 in a NIfTI's header


def test_a_label_map_whose_axes_a_converter_flipped_fits_its_ct(tmp_path):
    """The axes are the label map's, where the result has to go; no voxel moves."""
    write_series(tmp_path / "ct", HU, AFFINES["LPS"])
    flipped = AFFINES["LPS"] @ nib.orientations.inv_ornt_aff([[1, 1], [0, -1], [2, 1]], HU.shape)
    label_map = HU[:, ::-1].swapaxes(0, 1)
    nib.save(nib.Nifti1Image(label_map, flipped), tmp_path / "mask.nii.gz")
    loaded = LoadVolumed(["image", "ct"])({"image": tmp_path / "mask.nii.gz", "ct": tmp_path / "ct"})
    check_same_geometry(loaded["image"], loaded["ct"])
    for key in ("image", "ct"):
        np.testing.assert_array_equal(loaded[key][0].numpy(), label_map)
        np.testing.assert_allclose(loaded[key].affine, flipped, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ a SEG comes in

OF_OURS = {c.id: c.name for c in CLASSES}
OF_TOTALSEGMENTATOR = {
    **{1: "spleen", 2: "kidney_right", 3: "kidney_left", 4: "gallbladder", 5: "esophagus", 6: "liver", 7: "stomach"},
    **{8: "aorta", 9: "inferior_vena_cava", 10: "pancreas", 11: "adrenal_gland_right", 12: "adrenal_gland_left"},
    **{13: "duodenum", 14: "urinary_bladder", 15: "prostate", 16: "body"},
}
LOUD = {id_: name.upper().replace(" ", "_") for id_, name in OF_OURS.items()}
IDS = {id_: f"Label {id_}" for id_ in OF_OURS}


def item(**tags) -> Dataset:
    made = Dataset()
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def write_seg(
    path: Path,
    layers: dict[str, np.ndarray],
    grid: np.ndarray,
    kind: str = "BINARY",
    shared: bool = True,
    stated: float | None = None,
) -> None:
    """Masks (X, Y, Z) by segment label as a SEG that leaves out empty frames and has the others in no order."""
    frames, pixels = [], []
    planes = geometry(grid, 0, next(iter(layers.values())).shape[2])
    orientation, spacing, _ = planes[0]
    common = item(
        PixelMeasuresSequence=[item(PixelSpacing=spacing, SpacingBetweenSlices=stated)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=orientation)],
    )
    wanted = [(k, number, mask) for number, mask in enumerate(layers.values(), 1) for k in range(len(planes))]
    if kind == "LABELMAP":  # one layer of segment numbers
        numbers = sum(number * mask.astype(np.uint8) for number, mask in enumerate(layers.values(), 1))
        wanted = [(k, 0, numbers) for k in range(len(planes))]
    wanted = [(k, number, mask[..., k]) for k, number, mask in wanted if mask[..., k].any()]
    for k, number, mask in [wanted[i] for i in np.random.default_rng(1).permutation(len(wanted))]:
        frame = item(PlanePositionSequence=[item(ImagePositionPatient=planes[k][2])])
        if number:
            frame.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=number)]
        if not shared:
            frame.update(common)
        frames.append(frame)
        pixels.append(mask.T)
    seg = item(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4",
        SOPInstanceUID=generate_uid(),
        Modality="SEG",
        SegmentationType=kind,
        SegmentSequence=[item(SegmentNumber=k, SegmentLabel=label) for k, label in enumerate(layers, 1)],
        SharedFunctionalGroupsSequence=[common if shared else Dataset()],
        PerFrameFunctionalGroupsSequence=frames,
        **{"NumberOfFrames": len(frames), "Rows": mask.shape[1], "Columns": mask.shape[0], "SamplesPerPixel": 1},
        **{"PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0},
    )
    bits = 1 if kind == "BINARY" else 8
    seg.BitsAllocated, seg.BitsStored, seg.HighBit = bits, bits, bits - 1
    stack = np.stack(pixels)
    seg.add_new("PixelData", "OB", pack_bits(stack) if bits == 1 else stack.astype(np.uint8).tobytes())
    written_by(path, seg)


def layers_of(label_map: np.ndarray, names: dict[int, str]) -> dict[str, np.ndarray]:
    return {names[id_]: label_map == id_ for id_ in np.unique(label_map).tolist() if id_}


def all_classes() -> np.ndarray:
    """A label map (7, 5, 12) of all classes (35 pixels: frames that end within a byte), without some slices."""
    label_map = np.random.default_rng(2).integers(0, 17, (7, 5, 12)).astype(np.uint8)
    label_map[..., [0, 5, 6, 11]] = 0
    return label_map


@pytest.mark.parametrize("kind, shared", [("BINARY", True), ("BINARY", False), ("LABELMAP", True)])
@pytest.mark.parametrize("name", RIGHT_HANDED)
def test_a_seg_is_the_label_map_it_was_made_of(kind, shared, name, tmp_path):
    label_map, grid = all_classes(), AFFINES[name]
    write_seg(tmp_path / "seg.dcm", layers_of(label_map, OF_OURS), grid, kind, shared)
    reads_as(tmp_path / "seg.dcm", label_map[..., 1:11], grid @ nib.affines.from_matvec(np.eye(3), (0, 0, 1)))


@pytest.mark.parametrize("names", [OF_TOTALSEGMENTATOR, LOUD, IDS, {id_: str(id_) for id_ in OF_OURS}])
def test_segments_go_by_their_names_whoever_gave_them(names, tmp_path):
    label_map = all_classes()[..., 1:4]
    write_seg(tmp_path / "seg.dcm", layers_of(label_map, names), AFFINES["LPS"])
    np.testing.assert_array_equal(read_dicom(tmp_path / "seg.dcm").numpy(), label_map)


def test_a_seg_may_lie_in_a_folder(tmp_path):
    label_map = all_classes()[..., 1:4]
    write_seg(tmp_path / "case" / "1.2.840", layers_of(label_map, OF_OURS), AFFINES["LPS"])
    np.testing.assert_array_equal(read_dicom(tmp_path / "case").numpy(), label_map)


def in_slices(*occupied: int) -> np.ndarray:
    label_map = np.zeros((4, 3, 10), np.uint8)
    label_map[1:, :, occupied] = 6
    return label_map


@pytest.mark.parametrize(
    ("occupied", "stated", "step", "levels"),
    [
        ((2, 3, 7), None, 1, (0, 1, 5)),
        ((2, 3, 7), 9.9, 1, (0, 1, 5)),  # what is said doesn't fit
        ((1, 3, 9), None, 2, (0, 1, 4)),
        ((1, 3, 9), 2.5, 1, (0, 2, 8)),  # every second one, of which positions alone say nothing
        ((1, 9), 2.5, 1, (0, 8)),
        ((0, 2, 5), 2.5, 1, (0, 2, 5)),
        ((4,), 2.5, 1, (0,)),
    ],
)
def test_slices_that_a_seg_leaves_out_are_background(occupied, stated, step, levels, tmp_path):
    write_seg(tmp_path / "seg.dcm", {"liver": in_slices(*occupied) > 0}, AFFINES["LPS"], stated=stated)
    expected = in_slices(*levels)[..., : levels[-1] + 1]
    first = nib.affines.from_matvec(np.diag((1, 1, step)), (0, 0, occupied[0]))
    reads_as(tmp_path / "seg.dcm", expected, AFFINES["LPS"] @ first)


@pytest.mark.parametrize("axes", ["LPS", "oblique"])
def test_a_seg_without_its_last_slices_lies_on_the_grid_of_its_ct(axes, tmp_path):
    label_map = in_slices(3, 4, 6)
    values = volume(*label_map.shape)
    write_seg(tmp_path / "seg.dcm", {"liver": label_map > 0}, AFFINES[axes])
    write_series(tmp_path / "ct", values, AFFINES[axes])
    loaded = LoadVolumed(["image", "ct"])({"image": tmp_path / "seg.dcm", "ct": tmp_path / "ct"})
    check_same_geometry(loaded["image"], loaded["ct"])
    np.testing.assert_array_equal(loaded["image"][0].numpy(), label_map)
    np.testing.assert_array_equal(loaded["ct"][0].numpy(), values)
    np.testing.assert_allclose(loaded["image"].affine, AFFINES[axes], atol=1e-6)


def test_a_seg_beside_its_ct_and_another_cropped_label_map_are_refused(tmp_path):
    """Half a slice off, beyond the CT's end, or no SEG: what is missing isn't known to be empty."""
    label_map = in_slices(3, 4, 6)
    half, beyond = (AFFINES["LPS"] @ nib.affines.from_matvec(np.eye(3), (0, 0, k)) for k in (0.5, 4))
    write_series(tmp_path / "ct", volume(*label_map.shape), AFFINES["LPS"])
    for k, grid in enumerate((half, beyond)):
        write_seg(tmp_path / f"{k}.dcm", {"liver": label_map > 0}, grid)
    nib.save(nib.Nifti1Image(label_map[..., :7], AFFINES["LPS"]), tmp_path / "cropped.nii")
    for name in ("0.dcm", "1.dcm", "cropped.nii"):
        loaded = LoadVolumed(["image", "ct"])({"image": tmp_path / name, "ct": tmp_path / "ct"})
        with pytest.raises(ValueError, match="not on the same grid"):
            check_same_geometry(loaded["image"], loaded["ct"])


def test_frames_a_rounding_apart_are_of_one_slice(tmp_path):
    label_map = all_classes()[..., 1:5]
    write_seg(tmp_path / "seg.dcm", layers_of(label_map, OF_OURS), AFFINES["LPS"])
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    for k, frame in enumerate(seg.PerFrameFunctionalGroupsSequence):
        frame.PlanePositionSequence[0].ImagePositionPatient[2] += k % 5 / 1000
    seg.save_as(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_dicom(tmp_path / "seg.dcm").numpy(), label_map)


def test_organs_lie_on_the_body_and_never_on_each_other(tmp_path):
    everywhere = np.ones((4, 3, 2), bool)
    organ = everywhere.copy()
    organ[0] = False
    expected = np.where(organ, 6, BODY)
    for order in (("Body", "Liver"), ("Liver", "Body")):
        layers = {name: everywhere if name == "Body" else organ for name in order}
        write_seg(tmp_path / "seg.dcm", layers, AFFINES["LPS"])
        np.testing.assert_array_equal(read_dicom(tmp_path / "seg.dcm").numpy(), expected)
    write_seg(tmp_path / "seg.dcm", {"liver": organ, "spleen": everywhere}, AFFINES["LPS"])
    with pytest.raises(DicomError, match=r"seg\.dcm: (liver and spleen|spleen and liver) overlap; give each voxel"):
        load_volume(tmp_path / "seg.dcm")


@pytest.mark.parametrize(
    ("layers", "options", "said"),
    [
        (
            dict.fromkeys(("Tumour", "liver", "Segment 6"), in_slices(1) > 0),
            {},
            r'no known class: "Tumour", "Segment 6"; leave them out, or call them one of: spleen, .*, body$',
        ),
        (dict.fromkeys("abcdefg", in_slices(1) > 0), {}, r'"a", "b", "c", "d", "e" and 2 more; leave'),
        ({"liver": in_slices(1) > 0}, {"kind": "FRACTIONAL"}, "a fractional SEG.*; save it as a binary one$"),
        ({"liver": in_slices(0, 2, 5) > 0}, {}, "at uneven distances; resample"),
        ({"liver": in_slices(0, 2, 5) > 0}, {"stated": 3.3}, "at uneven distances; resample"),
    ],
)
def test_a_seg_that_is_no_label_map_is_refused_in_one_line(layers, options, said, tmp_path):
    write_seg(tmp_path / "seg.dcm", layers, AFFINES["LPS"], **options)
    with pytest.raises(DicomError, match=said) as caught:
        load_volume(tmp_path / "seg.dcm")
    assert str(caught.value).startswith(str(tmp_path / "seg.dcm")) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ data and a run


def test_cases_are_files_and_folders(tmp_path):
    for folder in ("images", "labels"):
        write_series(tmp_path / folder / "b.1", HU[..., :2], AFFINES["LPS"])
        (tmp_path / folder / "notes").mkdir()
        (tmp_path / folder / "notes" / "read.me").write_text("no DICOM")
    write_seg(tmp_path / "labels" / "a.dcm", {"liver": in_slices(1) > 0}, AFFINES["LPS"])
    (tmp_path / "images" / "a.mha").touch()
    assert mask_list(tmp_path / "labels") == [
        {"image": str(tmp_path / "labels" / "a.dcm"), "case": "a"},
        {"image": str(tmp_path / "labels" / "b.1"), "case": "b.1"},
    ]
    expected = [("a", "labels/a.dcm", "images/a.mha"), ("b.1", "labels/b.1", "images/b.1")]
    listed = [{"image": str(tmp_path / mask), "ct": str(tmp_path / ct), "case": case} for case, mask, ct in expected]
    assert case_list(tmp_path, "train") == listed
    entries = [{"image": ct, "label": mask} for _, mask, ct in expected]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    assert case_list(tmp_path, "train") == listed


@pytest.fixture(scope="module")
def conditional(bundles) -> Path:
    return bundles["abdominal_ct_conditional_ddpm"]


@pytest.fixture(scope="module")
def infer(conditional, run_bundle, amos, tiny_training, tiny_inference, tmp_path_factory):
    """`infer(masks, output, **overrides)` with a tiny network."""
    folder = tmp_path_factory.mktemp("weights")
    options = tiny_training(conditional) | {"dataset_dir": amos, "cache_dir": folder / "cache", "iterations": 1}
    run_bundle(conditional, "train", output_dir=folder, **options)

    def run(masks: Path, output: Path, **overrides) -> Path:
        options = tiny_inference(conditional) | {"checkpoint": folder / "model.pt"} | overrides
        run_bundle(conditional, "inference", dataset_dir=masks, output_dir=output, **options)
        return output

    return run


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """One label map as NIfTI on axes of its own, as SEG and as a series of label slices."""
    folder = tmp_path_factory.mktemp("masks")
    made = phantom((28, 22, 5), seed=3, oblique=True)
    image = nib.Nifti1Image(made.label, made.affine)
    to_lps = nib.orientations.ornt_transform(
        nib.io_orientation(made.affine), nib.orientations.axcodes2ornt(("L", "P", "S"))
    )
    lps = image.as_reoriented(to_lps)
    label_map = np.asarray(lps.dataobj)
    assert label_map.any(axis=(0, 1)).all()
    nib.save(image.as_reoriented([[2, -1], [0, 1], [1, 1]]), folder / "nifti.nii.gz")
    write_seg(folder / "seg.dcm", layers_of(label_map, OF_TOTALSEGMENTATOR), lps.affine)
    write_series(folder / "series", label_map, lps.affine, PatientName="Somebody", PatientID="7")
    return folder


def test_a_mask_gives_the_same_ct_in_every_format(infer, masks, tmp_path):
    output = infer(masks, tmp_path / "output")
    expected = nib.load(output / "nifti_ct.nii.gz")
    assert np.ptp(np.asarray(expected.dataobj)) > 100
    for case in ("seg", "series"):
        ct = nib.load(output / f"{case}_ct.nii.gz")
        assert_same_voxels(*voxels(np.asarray(ct.dataobj), ct.affine), np.asarray(expected.dataobj), expected.affine)

    series = infer(masks, tmp_path / "series", output_format="dicom")
    assert {path.name for path in series.iterdir()} == {
        *("report.json", "report.html"),
        *(f"{case}_{what}" for case in ("nifti", "seg", "series") for what in ("ct", "preview.png")),
    }
    assert read_run(str(series)).volumes == {case: series / f"{case}_ct" for case in ("nifti", "seg", "series")}
    for case in ("nifti", "series"):
        read = by_pydicom(series / f"{case}_ct")
        assert_same_voxels(*read, np.asarray(expected.dataobj), expected.affine)
        assert all(image.PatientName == image.PatientID == "" for image in slices_of(series / f"{case}_ct"))


def test_only_dicom_has_an_identity_to_keep(infer, masks, error_line, tmp_path):
    with error_line() as lines:
        infer(masks, tmp_path / "mixed", output_format="dicom", keep_identity=True)
    assert "nifti.nii.gz is no DICOM and has no identity to keep: leave out --keep_identity" in lines[0]
    assert not (tmp_path / "mixed").exists()

    (tmp_path / "masks").mkdir()
    shutil.copytree(masks / "series", tmp_path / "masks" / "series")
    output = infer(tmp_path / "masks", tmp_path / "output", output_format="dicom", keep_identity=True)
    assert {(str(image.PatientName), image.PatientID) for image in slices_of(output / "series_ct")} == {
        ("Somebody", "7")
    }
