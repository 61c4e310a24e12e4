"""Metrics against scikit-image and closed forms, and the tables of two cases with known numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import SSIMMetric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common.evaluation.metrics import MAX_PSNR, CappedPSNR, MetricTable, axial_slices


def pairs(count: int = 5, side: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth slices in [0, 1] and what noise of growing strength makes of them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    real = np.stack([0.5 + 0.4 * np.sin((k + 2) * x * 3) * np.cos((k + 1) * y * 4) for k in range(count)])
    noise = rng.normal(size=real.shape) * np.linspace(0.01, 0.3, count)[:, None, None]
    return tuple(torch.from_numpy(v).float()[:, None] for v in ((real + noise).clip(0, 1), real))


def test_psnr_is_that_of_scikit_image():
    pred, real = pairs()
    values = CappedPSNR(max_val=1.0)(pred, real).flatten()
    expected = [peak_signal_noise_ratio(r.numpy(), p.numpy(), data_range=1.0) for p, r in zip(pred, real, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_psnr_of_a_constant_error_is_its_closed_form():
    real = torch.full((2, 1, 8, 8), 0.5)
    pred = real + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    np.testing.assert_allclose(CappedPSNR(max_val=1.0)(pred, real).flatten(), [20.0, 40.0], rtol=1e-5)


def test_psnr_of_identical_slices_is_100():
    pred, real = pairs()
    pred[1] = real[1]
    metric = CappedPSNR(max_val=1.0)
    values = metric(pred, real).flatten()
    assert values[1] == MAX_PSNR == 100.0
    assert metric.aggregate().item() == pytest.approx(values.mean().item()) and torch.isfinite(values).all()


def test_ssim_is_that_of_scikit_image():
    """Both use a Gaussian window of 11 with σ = 1.5 and mean over the windows that lie within the slice."""
    pred, real = pairs()
    values = SSIMMetric(spatial_dims=2, data_range=1.0)(pred, real).flatten()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [
        structural_similarity(r[0].double().numpy(), p[0].double().numpy(), **options)
        for p, r in zip(pred, real, strict=True)
    ]
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert 0.1 < min(expected) < 0.6 and max(expected) > 0.95  # over the whole range


# ---------------------------------------------------------------------------------------------------------- a run


def item(errors: list[float], empty: tuple[int, ...] = (), side: int = 16) -> dict[str, torch.Tensor]:
    """A volume of constant slices, slice k wrong by errors[k]; those in `empty` have no body, and a CT of noise."""
    ct = torch.full((1, side, side, len(errors)), 0.4)
    mask = torch.ones(1, side, side, len(errors), dtype=torch.uint8)
    mask[0, 0] = 0
    pred = ct + torch.tensor(errors)
    for k in empty:
        mask[..., k] = 0
        ct[..., k] = torch.rand(1, side, side, generator=torch.Generator().manual_seed(k))
    return {name: MetaTensor(v) for name, v in (("pred_slices", pred), ("ct_slices", ct), ("mask_slices", mask))}


def test_slices_without_a_body_are_dropped_and_the_others_stay_in_order():
    output = [item([0.1, 0.2, 0.3, 0.4], empty=(0, 2)), item([0.5])]
    pred, ct = axial_slices(output)
    assert pred.shape == ct.shape == (3, 1, 16, 16)
    assert pred.dtype == ct.dtype == torch.float32
    torch.testing.assert_close((pred - ct)[:, 0, 0, 0], torch.tensor([0.2, 0.4, 0.5]))
    assert (ct == 0.4).all()


def test_slices_are_axial_and_not_turned():
    volume = torch.rand(1, 4, 4, 3)
    mask = torch.ones(1, 4, 4, 3)
    pred, ct = axial_slices([{"pred_slices": volume, "ct_slices": volume * 0.5, "mask_slices": mask}])
    for k in range(3):
        assert torch.equal(pred[k, 0], volume[0, :, :, k]) and torch.equal(ct[k, 0], volume[0, :, :, k] * 0.5)


def tables(folder: Path, cases: dict[str, dict], others: Mapping[str, float] | None = None) -> Engine:
    """An evaluator of these outputs with the metrics that the bundles' evaluate.yaml has, and others' results."""
    engine = Engine(lambda _, batch: [cases[entry["case"]] for entry in batch])
    metrics = {"SSIM": SSIMMetric(spatial_dims=2, data_range=1.0), "PSNR": CappedPSNR(max_val=1.0)}
    for name, metric in metrics.items():
        IgniteMetricHandler(metric, output_transform=axial_slices).attach(engine, name)
    engine.add_event_handler(Events.COMPLETED, lambda: engine.state.metrics.update(others or {}))
    MetricTable(folder).attach(engine)
    engine.run([[{"case": name}] for name in cases])
    return engine


def constant_ssim(error: float) -> float:
    """SSIM of constant slices 0.4 and 0.4 + error: the luminance term alone."""
    a, b, c = 0.4, 0.4 + error, 0.01**2
    return (2 * a * b + c) / (a**2 + b**2 + c)


def test_tables_have_a_row_a_case_and_the_mean_over_all_slices(tmp_path):
    # first case: PSNR 20 and 40, and a slice without body; second: 100 (no error), and four times 20
    engine = tables(tmp_path, {"first": item([0.1, 0.01, 0.5], empty=(2,)), "second": item([0.0, 0.1, 0.1, 0.1, 0.1])})
    far, near = constant_ssim(0.1), constant_ssim(0.01)
    expected = {
        "first": (2, (far + near) / 2, 30.0),
        "second": (5, (1 + 4 * far) / 5, 36.0),
        "**all slices**": (7, (1 + 5 * far + near) / 7, 240 / 7),
    }
    with open(tmp_path / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["case", "slices", "SSIM", "PSNR"]
    assert [row[0] for row in rows] == ["first", "second"]
    lines = (tmp_path / "metrics.md").read_text().splitlines()
    assert lines[:2] == ["| case | slices | SSIM | PSNR |", "| --- | --- | --- | --- |"]
    rows_md = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0] for row in rows_md] == list(expected)
    assert rows_md[:2] == rows
    for name, slices, ssim, psnr in rows_md:
        assert int(slices) == expected[name][0]
        assert float(ssim) == pytest.approx(expected[name][1], abs=2e-4)
        assert float(psnr) == pytest.approx(expected[name][2], abs=2e-3)
    assert engine.state.metrics["PSNR"] == pytest.approx(240 / 7, abs=1e-3)


def test_running_twice_starts_afresh(tmp_path):
    cases = {"only": item([0.1, 0.01])}
    engine = tables(tmp_path, cases)
    first = (tmp_path / "metrics.csv").read_text()
    engine.run([[{"case": "only"}]])
    assert (tmp_path / "metrics.csv").read_text() == first


def test_tables_are_written_when_all_is_measured_and_not_before(tmp_path):
    seen = []
    engine = Engine(lambda _, batch: [item([0.1])])
    IgniteMetricHandler(CappedPSNR(max_val=1.0), output_transform=axial_slices).attach(engine, "PSNR")
    MetricTable(tmp_path / "new").attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: seen.append((tmp_path / "new").exists()))
    engine.run([[{"case": "a"}], [{"case": "b, c"}]])
    assert seen == [False, False]
    with open(tmp_path / "new" / "metrics.csv", newline="") as file:
        assert list(csv.reader(file))[2] == ["b, c", "1", "20.0000"]


def content(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


CASES = {"c, last": item([0.1, 0.01, 0.5], empty=(2,)), "a": item([0.0, 0.1, 0.1]), "b": item([0.01])}


def test_json_has_everything_in_full(tmp_path):
    others = {"dice_right_kidney": 0.123456789, "dice_mean": 0.5, "FID": 87.654321, "n": 6}
    tables(tmp_path, CASES, others)
    far, near = constant_ssim(0.1), constant_ssim(0.01)
    expected = [("a", 3, (1 + 2 * far) / 3, 140 / 3), ("b", 1, near, 40.0), ("c, last", 2, (far + near) / 2, 30.0)]
    found = content(tmp_path)
    assert found.keys() == {"metrics", "settings", "cases"}
    assert [tuple(case) for case in found["cases"]] == 3 * [("case", "slices", "SSIM", "PSNR")]
    for case, row in zip(found["cases"], expected, strict=True):
        assert tuple(case.values())[:2] == row[:2]
        assert tuple(case.values())[2:] == pytest.approx(row[2:], rel=1e-4)  # SSIM is computed in float32
    assert list(found["metrics"]) == ["SSIM", "PSNR", *others]
    assert {name: found["metrics"][name] for name in others} == others
    assert found["metrics"]["SSIM"] == pytest.approx((1 + 3 * far + 2 * near) / 6, rel=1e-4)
    assert found["metrics"]["PSNR"] == pytest.approx((140 + 60 + 40) / 6, rel=1e-5)


def test_what_is_no_value_of_slices_stands_below_the_table(tmp_path):
    tables(tmp_path, CASES, {"dice_right_kidney": 0.123456789, "FID": 87.654321, "n": 1234})
    lines = (tmp_path / "metrics.md").read_text().splitlines()
    assert lines[0] == "| case | slices | SSIM | PSNR |"
    assert lines[5].startswith("| **all slices** | 6 | ")
    assert lines[6:] == ["", "dice right kidney: 0.1235", "", "FID: 87.65", "", "n: 1,234"]
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert next(csv.reader(file)) == ["case", "slices", "SSIM", "PSNR"]


def of_one_process(rank: int, folder: Path, shares: tuple[list[str], list[str]]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    tables(folder / f"of {rank}", {case: CASES[case] for case in shares[rank]})
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [(["c, last", "b"], ["a"]), (["b"], ["a", "c, last"])])
def test_two_processes_leave_the_tables_of_one(tmp_path, shares):
    torch.multiprocessing.start_processes(of_one_process, (tmp_path, shares), nprocs=2, start_method="fork")
    tables(tmp_path / "alone", CASES)
    assert not (tmp_path / "of 1").exists()
    one, two = (content(tmp_path / name) for name in ("alone", "of 0"))
    assert two["cases"] == one["cases"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    for name in ("metrics.csv", "metrics.md"):
        assert (tmp_path / "of 0" / name).read_text() == (tmp_path / "alone" / name).read_text()
