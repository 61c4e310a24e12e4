"""DICOM out: a synthetic CT as a series of axial slices that say what they are."""

from __future__ import annotations

import shutil
from datetime import datetime
from os import PathLike
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ..files import replacing
from ..geometry import Orientation
from ..transforms import HU_WINDOW
from .slices import LPS_TO_RAS, DicomError, dicom_files, pydicom

NOTE = "synthetic CT: made from a label map by a generative model, not acquired from a patient; for research only"

SYNTHETIC_CT = {
    "SpecificCharacterSet": "ISO_IR 192",
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "Modality": "CT",
    "ImageType": ["DERIVED", "SECONDARY", "AXIAL"],
    "SyntheticData": "YES",
    "SeriesDescription": "synthetic CT",
    "DerivationDescription": NOTE,
    "ImageComments": NOTE,
    "Manufacturer": "abdominal-ct-synthesis",
    "SeriesNumber": 1,
    "BurnedInAnnotation": "NO",
    "RescaleIntercept": 0,
    "RescaleSlope": 1,
    "RescaleType": "HU",
    "WindowCenter": sum(HU_WINDOW) / 2,
    "WindowWidth": HU_WINDOW[1] - HU_WINDOW[0],
}
"""What every slice says."""

EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"),
    *("ReferringPhysicianName", "PositionReferenceIndicator", "PatientPosition", "KVP", "AcquisitionNumber"),
)
"""What the standard wants to be there, empty where nothing is known."""

IDENTITY = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "StudyDescription", "AccessionNumber"),
    *("ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator"),
)
"""Whose study an image belongs to, and whose coordinates it has."""

SKEW = 1e-4
"""The largest cosine between perpendicular axes: 0.05 mm in half a metre."""


def check_series(affine: np.ndarray, name: str, identity_of: str | PathLike | None = None) -> None:
    """Check that `save_series` can write a volume.

    Args:
        affine, identity_of: as there.
        name: how messages call the volume; best its file name.

    Raises:
        DicomError: axes that aren't perpendicular, an `identity_of` that is no DICOM, or no pydicom.
    """
    pydicom()
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > SKEW:
        raise DicomError(
            f"{name}: axes aren't perpendicular, which readers of DICOM straighten: use --output_format nifti"
        )
    if identity_of is not None and not dicom_files(identity_of):
        raise DicomError(f"{identity_of} is no DICOM and has no identity to keep: leave out --keep_identity")


def save_series(
    path: str | PathLike, hu: np.ndarray, affine: np.ndarray, identity_of: str | PathLike | None = None
) -> None:
    """Write a synthetic CT as a folder of CT images, one a slice; a folder that is there is replaced as a whole.

    Slices are axial, as on a radiologist's screen and from the feet up, whatever the order of the volume's axes;
    voxels stay where they are. All UIDs are new, the patient's tags are empty.

    Args:
        path: folder to write.
        hu: (X, Y, Z) in HU, stored as they are in 16 bits.
        affine: 4x4, voxel to mm (RAS+).
        identity_of: DICOM file or folder to take patient, study and frame of reference over from.

    Raises:
        DicomError: see `check_series`.
    """
    check_series(affine, str(path), identity_of)
    orientation = Orientation.of(affine)
    affine = LPS_TO_RAS @ affine @ nib.orientations.inv_ornt_aff(orientation.codes, hu.shape)
    slices = orientation.apply(torch.from_numpy(hu.astype(np.int16))).movedim(-1, 0).numpy()
    image = _header(affine, identity_of)
    with replacing(path) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        try:
            temporary.mkdir()
            for k, pixels in enumerate(slices):
                image.InstanceNumber = k + 1
                image.ImagePositionPatient = _decimals(affine[:3] @ (0, 0, k, 1))
                image.set_pixel_data(pixels, "MONOCHROME2", 16)  # gives the image a UID of its own, too
                image.save_as(temporary / f"{k + 1:04d}.dcm", enforce_file_format=True)
            shutil.rmtree(path, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _header(affine: np.ndarray, identity_of: str | PathLike | None) -> Any:
    """What all slices share, as a pydicom Dataset; the affine goes from row, column, slice to LPS."""
    image = pydicom().Dataset()
    now = datetime.now()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    down, along, _ = (affine[:3, :3] / spacing).T
    content = {
        **dict.fromkeys(EMPTY, ""),
        **SYNTHETIC_CT,
        **{
            name: pydicom().uid.generate_uid()
            for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
        },
        **{f"{what}Date": now.strftime("%Y%m%d") for what in ("Study", "Series", "Content")},
        **{f"{what}Time": now.strftime("%H%M%S") for what in ("Study", "Series", "Content")},
        "ImageOrientationPatient": _decimals((*along, *down)),
        "PixelSpacing": _decimals(spacing[:2]),
        "SliceThickness": _decimals(spacing[2:])[0],
        "SpacingBetweenSlices": _decimals(spacing[2:])[0],
    }
    if identity_of is not None:
        source = pydicom().dcmread(dicom_files(identity_of)[0], stop_before_pixels=True)
        content |= {"StudyDate": "", "StudyTime": ""}  # of another's study only what its files say
        content |= {name: str(source[name].value) for name in IDENTITY if source.get(name)}
    for name, value in content.items():
        setattr(image, name, value)
    return image


def _decimals(values: np.ndarray) -> list[str]:
    """Numbers in the 16 characters that DICOM has for them."""
    return [pydicom().valuerep.format_number_as_ds(float(value)) for value in values]
