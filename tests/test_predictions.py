"""Volumes made earlier: found by the names of their cases, and taken as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from common.evaluation.predictions import MadeOrSampled, TakeMaded, prepare_case, with_predictions


def cases(count: int) -> list[dict[str, str]]:
    return [{"image": f"/data/{k}.nii.gz", "ct": f"/data/{k}_0.nii.gz", "case": f"p.{k}"} for k in range(count)]


def test_each_case_gets_the_volume_of_its_name(tmp_path):
    for k in range(3):
        (tmp_path / f"p.{k}_ct.nii.gz").touch()
    (tmp_path / "p.7_ct.nii.gz").touch()  # of a case that isn't evaluated
    listed = with_predictions(cases(3), tmp_path, "out")
    assert listed == [case | {"made": str(tmp_path / f"{case['case']}_ct.nii.gz")} for case in cases(3)]
    assert with_predictions(cases(3), str(tmp_path), "out") == listed


def test_a_volume_may_be_a_dicom_series(tmp_path):
    (tmp_path / "p.0_ct").mkdir()
    (tmp_path / "p.1_ct.nii.gz").touch()
    made = [case["made"] for case in with_predictions(cases(2), tmp_path, "out")]
    assert made == [str(tmp_path / "p.0_ct"), str(tmp_path / "p.1_ct.nii.gz")]
    (tmp_path / "p.0_ct.nii.gz").touch()
    with pytest.raises(ValueError, match=r"p\.0_ct and p\.0_ct\.nii\.gz are the same case: keep one of them"):
        with_predictions(cases(2), tmp_path, "out")


def test_without_a_folder_nothing_changes():
    assert with_predictions(cases(2), None, "out") == cases(2)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ((0, 1, 2, 3, 5), "p.4_ct.nii.gz"),
        ((0, 2, 4), "p.1_ct.nii.gz, p.3_ct.nii.gz, p.5_ct.nii.gz"),
        ((5,), "p.0_ct.nii.gz, p.1_ct.nii.gz, p.2_ct.nii.gz and 2 more"),
    ],
)
def test_missing_volumes_are_named_with_the_remedy(tmp_path, there, said):
    for k in there:
        (tmp_path / f"p.{k}_ct.nii.gz").touch()
    with pytest.raises(FileNotFoundError) as caught:
        with_predictions(cases(6), tmp_path, "out")
    remedy = "make them with configs/inference.yaml, or evaluate without predictions_dir"
    assert str(caught.value) == f"{tmp_path} lacks {said}: {remedy}"


def test_a_folder_that_is_not_there_lacks_all():
    with pytest.raises(FileNotFoundError, match=r"^/nowhere lacks p\.0_ct\.nii\.gz: "):
        with_predictions(cases(1), Path("/nowhere"), "out")


def test_a_case_is_prepared_with_or_without_its_volume():
    image, made = torch.ones(1, 1, 2, 2, 2, dtype=torch.uint8), torch.rand(1, 1, 2, 2, 2)
    for batch in ({"image": image, "ct": made}, {"image": image, "ct": made, "made": made}):
        inputs, target, args, kwargs = prepare_case(batch, device="meta", non_blocking=True)
        assert inputs.device.type == "meta" and inputs.dtype == torch.uint8
        assert target is None and args == ()
        assert kwargs == {"made": batch.get("made")}


def test_a_volume_that_is_there_is_not_sampled():
    image, made = torch.ones(1, 1, 2, 2, 2, dtype=torch.uint8), torch.rand(1, 1, 2, 2, 2)
    infer = MadeOrSampled(lambda inputs, network: network(inputs))
    assert torch.equal(infer(image, torch.zeros_like, made=made), made)
    assert torch.equal(infer(image, torch.zeros_like, made=None), torch.zeros_like(image))
    assert torch.equal(MadeOrSampled(None)(image, None, made=made), made)


def test_the_original_takes_the_place_of_what_went_over_the_grid():
    hu = torch.tensor([-1024.0, -0.6, 39.5001, 3071.0]).view(1, 1, 1, 4)
    data = {"pred": torch.zeros(1, 1, 1, 4), "made_hu": MetaTensor(hu), "other": 1}
    taken = TakeMaded("pred", made_key="made_hu")(data)
    assert taken["pred"].dtype == torch.int16  # as `ToHUd` leaves it, rounded
    assert taken["pred"].flatten().tolist() == [-1024, -1, 40, 3071]
    assert taken["made_hu"] is data["made_hu"] and taken["other"] == 1
    assert torch.equal(data["pred"], torch.zeros(1, 1, 1, 4))


def test_without_an_original_the_prediction_stays():
    data = {"pred": torch.rand(1, 2, 2, 2)}
    assert TakeMaded("pred", made_key="made_hu")(data)["pred"] is data["pred"]


def test_a_run_is_not_evaluated_into_its_own_folder(tmp_path):
    with pytest.raises(ValueError, match=r"^predictions_dir and output_dir are both .*: name another output_dir$"):
        with_predictions(cases(1), tmp_path / "sub" / "..", str(tmp_path))
