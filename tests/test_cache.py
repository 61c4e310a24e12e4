from __future__ import annotations

import errno
import gzip
import itertools
import multiprocessing
import os
import time
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from common import cache
from common.cache import build_cache
from common.data import SliceDataset
from common.labels import BODY
from common.transforms import LabelMapError

SIDE, DEPTH = 12, 3
LIVER = 6


def save_case(folder: Path, name: str, label: np.ndarray, hu: np.ndarray, affine: np.ndarray | None = None) -> dict:
    affine = np.eye(4) if affine is None else affine
    case = {"image": str(folder / f"{name}_label.nii.gz"), "ct": str(folder / f"{name}_ct.nii.gz"), "case": name}
    nib.save(nib.Nifti1Image(label, affine), case["image"])
    nib.save(nib.Nifti1Image(hu, affine), case["ct"])
    return case


def random_volumes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A label map with all 17 classes and a CT with values inside and outside the window.

    No HU value, and no mean of neighbours with the weights of a doubled grid (sixteenths), lies where rounding to
    0…255 would be a tie.
    """
    random = np.random.default_rng(seed)
    label = random.permuted(np.arange(SIDE * SIDE * DEPTH) % 17).reshape(SIDE, SIDE, DEPTH).astype(np.uint8)
    hu = (random.integers(-30, 30, label.shape) * 16 + 0.25).astype(np.float32)
    return label, hu


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "data").mkdir()
    return [save_case(tmp_path / "data", name, *random_volumes(seed)) for seed, name in enumerate("abc")]


def as_seen(volume: np.ndarray) -> np.ndarray:
    """(X, Y, Z) of an RAS+ volume -> (slices, rows to the back, columns to the left)."""
    return volume[::-1, ::-1].transpose(2, 1, 0)


def grey(hu: np.ndarray) -> np.ndarray:
    return np.rint(255 * (np.clip(hu.astype(np.float64), -160, 240) + 160) / 400).astype(np.uint8)


def doubled(values: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation at a quarter before and behind every sample; the first and last value go on outside."""
    values = np.moveaxis(values, axis, -1)
    before = np.concatenate([values[..., :1], values[..., :-1]], -1)
    behind = np.concatenate([values[..., 1:], values[..., -1:]], -1)
    pairs = np.stack([0.75 * values + 0.25 * before, 0.75 * values + 0.25 * behind], -1)
    return np.moveaxis(pairs.reshape(*values.shape[:-1], -1), -1, axis)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def files(folder: Path) -> set[str]:
    """Names of all files but the locks, which are empty and stay."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_the_cache_holds_rounded_grey_values_and_exact_labels(tmp_path, cases):
    paths = build_cache(cases, tmp_path / "cache", size=SIDE)

    for seed, path in enumerate(paths):
        label, hu = random_volumes(seed)
        stored = np.load(path)
        assert stored.dtype == np.uint8 and stored.shape == (DEPTH, 2, SIDE, SIDE)
        np.testing.assert_array_equal(stored[:, 0], grey(as_seen(hu)))
        np.testing.assert_array_equal(stored[:, 1], as_seen(label))
    assert [path.name[:2] for path in paths] == ["a-", "b-", "c-"]


def test_a_doubled_grid_interpolates_the_windowed_ct_and_repeats_labels(tmp_path, cases):
    stored = np.load(build_cache(cases[:1], tmp_path / "cache", size=2 * SIDE)[0])

    label, hu = random_volumes(0)
    windowed = as_seen(hu.astype(np.float64)).clip(-160, 240)
    np.testing.assert_array_equal(stored[:, 0], grey(doubled(doubled(windowed, 1), 2)))
    np.testing.assert_array_equal(stored[:, 1], as_seen(label).repeat(2, 1).repeat(2, 2))


def test_the_dataset_gives_back_what_the_volumes_hold(tmp_path, cases):
    dataset = SliceDataset(build_cache(cases, tmp_path / "cache", size=SIDE))

    assert len(dataset) == 3 * DEPTH
    for (seed, k), item in zip(itertools.product(range(3), range(DEPTH)), dataset, strict=True):
        label, hu = random_volumes(seed)
        np.testing.assert_array_equal(item["image"][0], as_seen(label)[k])
        windowed = (as_seen(hu)[k].clip(-160, 240) + 160) / 400
        np.testing.assert_allclose(item["ct"][0], windowed, atol=0.5 / 255 + 1e-6)


def test_the_body_comes_from_the_ct_where_the_label_map_has_none(tmp_path):
    x, y, _ = np.mgrid[:40, :40, :8]
    distance = np.hypot(x - 19.5, y - 19.5)
    label = np.where(distance < 5, LIVER, 0).astype(np.uint8)
    hu = np.where(distance < 15, 40, -1000).astype(np.int16)
    affine = np.diag([5.0, 5.0, 5.0, 1.0])

    stored = np.load(build_cache([save_case(tmp_path, "a", label, hu, affine)], tmp_path / "cache", size=40)[0])

    stored, distance = stored[:, 1], as_seen(distance)
    np.testing.assert_array_equal(stored == LIVER, distance < 5)
    assert (stored[(distance >= 5) & (distance < 13.5)] == BODY).all()
    assert (stored[distance > 16] == 0).all()


def test_only_what_is_missing_is_built_again(tmp_path, cases):
    paths = build_cache(cases, tmp_path / "cache", size=SIDE)
    before = {path: path.stat() for path in paths}
    content = arrays(tmp_path / "cache")
    paths[1].unlink()

    assert build_cache(cases, tmp_path / "cache", size=SIDE) == paths

    assert arrays(tmp_path / "cache") == content
    for path in (paths[0], paths[2]):
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before[path].st_ino, before[path].st_mtime_ns)


def test_a_changed_source_is_built_again(tmp_path, cases):
    old = build_cache(cases, tmp_path / "cache", size=SIDE)
    label, hu = random_volumes(7)
    save_case(tmp_path / "data", "b", label, hu)
    os.utime(cases[1]["image"], ns=(1, 1))  # a file system's clock may be too coarse for two writes in a row

    new = build_cache(cases, tmp_path / "cache", size=SIDE)

    assert [a == b for a, b in zip(old, new, strict=True)] == [True, False, True]
    np.testing.assert_array_equal(np.load(new[1])[:, 1], as_seen(label))


def test_a_changed_file_in_a_folder_of_a_series_changes_the_key(tmp_path, cases):
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"one")
    case = cases[0] | {"ct": str(series)}
    before = cache._source_key(case)
    assert cache._source_key(case) == before
    (series / "1.dcm").write_bytes(b"other")
    assert cache._source_key(case) != before


def test_a_ct_on_flipped_axes_gives_the_same_slices(tmp_path):
    label, hu = random_volumes(3)
    straight = save_case(tmp_path, "a", label, hu)
    turned = straight | {"ct": str(tmp_path / "turned.nii.gz"), "case": "b"}
    nib.save(nib.load(straight["ct"]).as_reoriented(np.array([[1, -1], [0, 1], [2, -1]])), turned["ct"])
    one, other = (np.load(path) for path in build_cache([straight, turned], tmp_path / "cache", size=SIDE))
    np.testing.assert_array_equal(one, other)


def test_other_parameters_are_refused_before_work(tmp_path, cases):
    build_cache(cases, tmp_path / "cache", size=SIDE)
    before = files(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"'size': 12.*'size': 24.*another cache_dir or delete") as error:
        build_cache(cases, tmp_path / "cache", size=24)
    assert str(tmp_path / "cache") in one_line(error)
    assert files(tmp_path / "cache") == before

    (tmp_path / "cache" / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="unreadable") as error:
        build_cache(cases, tmp_path / "cache", size=SIDE)
    one_line(error)


@pytest.mark.parametrize("key", ["image", "ct"])
def test_a_truncated_volume_is_named_and_leaves_nothing_behind(tmp_path, cases, key):
    damaged = Path(cases[1][key])
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])

    with pytest.raises(OSError, match=r"cannot read.*replaced") as error:
        build_cache(cases, tmp_path / "cache", size=SIDE)

    assert str(damaged) in one_line(error)
    assert {name[:2] for name in files(tmp_path / "cache")} == {"ca", "a-"}  # cache.json and what was built before

    damaged.write_bytes(content)
    assert len(build_cache(cases, tmp_path / "cache", size=SIDE)) == 3


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
def test_other_formats_give_the_same_cache(tmp_path, suffix):
    label, hu = random_volumes(0)
    case = save_case(tmp_path, "a", label, hu, np.array([[-1.5, 0, 0, 9], [0, 2, 0, -4], [0, 0, 3, 1], [0, 0, 0, 1.0]]))
    other = {key: str(tmp_path / f"{key}{suffix}") for key in ("image", "ct")} | {"case": "a"}
    for key in ("image", "ct"):
        itk.imwrite(itk.imread(case[key]), other[key])

    paths = build_cache([case, other], tmp_path / "cache", size=SIDE)

    np.testing.assert_array_equal(np.load(paths[0]), np.load(paths[1]))


def test_a_file_that_is_no_volume_is_named(tmp_path, cases):
    Path(cases[0]["ct"]).write_bytes(gzip.compress(b"not an image"))
    with pytest.raises(OSError, match="cannot read") as error:
        build_cache(cases, tmp_path / "cache", size=SIDE)
    assert cases[0]["ct"] in one_line(error)


def test_a_missing_source_is_named_before_work(tmp_path, cases):
    Path(cases[2]["ct"]).unlink()
    with pytest.raises(FileNotFoundError) as error:
        build_cache(cases, tmp_path / "cache", size=SIDE)
    assert cases[2]["ct"] in one_line(error)
    assert files(tmp_path / "cache") == set()


def test_what_is_no_label_map_is_named(tmp_path, cases):
    label, hu = random_volumes(0)
    case = save_case(tmp_path, "wrong", label + 1, hu)
    with pytest.raises(LabelMapError) as error:
        build_cache([case], tmp_path / "cache", size=SIDE)
    assert case["image"] in one_line(error)


def test_a_shifted_label_map_is_refused(tmp_path, cases):
    shifted = nib.load(cases[0]["image"])
    nib.save(nib.Nifti1Image(np.asarray(shifted.dataobj), np.diag([-1.0, 1, 1, 1])), cases[0]["image"])
    with pytest.raises(ValueError, match="grid") as error:
        build_cache(cases, tmp_path / "cache", size=SIDE)
    assert cases[0]["image"] in one_line(error)


def test_a_full_disk_leaves_nothing_behind(tmp_path, cases, monkeypatch):
    def write_half(path, array):
        Path(path).write_bytes(array.tobytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", write_half)
        with pytest.raises(OSError, match=r"cannot write.*No space left on device.*free the disk") as error:
            build_cache(cases, tmp_path / "cache", size=SIDE)
    one_line(error)
    assert files(tmp_path / "cache") == {"cache.json"}

    assert len(build_cache(cases, tmp_path / "cache", size=SIDE)) == 3


def build_and_count(cases, cache_dir, journal, barrier):
    """One of two processes; writes a line into the journal for every volume it preprocesses."""
    preprocess = cache._slices

    def counted(case, size):
        with open(journal, "a") as file:
            file.write(f"{case['case']}\n")
        time.sleep(0.3)  # long enough for the other process to come across the same volume
        return preprocess(case, size)

    cache._slices = counted
    barrier.wait()
    build_cache(cases, cache_dir, size=SIDE)


def test_two_processes_build_every_volume_once_and_get_what_one_gets(tmp_path, cases):
    build_cache(cases, tmp_path / "alone", size=SIDE)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    journal = tmp_path / "journal"
    processes = [
        context.Process(target=build_and_count, args=(cases, tmp_path / "together", journal, barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)

    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(journal.read_text().split()) == ["a", "b", "c"]
    assert arrays(tmp_path / "together") == arrays(tmp_path / "alone")


def test_a_cache_that_cannot_be_made_names_the_option(tmp_path, cases):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write the cache .*file/cache.*--cache_dir") as error:
        build_cache(cases, tmp_path / "file" / "cache", size=16)
    assert "\n" not in str(error.value)
