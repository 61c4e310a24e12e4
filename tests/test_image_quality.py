"""FID and KID of an evaluator's run, alone and in two processes, with and without a reference; MS-SSIM by hand."""

from __future__ import annotations

import logging
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.metrics import SSIMMetric
from torch import nn

from common.evaluation.fid import frechet_distance, kernel_distance
from common.evaluation.image_quality import FeatureDistances, MultiScaleSSIM

SETTINGS = {"subsets": 4, "subset_size": 20, "seed": 3}


class Pooled(nn.Module):
    """Six features: means over 2x3 regions, weighted. Counts what it is asked for."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6, bias=False)
        self.mix.weight.data = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and x.shape[1] == 1
        self.seen += len(x)
        return self.mix(F.adaptive_avg_pool2d(x, (2, 3)).flatten(1))


def slices(n: int, seed: int, dark: float = 1.0) -> torch.Tensor:
    return dark * torch.rand(n, 1, 8, 9, generator=torch.Generator().manual_seed(seed))


CASES = [(slices(n, seed=n, dark=0.9), slices(n, seed=100 + n)) for n in (11, 4, 0, 17, 1)]
"""What five iterations give: synthetic and real slices; one has none."""


def evaluate(metric: FeatureDistances, cases=CASES) -> dict[str, float]:
    engine = Engine(lambda _, case: case)
    metric.attach(engine, "distances")
    return engine.run(cases).metrics


def expected(pred: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """The distances of all slices at once."""
    with torch.no_grad():
        x, y = (Pooled().eval()(v) for v in (pred, real))
    moments = [m for v in (x, y) for m in (v.double().mean(dim=0), torch.cov(v.double().T))]
    kid = kernel_distance(x, y, subsets=4, size=20, seed=3)
    return {"FID": frechet_distance(*moments), "KID": kid, "n": len(x), "n_real": len(y)}


def all_at_once() -> dict[str, float]:
    return expected(*(torch.cat(part) for part in zip(*CASES, strict=True)))


def test_a_run_in_portions_gives_the_distances_of_all_slices():
    metric = FeatureDistances(Pooled(), **SETTINGS, batch_size=5)
    found = evaluate(metric)
    assert found == pytest.approx(all_at_once(), rel=1e-6)
    assert found["n"] == found["n_real"] == 33 and found["FID"] > 0.01
    assert evaluate(metric) == found  # and begins afresh when it runs again


def test_equal_slices_are_no_distance_apart():
    found = evaluate(FeatureDistances(Pooled(), **SETTINGS), [(slices(30, seed=0),) * 2])
    assert found["FID"] == pytest.approx(0, abs=1e-9)


def test_without_kid_nothing_else_changes():
    found = evaluate(FeatureDistances(Pooled(), subsets=0))
    assert "KID" not in found
    assert found["FID"] == pytest.approx(all_at_once()["FID"], rel=1e-6)


def test_single_slices_have_counts_but_no_distance():
    for cases, n in (([CASES[4]], 1), ([CASES[2]], 0)):
        found = evaluate(FeatureDistances(Pooled()), cases)
        assert math.isnan(found["FID"]) and math.isnan(found["KID"])
        assert found["n"] == found["n_real"] == n


@pytest.mark.parametrize(("n", "warned"), [(5, True), (6, False)])
def test_fewer_slices_than_features_are_warned_of(caplog, n, warned):
    evaluate(FeatureDistances(Pooled()), [(slices(n, seed=0), slices(9, seed=1))])
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(f"FID of {n} slices with 6 features" in line for line in said) == warned


def test_smaller_subsets_than_asked_for_are_noted(caplog):
    caplog.set_level(logging.INFO)
    evaluate(FeatureDistances(Pooled(), subset_size=1000))
    assert "KID of subsets of 33 slices instead of 1000" in caplog.text


def test_settings_say_what_was_computed(tmp_path):
    metric = FeatureDistances(Pooled(), planes=["xy"], reference=tmp_path / "real.pt", **SETTINGS)
    other = FeatureDistances(Pooled(seed=1))
    assert metric.settings["kid"] == {"subsets": 4, "size": 20, "seed": 3}
    assert metric.settings["planes"] == ["xy"] and metric.settings["reference"] == str(tmp_path / "real.pt")
    assert metric.settings["features"].startswith("Pooled ")
    assert metric.settings["features"] != other.settings["features"]


# ----------------------------------------------------------------------------------------------------------- planes


def test_planes_have_their_own_distances_and_their_mean():
    planes = {"xy": CASES[0], "yz": CASES[3], "xz": (slices(12, 5)[..., :7], slices(12, 6)[..., :7])}
    # in two iterations, so that a plane's slices must find each other again
    halves = [[tuple(v[part::2] for v in pair) for pair in planes.values()] for part in (0, 1)]
    found = evaluate(FeatureDistances(Pooled(), planes=list(planes), **SETTINGS), halves)
    of_planes = {plane: expected(*pair) for plane, pair in planes.items()}
    for plane, values in of_planes.items():
        assert {name: found[f"{name}_{plane}"] for name in values} == pytest.approx(values, rel=1e-5)
    for name in ("FID", "KID"):
        assert found[name] == pytest.approx(sum(values[name] for values in of_planes.values()) / 3, rel=1e-5)
    assert "n" not in found


def test_two_planes_are_not_taken_for_a_batch():
    """Ignite takes two equally long tuples of tensors apart unless told otherwise."""
    found = evaluate(FeatureDistances(Pooled(), planes=["xy", "xz"], **SETTINGS), [[CASES[0], CASES[3]]])
    assert (found["n_xy"], found["n_xz"]) == (11, 17)


def test_unknown_planes_are_refused():
    with pytest.raises(ValueError, match=r"^no plane axial: choose from xy, yz, xz$"):
        FeatureDistances(Pooled(), planes=["xy", "axial"])


def test_config_of_planes():
    """As an overlay writes it."""
    mask = torch.ones(1, 6, 7, 8)
    volumes = {"pred_slices": torch.rand(1, 6, 7, 8), "ct_slices": torch.rand(1, 6, 7, 8), "mask_slices": mask}
    config = {
        "planes": ["xy", "yz", "xz"],
        "metric": {
            "_target_": "common.evaluation.image_quality.FeatureDistances",
            "extractor": {"_target_": f"{__name__}.Pooled"},
            "planes": "@planes",
            "output_transform": {
                "_target_": "common.evaluation.planes.plane_pairs",
                "_mode_": "callable",
                "planes": "@planes",
            },
        },
    }
    found = evaluate(ConfigParser(config).get_parsed_content("metric"), [[volumes]])
    assert (found["n_xy"], found["n_yz"], found["n_xz"]) == (8, 7, 6)


# -------------------------------------------------------------------------------------------------------- reference


def test_a_reference_spares_the_real_slices_and_changes_nothing(tmp_path, caplog):
    path = tmp_path / "references" / "real.pt"
    first = FeatureDistances(Pooled(), reference=path, **SETTINGS)
    found = evaluate(first)
    assert path.is_file() and first.extractor.seen == 66
    second = FeatureDistances(Pooled(), reference=path, **SETTINGS)
    assert evaluate(second, CASES[::-1]) == pytest.approx(found, rel=1e-12)
    assert second.extractor.seen == 33
    assert "other slices" not in caplog.text
    assert torch.load(path, weights_only=True)["facts"]["features"] == first.settings["features"]


def test_a_reference_of_other_slices_is_refused(tmp_path):
    evaluate(FeatureDistances(Pooled(), reference=tmp_path / "real.pt", **SETTINGS))
    with pytest.raises(ValueError, match=r"real\.pt is of other real slices than this run's: delete it"):
        evaluate(FeatureDistances(Pooled(), reference=tmp_path / "real.pt", **SETTINGS), [CASES[0], CASES[3]])


def test_a_reference_that_does_not_fit_is_refused_at_once(tmp_path):
    path = tmp_path / "real.pt"
    evaluate(FeatureDistances(Pooled(), reference=path))
    pair_of_planes = {"planes": ["xy", "yz"]}
    for extractor, options in ((Pooled(seed=1), {}), (Pooled(), pair_of_planes), (Pooled(), {"subsets": 0})):
        with pytest.raises(ValueError, match=rf"^{path} holds .*, not .*: delete it or name another reference$"):
            FeatureDistances(extractor, reference=path, **options)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="damaged"):
        FeatureDistances(Pooled(), reference=path)


# --------------------------------------------------------------------------------------------------- two processes

SHARES = {
    "unequal": ([0, 1, 2], [3, 4]),
    "one has none": ([0, 1, 2, 3, 4], []),
    "one has empty cases": ([2], [0, 1, 3, 4]),
}


def of_one_process(rank: int, folder: Path, shares: tuple[list[int], list[int]]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    metric = FeatureDistances(Pooled(), reference=folder / "real.pt", **SETTINGS)
    without_kid = FeatureDistances(Pooled(), subsets=0)
    for case in shares[rank]:
        metric.update(CASES[case])
        without_kid.update(CASES[case])
    assert without_kid.compute()["FID"] == pytest.approx(all_at_once()["FID"], rel=1e-6)
    torch.save(metric.compute(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_two_processes_are_one(tmp_path, caplog, shares):
    torch.multiprocessing.start_processes(of_one_process, (tmp_path, shares), nprocs=2, start_method="fork")
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(all_at_once(), rel=1e-6)
    alone = FeatureDistances(Pooled(), reference=tmp_path / "real.pt", **SETTINGS)
    assert evaluate(alone) == pytest.approx(all_at_once(), rel=1e-6)
    assert alone.extractor.seen == 33  # what two processes wrote serves one
    assert "other slices" not in caplog.text


# ---------------------------------------------------------------------------------------------------------- MS-SSIM


def similarity(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean SSIM and mean contrast-structure term of each slice, window by window."""
    place = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(place**2) / (2 * 1.5**2))
    window = (window[:, None] * window).flatten()
    window /= window.sum()
    u, v = (F.unfold(w.double(), 11) for w in (x, y))  # (N, 121, windows)
    mean_u, mean_v = ((w * window[:, None]).sum(dim=1, keepdim=True) for w in (u, v))
    du, dv = u - mean_u, v - mean_v
    var_u, var_v, cov = ((a * b * window[:, None]).sum(dim=1) for a, b in ((du, du), (dv, dv), (du, dv)))
    structure = (2 * cov + 0.03**2) / (var_u + var_v + 0.03**2)
    mean_u, mean_v = mean_u[:, 0], mean_v[:, 0]
    luminance = (2 * mean_u * mean_v + 0.01**2) / (mean_u**2 + mean_v**2 + 0.01**2)
    return (luminance * structure).mean(dim=1), structure.mean(dim=1)


def noisy_pairs(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(*(torch.arange(side) / side,) * 2, indexing="ij")
    real = torch.stack([0.5 + 0.4 * torch.sin(9 * x * k) * torch.cos(7 * y) for k in (1, 2, 3)])[:, None]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    return (real + noise * torch.tensor([0.02, 0.1, 0.3]).view(3, 1, 1, 1)).clamp(0, 1), real


@pytest.mark.parametrize(("side", "scales"), [(176, 5), (99, 4), (44, 3), (22, 2), (32, 2)])
def test_ms_ssim_is_the_product_over_the_scales(side, scales):
    """Wang, Simoncelli & Bovik 2003: contrast and structure at every scale, luminance at the coarsest."""
    pred, real = noisy_pairs(side)
    published = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333], dtype=torch.float64)
    weights = published[:scales] / published[:scales].sum()
    value, x, y = torch.ones(3, dtype=torch.float64), pred, real
    for scale in range(scales):
        ssim, structure = similarity(x, y)
        value *= (ssim if scale == scales - 1 else structure) ** weights[scale]
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    found = MultiScaleSSIM(image_size=side, scales=scales)(pred, real).flatten()
    torch.testing.assert_close(found.double(), value, rtol=1e-4, atol=1e-5)
    assert value[0] > 0.9 > 0.8 > value[2]


def test_ms_ssim_of_one_scale_is_ssim():
    pred, real = noisy_pairs(24)
    ssim = SSIMMetric(spatial_dims=2, data_range=1.0)(pred, real)
    torch.testing.assert_close(MultiScaleSSIM(image_size=24, scales=1)(pred, real), ssim)


@pytest.mark.parametrize(
    ("side", "scales", "remedy"),
    [
        (175, 5, "choose 1 to 4 scales"),
        (98, 4, "choose 1 to 3 scales"),
        (64, 5, "choose 1 to 3 scales"),
        (256, 6, "choose 1 to 5"),
        (10, 1, "leave it out"),
    ],
)
def test_sizes_that_ms_ssim_cannot_take_are_refused_with_the_remedy(side, scales, remedy):
    with pytest.raises(ValueError, match=rf"{scales} scales doesn't fit slices of {side} pixels a side: {remedy}"):
        MultiScaleSSIM(image_size=side, scales=scales)
