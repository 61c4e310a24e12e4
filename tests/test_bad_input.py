"""What users get wrong ends in one line that names the remedy, and in nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.phantom import phantom


@pytest.fixture(scope="module")
def mask_guided(bundles) -> Path:
    return bundles["abdominal_ct_mask_guided_ddpm"]


@pytest.fixture(scope="module")
def weights(mask_guided, run_bundle, amos, tiny_training, tmp_path_factory) -> Path:
    """Weights of the mask-guided bundle."""
    folder = tmp_path_factory.mktemp("weights")
    options = tiny_training(mask_guided) | {"dataset_dir": amos, "cache_dir": amos / "cache", "iterations": 1}
    run_bundle(mask_guided, "train", output_dir=folder, **options)
    return folder / "model.pt"


@pytest.fixture
def infer(mask_guided, run_bundle, weights, tiny_inference, tmp_path):
    """`infer(masks, *overlays, **overrides)` into `tmp_path / "output"`."""

    def run(dataset_dir: Path, *overlays: str, **overrides) -> None:
        options = tiny_inference(mask_guided) | {"checkpoint": weights, "output_dir": tmp_path / "output"} | overrides
        run_bundle(mask_guided, "inference", *overlays, dataset_dir=dataset_dir, **options)

    return run


@pytest.fixture
def train(mask_guided, run_bundle, tiny_training, tmp_path):
    """`train(data set, **overrides)` into `tmp_path / "output"` and `tmp_path / "cache"`."""

    def run(dataset_dir: Path, **overrides) -> None:
        options = {"dataset_dir": dataset_dir, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "output"}
        run_bundle(mask_guided, "train", **tiny_training(mask_guided) | options | overrides)

    return run


@pytest.fixture
def untouched(tmp_path):
    """Check after the test that the run has left no file."""
    yield
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]


@pytest.fixture
def data(amos, tmp_path) -> Path:
    """A copy of the data set, to be spoilt."""
    return Path(shutil.copytree(amos, tmp_path / "data", ignore=shutil.ignore_patterns("cache")))


def label_map() -> np.ndarray:
    return phantom((16, 14, 4)).label


def with_values(*values: float, dtype=np.int16) -> np.ndarray:
    label = label_map().astype(dtype)
    label[0, 0, : len(values)] = values
    return label


def save(folder: Path, volume: np.ndarray, name: str = "case.nii.gz") -> Path:
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.diag([10.0, 10.0, 20.0, 1.0])), folder / name)
    return folder


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_MASKS = {
    "TotalSegmentator's ids": (lambda: with_values(17, 90), r"ids outside 0...16: 17 \(1 voxels\), 90 .*map them"),
    "negative": (lambda: with_values(-1000), r"-1000 \(1 voxels\).*like a CT in HU: give the label map"),
    "fractional": (lambda: with_values(2.5, dtype=np.float32), r"1 voxels hold .*2\.5.*nearest-neighbour"),
    "not a number": (lambda: with_values(np.nan, dtype=np.float32), r"1 voxels hold .*nan.*give the label map"),
    "2-D": (lambda: label_map()[:, :, 0], r"is 2-D with shape \(16, 14\); save .*\(X, Y, 1\)"),
    "4-D": (lambda: np.stack([label_map()] * 2, -1), r"4-D with shape \(16, 14, 4, 2\); merge its channels"),
    "empty": (lambda: 0 * label_map(), r"empty \(no voxel above 0\); check that it is the right file"),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_that_are_no_label_maps(kind, infer, tmp_path, error_line):
    """The good mask before it isn't begun either: errors come before work."""
    volume, message = BAD_MASKS[kind]
    save(tmp_path / "masks", label_map(), "a.nii.gz")
    with error_line() as lines:
        infer(save(tmp_path / "masks", volume()))
    assert re.search(rf"case\.nii\.gz: .*{message}", lines[0])


@pytest.mark.usefixtures("untouched")
def test_truncated_mask(infer, tmp_path, error_line):
    cut_short(save(tmp_path / "masks", label_map()) / "case.nii.gz")
    with error_line() as lines:
        infer(tmp_path / "masks")
    assert re.search(r"cannot read .*case\.nii\.gz: .*(replace|copy)", lines[0])


@pytest.mark.usefixtures("untouched")
def test_truncated_ct_in_evaluation(infer, data, error_line):
    cut_short(data / "imagesVa" / "amos_0003.nii.gz")
    with error_line() as lines:
        infer(data, "evaluate")
    assert re.search(r"cannot read .*imagesVa/amos_0003\.nii\.gz: .*(replace|copy)", lines[0])


@pytest.mark.usefixtures("untouched")
def test_truncated_ct_in_training(train, data, tmp_path, error_line):
    cut_short(data / "imagesTr" / "amos_0002.nii.gz")
    with error_line() as lines:
        train(data)
    assert re.search(r"cannot read .*imagesTr/amos_0002\.nii\.gz: .*replace", lines[0])
    # The good case is kept, the bad one has left nothing.
    assert [path.name[:10] for path in (tmp_path / "cache").glob("*.npy")] == ["amos_0001-"]


def shift(path: Path) -> None:
    image = nib.load(path)
    affine = image.affine.copy()
    affine[:3, 3] += 50
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), path)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("work", ["evaluation", "training"])
def test_mask_and_ct_on_different_grids(work, infer, train, data, error_line):
    suffix, case = ("Va", "amos_0003") if work == "evaluation" else ("Tr", "amos_0001")
    shift(data / f"labels{suffix}" / f"{case}.nii.gz")
    with error_line() as lines:
        infer(data, "evaluate") if work == "evaluation" else train(data)
    names = [
        rf"{folder}{suffix}/{case}\.nii\.gz has shape \(32, 32, 6\) and affine \[" for folder in ("labels", "images")
    ]
    assert re.search(rf"not on the same grid: .*{names[0]}.* but .*{names[1]}.*; resample the label map", lines[0])


@pytest.mark.usefixtures("untouched")
def test_no_masks(infer, tmp_path, error_line):
    with error_line() as lines:
        infer(tmp_path / "nowhere")
    assert re.search(r"no folder .*nowhere: check the path", lines[0])


@pytest.mark.usefixtures("untouched")
def test_missing_weights(infer, tmp_path, error_line):
    with error_line() as lines:
        infer(save(tmp_path / "masks", label_map()), checkpoint=tmp_path / "none.pt")
    assert re.search(r"no weights at .*none\.pt: train them \(python -m monai\.bundle run .*--checkpoint", lines[0])


@pytest.mark.usefixtures("untouched")
def test_weights_of_another_bundle(infer, bundles, run_bundle, amos, tiny_training, tmp_path, error_line):
    other = bundles["abdominal_ct_conditional_ddpm"]
    options = tiny_training(other) | {"iterations": 1, "dataset_dir": amos, "cache_dir": amos / "cache"}
    run_bundle(other, "train", output_dir=tmp_path / "other", **options)
    with error_line() as lines:
        infer(save(tmp_path / "masks", label_map()), checkpoint=tmp_path / "other" / "model.pt")
    assert re.search(r"model\.pt holds weights of abdominal_ct_conditional_ddpm that don't fit.*--checkpoint", lines[0])


@pytest.mark.usefixtures("untouched")
def test_damaged_weights(infer, weights, tmp_path, error_line):
    cut_short(Path(shutil.copy(weights, tmp_path / "cut.pt")))
    with error_line() as lines:
        infer(save(tmp_path / "masks", label_map()), checkpoint=tmp_path / "cut.pt")
    assert re.search(r"cut\.pt is damaged .*: replace it", lines[0])


@pytest.mark.usefixtures("untouched")
def test_mri_only(train, amos, tmp_path, error_line):
    for kind in ("images", "labels"):
        folder = tmp_path / "mri" / f"{kind}Tr"
        folder.mkdir(parents=True)
        shutil.copy(amos / f"{kind}Tr" / "amos_0001.nii.gz", folder / "amos_0507.nii.gz")
    with error_line() as lines:
        train(tmp_path / "mri")
    assert re.search(r"mri holds MRI cases only \(AMOS ids from 500 on\).*give a data set of CTs", lines[0])


@pytest.mark.usefixtures("untouched")
def test_cache_of_other_parameters(train, amos, error_line):
    """`amos / "cache"` holds slices of 32x32."""
    assert json.loads((amos / "cache" / "cache.json").read_text())["size"] == 32
    with error_line() as lines:
        train(amos, cache_dir=amos / "cache", image_size=16)
    assert re.search(r"cache has .*'size': 32.* not .*'size': 16.*: choose another cache_dir or delete", lines[0])


def no_space_left(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("untouched")
def test_full_disk_at_the_ct(infer, tmp_path, monkeypatch, error_line):
    masks, save_all = save(tmp_path / "masks", label_map()), nib.save

    def save_a_part(image: nib.Nifti1Image, path: Path) -> None:
        save_all(image, path)
        cut_short(Path(path))
        no_space_left()

    monkeypatch.setattr(nib, "save", save_a_part)
    with error_line() as lines:
        infer(masks)
    assert re.search(r"cannot write .*output/case_ct\.nii\.gz: No space left on device; free the disk", lines[0])


def test_full_disk_at_a_checkpoint(train, amos, tmp_path, monkeypatch, error_line):
    """The checkpoint before stays whole."""
    train(amos, iterations=1)
    before = {name: (tmp_path / "output" / name).read_bytes() for name in ("checkpoint.pt", "model.pt")}

    def save_a_part(content: dict, path: Path) -> None:
        Path(path).write_bytes(b"PK")
        no_space_left()

    monkeypatch.setattr(torch, "save", save_a_part)
    with error_line() as lines:
        train(amos, iterations=2, resume=tmp_path / "output" / "checkpoint.pt")
    assert re.search(r"cannot write .*output/checkpoint\.pt: No space left on device; free the disk", lines[0])
    assert {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir() if path.is_file()} == before


def test_the_command_ends_with_the_line_alone(mask_guided, tmp_path):
    """Nothing of MONAI's traceback hides the remedy; the exit status says that it failed."""
    command = [sys.executable, "-m", "monai.bundle", "run", "inference", "--output_dir", str(tmp_path / "output")]
    command += ["--config_file", str(mask_guided / "configs" / "inference.yaml"), "--dataset_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert re.match(r"error: no volume in .*: expected files that end in \.nii\.gz", done.stderr.splitlines()[-1])
    assert not (tmp_path / "output").exists()
