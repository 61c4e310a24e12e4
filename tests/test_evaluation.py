"""The evaluation overlay on a real bundle: its figures are those of the files, and a run may stop, go on and be shared.

The network has random weights. Classes here are named in configs, by the runs in this process and under torchrun.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from common.bundle import load_weights, save_weights
from common.evaluation.fid import frechet_distance
from common.labels import ORGANS
from common.networks.unet import GuidedUNet
from common.phantom import phantom, write_dataset
from common.transforms import window

CASES = ("amos_0001", "amos_0002", "amos_0003")
SLICES = 4
STEPS = 4
HERE = Path(__file__).absolute()
NAMES = [c.name for c in ORGANS[:14]]


class Features(nn.Sequential):
    """In place of the Inception: means over 2x3 regions."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten())


BANDS = (6, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 7)
"""The organs of ranges of 30 HU from -160 on. A network with random weights makes mostly the first and the last."""


class Bands:
    """A segmenter that takes every range of 30 HU for an organ."""

    settings = {"segmenter": "bands"}  # noqa: RUF012
    asked = 0

    def __call__(self, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        Bands.asked += 1
        return np.array(BANDS, np.uint8)[(hu.astype(int) + 160) // 30]


class Ids:
    """A segmenter of CTs whose HU are the ids themselves."""

    settings = {"segmenter": "ids"}  # noqa: RUF012

    def __call__(self, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        return hu.astype(np.uint8)


class Calls:
    """Calls of networks that `watched` gives."""

    made = 0


def watched(network: nn.Module, path: str, fail_at: int = -1) -> nn.Module:
    """The network with its weights, counting its calls; the call of number `fail_at` breaks."""

    def count(*_) -> None:
        Calls.made += 1
        if Calls.made == fail_at:
            raise RuntimeError("out of memory")

    Calls.made = 0
    network.register_forward_hook(count)
    return load_weights(network, path)


def watch(fail_at: int = -1) -> dict:
    return {"_target_": "test_evaluation.watched", "network": "@network_def", "path": "@checkpoint", "fail_at": fail_at}


FID = {"fid": True, "inception": {"_target_": "test_evaluation.Features"}}
ALL_PLANES = {**FID, "planes": ["xy", "yz", "xz"]}
DICE = {"dice": True, "segmenter#segmenter": {"_target_": "test_evaluation.Bands"}}
EVERYTHING = ALL_PLANES | DICE


# ------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def bundle(bundles) -> Path:
    return bundles["abdominal_ct_mask_guided_ddpm"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Three CTs of 32x32x4, so that the network's grid is theirs, with the body in their masks."""
    folder = tmp_path_factory.mktemp("amos22")
    write_dataset(folder, train=0, validation=len(CASES), shape=(32, 32, SLICES))
    return folder


@pytest.fixture(scope="module")
def weights(bundle, tiny_inference, tmp_path_factory):
    """`weights(seed)`: a file of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    options = {k.partition("#")[2]: v for k, v in tiny_inference(bundle).items() if k.startswith("network_def#")}

    def make(seed: int) -> Path:
        path = folder / f"{seed}.pt"
        if not path.exists():
            generator = torch.Generator().manual_seed(seed)
            state = GuidedUNet(guide="mask", **options).state_dict()
            random = {name: 0.1 * torch.randn(v.shape, generator=generator) for name, v in state.items()}
            save_weights(path, random, {"bundle": bundle.name, "iteration": 7, "image_size": 32})
        return path

    return make


@pytest.fixture(scope="module")
def options(bundle, dataset, weights, tiny_inference) -> dict:
    return tiny_inference(bundle) | {"sampling_steps": STEPS, "dataset_dir": dataset, "checkpoint": weights(0)}


@pytest.fixture(scope="module")
def evaluate(bundle, options, run_bundle):
    """`evaluate(output, **overrides)`: what metrics.json says of a run in this process."""

    def run(output: Path, **overrides) -> dict:
        run_bundle(bundle, "inference", "evaluate", run_id="evaluating", output_dir=output, **options | overrides)
        return content(output)

    return run


@pytest.fixture(scope="module")
def sampled(evaluate, tmp_path_factory) -> Path:
    """A run that samples, with every measure."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    evaluate(folder, **EVERYTHING)
    return folder


@pytest.fixture(scope="module")
def measured(evaluate, sampled, tmp_path_factory) -> Path:
    """The same measures of the files that `sampled` left; there are no weights."""
    folder = tmp_path_factory.mktemp("measured")
    evaluate(folder / "run", predictions_dir=sampled, checkpoint=folder / "model.pt", **EVERYTHING)
    return folder / "run"


def content(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def metrics(output: Path) -> dict[str, float]:
    return content(output)["metrics"]


def report(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def dice_table(output: Path) -> list[dict[str, str]]:
    with open(output / "organ_dice.csv", newline="") as file:
        return list(csv.DictReader(file))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def label_of(dataset: Path, case: str) -> np.ndarray:
    return voxels(dataset / "labelsVa" / f"{case}.nii.gz")


def save(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, affine), path)


# -------------------------------------------------------------------------------------------- figures of the files


def slices_of(volume: np.ndarray, plane: str) -> list[np.ndarray]:
    """Slices of a phantom (right, front, up) as they are looked at: rows to the back or the left, columns to the left
    or up."""
    rows, columns, depth = (seen := volume[::-1, ::-1].transpose(1, 0, 2)).shape
    return {
        "xy": [seen[:, :, k] for k in range(depth)],
        "yz": [seen[:, k, :] for k in range(columns)],
        "xz": [seen[k, :, :] for k in range(rows)],
    }[plane]


def features(volumes: list[np.ndarray], masks: list[np.ndarray], plane: str) -> torch.Tensor:
    """Means over 2x3 regions of all slices with a body, from HU."""
    found = []
    for volume, mask in zip(volumes, masks, strict=True):
        for picture, labels in zip(slices_of(window(volume), plane), slices_of(mask, plane), strict=True):
            if labels.any():
                pooled = nn.functional.adaptive_avg_pool2d(torch.from_numpy(picture.copy())[None], (2, 3))
                found.append(pooled.flatten().double())
    return torch.stack(found)


def fid_of(synthetic: torch.Tensor, real: torch.Tensor) -> float:
    return frechet_distance(*(moment for v in (synthetic, real) for moment in (v.mean(dim=0), torch.cov(v.T))))


@pytest.mark.parametrize("plane", ["xy", "yz", "xz"])
def test_fid_is_that_of_the_files(dataset, sampled, measured, plane):
    masks = [label_of(dataset, case) for case in CASES]
    real = features([voxels(dataset / "imagesVa" / f"{case}.nii.gz") for case in CASES], masks, plane)
    synthetic = features([voxels(sampled / f"{case}_ct.nii.gz") for case in CASES], masks, plane)
    found, near = metrics(measured), metrics(sampled)
    assert found[f"n_{plane}"] == found[f"n_real_{plane}"] == len(real)
    assert len(real) == 3 * SLICES if plane == "xy" else len(real) < 3 * 32
    expected = fid_of(synthetic, real)
    assert expected > 0.01 and found[f"FID_{plane}"] == pytest.approx(expected, rel=1e-4)
    assert near[f"FID_{plane}"] == pytest.approx(expected, rel=1e-2)  # before the rounding to HU


@pytest.mark.parametrize("name", ["FID", "KID"])
def test_distances_over_planes_are_their_mean(measured, name):
    found = metrics(measured)
    planes = [found[f"{name}_{plane}"] for plane in ("xy", "yz", "xz")]
    assert found[name] == pytest.approx(sum(planes) / 3) and len(set(planes)) == 3
    assert "n" not in found


def test_fid_of_axial_slices_alone(dataset, sampled, measured, evaluate, tmp_path):
    found = evaluate(tmp_path / "run", predictions_dir=sampled, **FID)["metrics"]
    of_planes = metrics(measured)
    for name in ("FID", "KID", "n", "n_real"):
        assert found[name] == pytest.approx(of_planes[f"{name}_xy"])
    assert set(found) == {"SSIM", "PSNR", "FID", "KID", "n", "n_real"}


def expected_dice(label: np.ndarray, hu: np.ndarray) -> dict[str, float]:
    """2 |A and B| / (|A| + |B|) of `Bands`, for the organs that are there."""
    dice = {}
    for organ in ORGANS[:14]:
        lowest = 30 * BANDS.index(organ.id) - 160
        ours, theirs = label == organ.id, (hu >= lowest) & (hu < lowest + 30)
        if ours.any():
            dice[organ.name] = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
    return dice


def test_dice_is_that_of_the_stored_voxels(dataset, sampled, measured):
    by_case = {c: expected_dice(label_of(dataset, c), voxels(sampled / f"{c}_ct.nii.gz")) for c in CASES}
    for output in (sampled, measured):
        for row, (case, dice) in zip(dice_table(output), by_case.items(), strict=True):
            assert row == {"case": case} | {name: f"{dice[name]:.4f}" if name in dice else "" for name in NAMES}
        found = {name: value for name, value in metrics(output).items() if name.startswith("dice_")}
        having = {name: [dice[name] for dice in by_case.values() if name in dice] for name in NAMES}
        means = {name: np.mean(values) for name, values in having.items() if values}
        of_organs = {f"dice_{name.replace(' ', '_')}": value for name, value in means.items()}
        assert found == pytest.approx(of_organs | {"dice_mean": np.mean(list(means.values()))})
        assert min(found["dice_liver"], found["dice_stomach"]) > 0.01


def test_a_segmenter_that_is_always_right_gives_dice_1(dataset, evaluate, tmp_path):
    for case in CASES:
        label = nib.load(dataset / "labelsVa" / f"{case}.nii.gz")
        save(tmp_path / "made" / f"{case}_ct.nii.gz", label_of(dataset, case).astype(np.int16), label.affine)
    right = DICE | {"segmenter#segmenter": {"_target_": "test_evaluation.Ids"}}
    found = evaluate(tmp_path / "run", predictions_dir=tmp_path / "made", **right)["metrics"]
    present = {i for case in CASES for i in np.unique(label_of(dataset, case))}
    expected = {f"dice_{c.name.replace(' ', '_')}": 1.0 for c in ORGANS[:14] if c.id in present} | {"dice_mean": 1.0}
    assert {name: value for name, value in found.items() if name.startswith("dice_")} == expected
    assert len(expected) > 10


# ------------------------------------------------------------------------------------------- volumes made earlier


def test_volumes_made_earlier_need_no_weights_and_stay_what_they_are(bundle, options, sampled, measured):
    assert not Path(measured.parent / "model.pt").exists()
    for case in CASES:
        first, second = (nib.load(folder / f"{case}_ct.nii.gz") for folder in (sampled, measured))
        np.testing.assert_array_equal(np.asanyarray(second.dataobj), np.asanyarray(first.dataobj))
        np.testing.assert_array_equal(second.affine, first.affine)
    found = report(measured)
    assert found["weights"] is None and found["settings"] is None
    assert [case["hu"] for case in found["cases"]] == [case["hu"] for case in report(sampled)["cases"]]
    assert report(sampled)["weights"]["iteration"] == 7 and report(sampled)["settings"]["sampling_steps"] == STEPS


def test_volumes_made_earlier_measure_as_when_they_were_made(sampled, measured):
    """Up to the rounding to HU, half a 400th of the window."""
    first, second = content(sampled), content(measured)
    assert first["metrics"].keys() == second["metrics"].keys() and first != second
    for of_sampled, of_files in zip(first["cases"], second["cases"], strict=True):
        assert (of_files["case"], of_files["slices"]) == (of_sampled["case"], of_sampled["slices"])
        assert of_files["SSIM"] == pytest.approx(of_sampled["SSIM"], abs=1e-3)
        assert of_files["PSNR"] == pytest.approx(of_sampled["PSNR"], abs=1e-2)


def test_there_is_no_network_for_volumes_made_earlier(bundle, options, sampled, workflow, on_path, tmp_path):
    without = options | {"checkpoint": tmp_path / "none.pt", "predictions_dir": sampled, "output_dir": tmp_path}
    with on_path(bundle):
        made = workflow(bundle, "inference", "evaluate", **without)
        evaluator = made.parser.get_parsed_content("evaluator")
    assert evaluator.network is None and evaluator.inferer.inferer is None


def copies(dataset: Path, folder: Path) -> Path:
    """The real CTs as if they were synthetic."""
    folder.mkdir()
    for path in (dataset / "imagesVa").iterdir():
        shutil.copy(path, folder / f"{path.name.removesuffix('.nii.gz')}_ct.nii.gz")
    return folder


def test_the_real_cts_are_perfect(dataset, evaluate, tmp_path):
    """176 pixels are the fewest that have MS-SSIM."""
    made = copies(dataset, tmp_path / "made")
    found = evaluate(tmp_path / "run", predictions_dir=made, image_size=176, **ALL_PLANES)
    assert found["metrics"]["PSNR"] == 100
    assert found["metrics"]["SSIM"] == pytest.approx(1, abs=1e-6)
    assert found["metrics"]["MS-SSIM"] == pytest.approx(1, abs=1e-6)
    for name in ("FID", "FID_xy", "FID_yz", "FID_xz"):
        assert found["metrics"][name] == pytest.approx(0, abs=1e-9)
    assert [case["case"] for case in found["cases"]] == list(CASES)
    for case in found["cases"]:
        assert {"slices": SLICES, "PSNR": 100.0}.items() <= case.items()
        np.testing.assert_array_equal(
            voxels(tmp_path / "run" / f"{case['case']}_ct.nii.gz"), voxels(made / f"{case['case']}_ct.nii.gz")
        )


@pytest.mark.parametrize(("image_size", "there"), [(175, False), (176, True), (256, True)])
def test_ms_ssim_is_there_for_slices_that_are_large_enough(
    bundle, options, sampled, workflow, on_path, tmp_path, image_size, there
):
    with on_path(bundle):
        sized = options | {"image_size": image_size, "predictions_dir": sampled, "output_dir": tmp_path}
        made = workflow(bundle, "inference", "evaluate", **sized)
        assert made.parser.get_parsed_content("additional_metrics").keys() == {"PSNR"} | (
            {"MS-SSIM"} if there else set()
        )


# ------------------------------------------------------------------------------------------- errors before any work


def without_a_case(folder: Path) -> None:
    (folder / f"{CASES[1]}_ct.nii.gz").unlink()


def with_thicker_slices(folder: Path) -> None:
    ct = nib.load(path := folder / f"{CASES[2]}_ct.nii.gz")
    save(path, voxels(path).copy(), ct.affine @ np.diag((1, 1, 2, 1)))


def with_fewer_slices(folder: Path) -> None:
    ct = nib.load(path := folder / f"{CASES[2]}_ct.nii.gz")
    save(path, voxels(path)[..., 1:].copy(), ct.affine)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_a_case, f"/made lacks {CASES[1]}_ct.nii.gz: make them with configs/inference.yaml"),
        (with_thicker_slices, f"/made/{CASES[2]}_ct.nii.gz has shape (32, 32, {SLICES}) and affine"),
        (with_fewer_slices, f"/made/{CASES[2]}_ct.nii.gz has shape (32, 32, {SLICES - 1}) and affine"),
    ],
)
def test_volumes_that_do_not_fit_are_named_before_any_work(dataset, evaluate, error_line, tmp_path, spoil, said):
    spoil(copies(dataset, tmp_path / "made"))
    with error_line() as lines:
        evaluate(tmp_path / "run", predictions_dir=tmp_path / "made")
    assert said in lines[0] and ("not on the same grid: " in lines[0]) == (spoil is not without_a_case)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"checkpoint": "/nowhere/model.pt"}, "no weights at /nowhere/model.pt: train them"),
        ({"fid": True, "inception_weights": "/nowhere/fid.pth"}, "no Inception weights at /nowhere/fid.pth: "),
        (FID | {"planes": ["xy", "axial"]}, "no plane axial: choose from xy, yz, xz"),
    ],
)
def test_what_is_missing_is_said_before_any_work(evaluate, error_line, tmp_path, overrides, said):
    with error_line() as lines:
        evaluate(tmp_path / "run", **overrides)
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- going on


def test_a_run_that_was_stopped_goes_on(evaluate, sampled, tmp_path):
    with pytest.raises(RuntimeError):
        evaluate(tmp_path, network=watch(fail_at=STEPS + 1), **EVERYTHING)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{CASES[0]}_{what}" for what in ("ct.nii.gz", "preview.png")),
        *("report.json", "organ_dice.csv", "kept"),
    }
    assert [case["case"] for case in report(tmp_path)["cases"]] == [CASES[0]]
    assert dice_table(tmp_path) == dice_table(sampled)[:1]

    asked = Bands.asked
    evaluate(tmp_path, network=watch(), **EVERYTHING)
    assert Calls.made == 2 * STEPS and Bands.asked == asked + 2  # nothing for the first case
    for name in ("metrics.json", "metrics.csv", "metrics.md", "organ_dice.csv"):
        assert (tmp_path / name).read_bytes() == (sampled / name).read_bytes()
    for case in CASES:
        np.testing.assert_array_equal(*(voxels(folder / f"{case}_ct.nii.gz") for folder in (tmp_path, sampled)))
    assert [case["case"] for case in report(tmp_path)["cases"]] == list(CASES)


def test_what_another_run_sampled_is_never_taken_for_this_ones(evaluate, weights, sampled, tmp_path):
    shutil.copytree(sampled / "kept", tmp_path / "kept")
    origins = {
        "seed": {"seed": 1},
        "weights": {"checkpoint": weights(1)},
        "sampler": {"sampler": "ddim"},
        "heads": {"network_def#num_head_channels": 8},  # the weights have the same shapes
    }
    of_origins = {"first": metrics(sampled)}
    for name, changed in origins.items():
        of_origins[name] = evaluate(tmp_path, network=watch(), **changed)["metrics"]
        assert Calls.made == len(CASES) * STEPS
    assert len({found["PSNR"] for found in of_origins.values()}) == 5
    alone = evaluate(tmp_path / "alone", seed=1)["metrics"]
    assert alone == of_origins["seed"]

    again = evaluate(tmp_path, network=watch())["metrics"]
    assert Calls.made == 0
    assert again == {name: of_origins["first"][name] for name in ("SSIM", "PSNR")}


# ---------------------------------------------------------------------------------------------- several processes


def test_two_processes_do_the_work_of_one(bundle, options, sampled, tmp_path):
    configs = [str(bundle / "configs" / f"{name}.yaml") for name in ("inference", "evaluate", "multi_gpu_inference")]
    arguments = options | EVERYTHING | {"config_file": configs, "output_dir": tmp_path / "run"}
    tell = "$print('calls', __import__('test_evaluation').Calls.made)"
    arguments |= {"network": watch(), "finalize": [tell, "$dist.destroy_process_group()"]}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments, default=str))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "monai.bundle", "run", "evaluating", "--args_file", str(tmp_path / "arguments.json")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    calls = [line for line in done.stdout.splitlines() if line.startswith("calls")]
    assert sorted(calls) == [f"calls {STEPS}", f"calls {2 * STEPS}"]  # no case twice

    output = tmp_path / "run"
    assert {path.name for path in output.iterdir()} == {path.name for path in sampled.iterdir()}
    assert {path.name for path in (output / "kept").iterdir()} == {path.name for path in (sampled / "kept").iterdir()}
    one, two = content(sampled), content(output)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert two["cases"] == one["cases"]
    for name in ("organ_dice.csv", "metrics.csv"):
        assert (output / name).read_text() == (sampled / name).read_text()
    for case in CASES:
        np.testing.assert_array_equal(*(voxels(folder / f"{case}_ct.nii.gz") for folder in (output, sampled)))
    whole, shared = report(sampled), report(output)
    for part in ("weights", "settings", "versions", "hu_bins"):
        assert shared[part] == whole[part]
    assert [c | {"seconds": 0} for c in shared["cases"]] == [c | {"seconds": 0} for c in whole["cases"]]


def of_one_process(rank: int, run, output: Path, port: int) -> None:
    """What torchrun does, without the seconds of two imports; the error that the user reads goes into a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        run(output)
    except Exception as error:
        with open(output.with_name(f"{rank}.txt"), "w") as sys.stderr:
            sys.excepthook(type(error), error, error.__traceback__)


def test_more_processes_than_cases_are_refused(bundle, options, run_bundle, dataset, tmp_path):
    for suffix in ("images", "labels"):
        (tmp_path / suffix).mkdir()
        shutil.copy(dataset / f"{suffix}Va" / f"{CASES[0]}.nii.gz", tmp_path / suffix)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(output: Path) -> None:
        configs = ("inference", "evaluate", "multi_gpu_inference")
        run_bundle(bundle, *configs, output_dir=output, **options | {"dataset_dir": tmp_path})

    torch.multiprocessing.start_processes(of_one_process, (run, tmp_path / "run", port), 2, start_method="fork")
    for rank in (0, 1):
        said = "error: 2 processes for 1 cases: start at most as many (--nproc_per_node)\n"
        assert (tmp_path / f"{rank}.txt").read_text() == said
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- single slices, absences


@pytest.fixture
def flat(tmp_path) -> Path:
    """A data set of single slices: real CTs of one value, and what was made of them, of one value too."""
    label = phantom((32, 32, 3)).label[..., 1:2]  # through the liver
    liver_only = np.where((label == 0) | (label == 6), label, 16).astype(np.uint8)
    no_organ = np.where(label == 0, 0, 16).astype(np.uint8)
    cases = {  # label map, real HU, synthetic HU
        "equal": (label, 40, 40),
        "near": (liver_only, 40, 80),
        "organless": (no_organ, 240, -160),
    }
    for name, (mask, real, made) in cases.items():
        for folder, volume in (("labels", mask), ("images", real), ("made", made)):
            volume = np.full(label.shape, volume, np.int16) if folder != "labels" else volume
            file = f"{name}_ct.nii.gz" if folder == "made" else f"{name}.nii.gz"
            save(tmp_path / folder / file, volume, np.diag((11.0, 11.0, 5.0, 1.0)))
    return tmp_path


def luminance(a: float, b: float) -> float:
    """SSIM of two slices of one value each."""
    return (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)


def test_single_slices_of_one_value_and_absent_organs_have_figures(flat, evaluate):
    found = evaluate(flat / "run", dataset_dir=flat, predictions_dir=flat / "made", **EVERYTHING)
    expected = {"equal": (1, 100), "near": (luminance(0.5, 0.6), 20), "organless": (luminance(1, 0), 0)}
    for case in found["cases"]:
        assert case["slices"] == 1
        ssim, psnr = expected[case["case"]]
        assert case["SSIM"] == pytest.approx(ssim, abs=1e-3)  # float32 sees a little variance
        assert case["PSNR"] == pytest.approx(psnr, abs=1e-4)
    assert found["metrics"]["PSNR"] == pytest.approx(40, abs=1e-4)
    assert found["metrics"]["n_xy"] == 3 and math.isfinite(found["metrics"]["FID_xy"])

    rows = {row.pop("case"): row for row in dice_table(flat / "run")}
    labels = voxels(flat / "labels" / "equal.nii.gz")
    found_everywhere = BANDS[(40 + 160) // 30]
    dice = 2 * (labels == found_everywhere).sum() / ((labels == found_everywhere).sum() + labels.size)
    assert dice > 0
    assert found["metrics"].keys() >= {"dice_liver", "dice_mean"}
    for organ in ORGANS[:14]:
        if not (labels == organ.id).any():
            assert {row[organ.name] for row in rows.values()} == {""}
            assert f"dice_{organ.name.replace(' ', '_')}" not in found["metrics"]
        else:
            assert rows["equal"][organ.name] == f"{dice if organ.id == found_everywhere else 0:.4f}"
    assert {name: value for name, value in rows["near"].items() if value} == {"liver": "0.0000"}
    assert set(rows["organless"].values()) == {""}


def test_a_single_slice_alone_has_everything_but_distances(flat, evaluate):
    for folder in ("images", "labels"):
        for name in ("near", "organless"):
            (flat / folder / f"{name}.nii.gz").unlink()
    found = evaluate(flat / "run", dataset_dir=flat, predictions_dir=flat / "made", **FID)["metrics"]
    assert found["FID"] is found["KID"] is None and found["n"] == found["n_real"] == 1
    assert found["PSNR"] == 100 and found["SSIM"] == pytest.approx(1, abs=1e-6)
    assert "nan" not in (flat / "run" / "report.html").read_text().lower()


def test_a_single_slice_is_sampled_and_measured(flat, evaluate):
    found = evaluate(flat / "run", dataset_dir=flat)
    assert [(case["case"], case["slices"]) for case in found["cases"]] == [
        ("equal", 1),
        ("near", 1),
        ("organless", 1),
    ]
    for case in found["cases"]:
        made = window(voxels(flat / "run" / f"{case['case']}_ct.nii.gz"))
        real = window(voxels(flat / "images" / f"{case['case']}.nii.gz"))
        assert case["PSNR"] == pytest.approx(-10 * math.log10(np.square(made - real).mean()), abs=1e-2)
