"""Every bundle: what MONAI asks of it, and a tiny run of all it can do, from phantoms to measured CTs."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from skimage.metrics import structural_similarity
from test_convert import ImprovedDiffusionUNet
from tiny_networks import randomised

from common.labels import BODY
from common.networks.convert import convert
from common.networks.unet import ConditionalUNet
from common.phantom import phantom
from common.transforms import window

OVERLAYS = ("evaluate.yaml", "multi_gpu_train.yaml", "multi_gpu_inference.yaml", "logging.conf")
NAMES = {
    *(f"abdominal_ct_{kind}_ddpm" for kind in ("conditional", "mask_guided", "edge_guided")),
    *(f"abdominal_ct_{kind}" for kind in ("sdm", "spade", "oasis", "pix2pix")),
}
GANS = {"abdominal_ct_spade", "abdominal_ct_oasis", "abdominal_ct_pix2pix"}
LONGEST = {"train": 90, "inference": 60}
EVERYWHERE = {"dataset_dir", "output_dir", "checkpoint", "device", "image_size", "batch_size", "amp", "seed"}
KNOBS = {
    "train": EVERYWHERE
    | {"cache_dir", "iterations", "learning_rate", "accumulation_steps", "compile", "num_workers", "resume"}
    | {"log_interval", "picture_interval", "save_interval"},
    "inference": EVERYWHERE | {"noise_correlation", "missing_body", "air_outside_body"},
}
COMMON = Path(__file__).absolute().parents[1] / "common"


def reoriented(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """The same volume with other axes: an exact permutation."""
    wanted = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))


def save_label(path: Path, image: nib.Nifti1Image) -> None:
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=4)
    path.parent.mkdir(exist_ok=True)
    nib.save(image, path)


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """One oblique, non-square label map of few slices, stored with two orders of its axes."""
    folder = tmp_path_factory.mktemp("masks")
    made = phantom((28, 22, 5), seed=3, oblique=True)
    for codes in ("LPI", "SAR"):
        save_label(folder / f"{codes}.nii.gz", reoriented(nib.Nifti1Image(made.label, made.affine), codes))
    return folder


@pytest.fixture(scope="module")
def single(masks, tmp_path_factory) -> Path:
    """A folder with the first of `masks` alone."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copy(masks / "LPI.nii.gz", folder)
    return folder


@pytest.fixture(scope="module")
def bodiless(masks, tmp_path_factory) -> Path:
    """The same without its body class."""
    folder = tmp_path_factory.mktemp("bodiless")
    label = nib.load(masks / "LPI.nii.gz")
    organs = voxels(masks / "LPI.nii.gz").copy()
    organs[organs == BODY] = 0
    save_label(folder / "LPI.nii.gz", nib.Nifti1Image(organs, label.affine))
    return folder


@pytest.fixture
def infer(bundle, trained, run_bundle, tiny_inference, tmp_path):
    """`infer(masks, **overrides)`: the folder of one inference run."""
    runs = 0

    def run(dataset_dir: Path, *overlays: str, **overrides) -> Path:
        nonlocal runs
        runs += 1
        output = tmp_path / f"run{runs}"
        options = tiny_inference(bundle) | {"checkpoint": trained / "model.pt", "dataset_dir": dataset_dir} | overrides
        run_bundle(bundle, "inference", *overlays, output_dir=output, **options)
        return output

    return run


def config(bundle: Path, name: str) -> dict:
    return yaml.safe_load((bundle / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))


def test_there_are_seven_bundles(bundles):
    assert set(bundles) == NAMES


@pytest.mark.parametrize("name", LONGEST)
def test_configs_are_short(bundle, name):
    assert len((bundle / "configs" / f"{name}.yaml").read_text().splitlines()) <= LONGEST[name]


@pytest.mark.parametrize("kind", ["train", "inference"])
def test_properties_are_complete(
    bundle, kind, workflow, on_path, amos, trained, masks, tiny_training, tiny_inference, tmp_path
):
    if kind == "train":
        options = tiny_training(bundle) | {"dataset_dir": amos, "cache_dir": amos / "cache"}
    else:
        options = tiny_inference(bundle) | {"dataset_dir": masks, "checkpoint": trained / "model.pt"}
    with on_path(bundle):
        made = workflow(bundle, kind, output_dir=tmp_path, **options)
        assert made.check_properties() == []
        assert made.bundle_root == str(bundle)


def test_metadata_is_json(bundle):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert {"version", "monai_version", "pytorch_version", "numpy_version"} <= metadata.keys()


def test_what_bundles_share_is_linked_to_one_place(bundle):
    assert (bundle / "scripts").resolve() == COMMON
    # The networks of a GAN have sizes of their own, the denoisers share theirs.
    for name in OVERLAYS if bundle.name in GANS else (*OVERLAYS, "small.yaml"):
        assert (bundle / "configs" / name).resolve() == COMMON / "configs" / name
    for link in (path for path in (bundle, bundle / "configs") for path in path.iterdir() if path.is_symlink()):
        assert not os.path.isabs(os.readlink(link)), f"{link} breaks in a clone"


def test_all_bundles_read_and_write_the_same(bundle, bundles):
    first = next(iter(bundles.values()))
    for name, sections in (
        (
            "inference",
            ("cases", "dataset", "dataloader", "preprocessing", "postprocessing", "inferer", "handlers", "evaluator"),
        ),
        ("train", ("bundle_root", "dataset_dir", "cache_dir", "output_dir", "network", "initialize", "run")),
    ):
        ours, theirs = config(bundle, name), config(first, name)
        assert {s: ours[s] for s in sections} == {s: theirs[s] for s in sections}
    ours, theirs = (config(path, "train")["train"] for path in (bundle, first))
    for section in ("cases", "volumes", "dataset", "sampler", "dataloader", "inferer"):
        assert ours[section] == theirs[section]
    assert ours["handlers"][-1] == theirs["handlers"][-1]  # the monitor


def test_all_bundles_say_the_same_of_what_they_read_and_write(bundle, bundles):
    first = next(iter(bundles.values()))
    ours, theirs = (json.loads((path / "configs" / "metadata.json").read_text()) for path in (bundle, first))
    sections = ("network_data_format", "image_classes", "label_classes", "pred_classes", "required_packages_version")
    assert {s: ours[s] for s in sections} == {s: theirs[s] for s in sections}


def test_the_small_overlay_fits_training_and_inference(bundle, workflow, on_path):
    with on_path(bundle):
        small, as_small = (
            workflow(bundle, name, "small").parser.get_parsed_content("network_def").state_dict()
            for name in ("train", "inference")
        )
    assert {name: value.shape for name, value in small.items()} == {k: v.shape for k, v in as_small.items()}
    assert sum(value.numel() for value in small.values()) < 12e6


def test_the_readme_knows_the_size_of_the_small_networks(bundle, workflow, on_path):
    parts = ("network_def", "discriminator_def") if bundle.name in GANS else ("network_def",)
    with on_path(bundle):
        parser = workflow(bundle, "train", "small").parser
        counts = [sum(p.numel() for p in parser.get_parsed_content(part).parameters()) for part in parts]
    said = re.search(
        r"On a CPU, with (?:a network|networks) of ([\d. and]+) million parameters on slices of 64x64:",
        (bundle / "docs" / "README.md").read_text(encoding="utf-8"),
    )
    assert said[1] == " and ".join(f"{count / 1e6:.1f}" for count in counts)


@pytest.mark.parametrize("name", KNOBS)
def test_what_a_user_sets_has_the_same_name_in_every_bundle(bundle, name):
    assert KNOBS[name] <= config(bundle, name).keys()


@pytest.mark.parametrize("name", ["train", "inference"])
def test_ddpm_bundles_differ_in_their_network_alone(bundles, name):
    ddpm = {key: path for key, path in bundles.items() if key.endswith("_ddpm")}
    texts = {key: (path / "configs" / f"{name}.yaml").read_text().splitlines() for key, path in ddpm.items()}
    lines = {key: [line.replace(key, "NAME") for line in text] for key, text in texts.items()}
    assert all(key in "".join(texts[key]) for key in ddpm if name == "train")  # facts name the bundle itself
    for several in zip(*lines.values(), strict=True):
        assert len(set(several)) == 1 or several[0].startswith(("# ", "network_def:")), several


def test_training_leaves_weights_and_a_checkpoint(bundle, trained, tiny_training):
    content = torch.load(trained / "model.pt", weights_only=True)
    options = tiny_training(bundle)
    facts = {"bundle": bundle.name, "image_size": options["image_size"], "iteration": options["iterations"]}
    assert facts.items() <= content["facts"].items()
    assert torch.load(trained / "checkpoint.pt", weights_only=True)["iteration"] == options["iterations"]
    assert len(list((trained / "tensorboard").iterdir())) == 1
    assert {path.name for path in trained.iterdir()} == {"model.pt", "checkpoint.pt", "tensorboard"}


def test_run_and_training_are_the_same(bundle, trained, run_bundle, amos, tiny_training, tmp_path):
    options = tiny_training(bundle) | {"dataset_dir": amos, "cache_dir": amos / "cache", "output_dir": tmp_path}
    run_bundle(bundle, "train", run_id="run", **options)
    first, second = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (trained, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_inference_keeps_the_geometry_of_any_label_map(masks, infer):
    output = infer(masks, run_id="inference")
    assert {path.name for path in output.iterdir()} == {
        *("report.json", "report.html"),
        *(f"{case}_{what}" for case in ("LPI", "SAR") for what in ("ct.nii.gz", "preview.png")),
    }
    for case in ("LPI", "SAR"):
        label, ct = nib.load(masks / f"{case}.nii.gz"), nib.load(output / f"{case}_ct.nii.gz")
        assert nib.aff2axcodes(label.affine) == tuple(case) and len(set(label.shape)) == 3
        assert ct.get_data_dtype() == np.int16 and ct.shape == label.shape
        np.testing.assert_array_equal(ct.affine, label.affine)
        for form in ("qform", "sform"):
            assert ct.header[f"{form}_code"] == label.header[f"{form}_code"]
            np.testing.assert_array_equal(getattr(ct, f"get_{form}")(), getattr(label, f"get_{form}")())
        hu = np.asanyarray(ct.dataobj)
        assert hu.min() >= -160 and hu.max() <= 240 and hu.std() > 5

    # The order of the axes is no part of the anatomy: both files hold the same patient, and so do both CTs.
    lpi, sar = (nib.load(output / f"{case}_ct.nii.gz") for case in ("LPI", "SAR"))
    np.testing.assert_array_equal(np.asanyarray(reoriented(sar, "LPI").dataobj), np.asanyarray(lpi.dataobj))


def test_same_seed_same_file_and_the_batch_size_is_no_matter(bundle, single, infer):
    first, again, one_by_one, other = (
        infer(single, **options) / "LPI_ct.nii.gz" for options in ({}, {}, {"batch_size": 1}, {"seed": 1})
    )
    assert first.read_bytes() == again.read_bytes()
    assert np.abs(voxels(first).astype(int) - voxels(one_by_one)).max() <= 1
    difference = np.abs(voxels(first).astype(int) - voxels(other)).max()
    assert difference == 0 if bundle.name == "abdominal_ct_spade" else difference > 10  # SPADE has no noise


def test_air_outside_the_body(single, infer):
    plain, airy = (voxels(infer(single, air_outside_body=air) / "LPI_ct.nii.gz") for air in (False, True))
    outside = voxels(single / "LPI.nii.gz") == 0
    assert outside.any() and (airy[outside] == -1000).all()
    np.testing.assert_array_equal(airy[~outside], plain[~outside])


def test_missing_body_is_an_error_that_names_its_remedy(bodiless, infer, tmp_path, error_line):
    with error_line() as lines:
        infer(bodiless)
    assert re.search(r"LPI\.nii\.gz: no body class \(id 16\).* -m \w+\.body .*missing_body.*estimate", lines[0])
    assert not (tmp_path / "run1").exists()


def test_missing_body_can_be_estimated(bodiless, infer):
    output = infer(bodiless, missing_body="estimate", air_outside_body=True)
    organs, inside = voxels(bodiless / "LPI.nii.gz") > 0, voxels(output / "LPI_ct.nii.gz") > -1000
    assert inside[organs].all()
    counts = json.loads((output / "report.json").read_text())["cases"][0]["label_histogram"]
    assert counts["body"] == (inside & ~organs).sum() > organs.sum()


def real_and_synthetic(amos: Path, output: Path, case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Axial slices in [0, 1] of both CTs, from the files: slices of 32x32 are their own network grid."""
    real, synthetic = (window(voxels(p)) for p in (amos / "imagesVa" / f"{case}.nii.gz", output / f"{case}_ct.nii.gz"))
    return [(real[:, :, k], synthetic[:, :, k]) for k in range(real.shape[2])]


def test_evaluation_measures_what_it_wrote(amos, infer):
    output = infer(amos, "evaluate", run_id="evaluating")
    rows = list(csv.DictReader((output / "metrics.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["amos_0003", "amos_0004"]
    every = {"SSIM": [], "PSNR": []}
    for row in rows:
        pairs = real_and_synthetic(amos, output, row["case"])
        assert int(row["slices"]) == len(pairs) == 6
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
        measured = {
            "SSIM": [structural_similarity(*pair, **gaussian) for pair in pairs],
            "PSNR": [-10 * np.log10(np.square(real - synthetic).mean()) for real, synthetic in pairs],
        }
        # The files are rounded to HU, the table's numbers are not.
        assert float(row["SSIM"]) == pytest.approx(np.mean(measured["SSIM"]), abs=1e-3)
        assert float(row["PSNR"]) == pytest.approx(np.mean(measured["PSNR"]), abs=1e-2)
        for name, values in measured.items():
            every[name] += values
    table = [line for line in (output / "metrics.md").read_text().splitlines() if line.startswith("|")]
    header, _, *body = [line.strip("| ").split(" | ") for line in table]
    assert [line[:2] for line in body] == [["amos_0003", "6"], ["amos_0004", "6"], ["**all slices**", "12"]]
    total = dict(zip(header, body[-1], strict=True))
    assert float(total["SSIM"]) == pytest.approx(np.mean(every["SSIM"]), abs=1e-3)
    assert float(total["PSNR"]) == pytest.approx(np.mean(every["PSNR"]), abs=1e-2)


def test_public_weights_warm_start_the_conditional_bundle(bundles, run_bundle, amos, tiny_training, tmp_path):
    """An RGB checkpoint in improved-diffusion's layout goes in by --checkpoint; at a learning rate of 0 it stays."""
    conditional = bundles["abdominal_ct_conditional_ddpm"]
    options = tiny_training(conditional) | {"iterations": 1, "learning_rate": 0.0}
    sizes = {name.removeprefix("network_def#"): value for name, value in options.items() if name.startswith("network_")}
    head_channels = sizes.pop("num_head_channels")
    public = randomised(ImprovedDiffusionUNet(3, 6, **sizes, heads=sizes["channels"][-1] // head_channels)).state_dict()
    torch.save(public, tmp_path / "public.pt")
    run_bundle(
        conditional,
        "train",
        **options,
        dataset_dir=amos,
        cache_dir=amos / "cache",
        output_dir=tmp_path / "out",
        checkpoint=tmp_path / "public.pt",
    )
    network = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["network"]
    expected = convert(public, ConditionalUNet(**sizes, num_head_channels=head_channels))
    assert all(torch.equal(network[name], expected[name]) for name in expected)
