"""Runs are read as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.evaluation.runs import read_run

WEIGHTS = {
    "file": "models/model.pt",
    "sha256": "0123456789abcdef" * 4,
    "bundle": "abdominal_ct_mask_guided_ddpm",
    "iteration": 150_000,
    "image_size": 256,
}
REPORT = {
    "started": "2026-01-01T00:00:00+00:00",
    "weights": WEIGHTS,
    "settings": {"sampler": "ddpm", "sampling_steps": 1000},
    "cases": [{"case": "a", "ct": "a_ct.nii.gz"}, {"case": "b", "ct": "b_ct.nii.gz"}],
}


def folder(path: Path, report: dict = REPORT) -> Path:
    path.mkdir()
    (path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return path


def test_a_run_is_what_its_report_says(tmp_path):
    run = read_run(str(folder(tmp_path / "run")))
    assert (run.folder, run.method) == (tmp_path / "run", "Mask-guided DDPM")
    assert (run.iterations, run.image_size, run.weights) == (150_000, 256, "0123456789abcdef" * 4)
    assert run.settings == {"sampler": "ddpm", "sampling_steps": 1000}
    assert run.volumes == {case: tmp_path / "run" / f"{case}_ct.nii.gz" for case in "ab"}


def test_a_name_takes_the_place_of_the_weights_and_leaves_their_other_facts(tmp_path):
    run = read_run(f"Ten steps={folder(tmp_path / 'run')}")
    assert (run.method, run.iterations, run.folder) == ("Ten steps", 150_000, tmp_path / "run")


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    made = folder(tmp_path / "seed=3")
    assert read_run(str(made)).method == "Mask-guided DDPM" and read_run(str(made)).folder == made


def test_another_bundle_goes_by_its_own_name(tmp_path):
    made = folder(tmp_path / "run", REPORT | {"weights": WEIGHTS | {"bundle": "my_ct"}})
    assert read_run(str(made)).method == "my_ct"


@pytest.mark.parametrize("weights", [None, {"file": "w.pt", "sha256": "00"}, WEIGHTS | {"bundle": None}])
def test_volumes_of_unknown_origin_need_a_name(tmp_path, weights):
    made = folder(tmp_path / "run", REPORT | {"weights": weights, "settings": None})
    with pytest.raises(ValueError, match=f"give it a name, NAME={made}"):
        read_run(str(made))
    run = read_run(f"Theirs={made}")
    assert (run.method, run.settings) == ("Theirs", {})
    assert run.weights == (weights or {}).get("sha256")


def test_measurements_come_with_the_slices_of_each_case_and_the_segmenter(tmp_path):
    made = folder(tmp_path / "run")
    content = {
        "metrics": {"FID": 10.5},
        "settings": {"Dice": {"fast": True}, "image_size": 64},
        "cases": [{"case": "a", "slices": 3, "PSNR": 16.0}, {"case": "b", "slices": 4}],
    }
    (made / "metrics.json").write_text(json.dumps(content))
    run = read_run(str(made))
    assert (run.metrics, run.slices, run.segmenter) == ({"FID": 10.5}, {"a": 3, "b": 4}, {"fast": True})
    assert run.image_size == 64  # what was measured, whatever the weights are for


def test_a_run_that_measured_nothing_has_no_metrics(tmp_path):
    run = read_run(str(folder(tmp_path / "run")))
    assert (run.metrics, run.slices, run.segmenter) == ({}, {}, {})
