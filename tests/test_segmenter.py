"""Segmenters: TotalSegmentator itself, with tiny weights in its own layout, and a tiny MONAI bundle."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from common.evaluation.correspondence import OrganDice
from common.evaluation.segmenter import (
    TOTALSEGMENTATOR_V1,
    TOTALSEGMENTATOR_V2,
    BundleSegmenter,
    TotalSegmentator,
    relabel,
)
from common.labels import ORGANS
from common.phantom import phantom

NAMES = {
    **{1: "spleen", 2: "kidney_right", 3: "kidney_left", 4: "gallbladder", 5: "esophagus", 6: "liver", 7: "stomach"},
    **{8: "aorta", 9: "inferior_vena_cava", 10: "pancreas", 11: "adrenal_gland_right", 12: "adrenal_gland_left"},
    **{13: "duodenum", 14: "urinary_bladder", 15: "prostate"},
}
"""What TotalSegmentator calls AMOS22's organs."""


def totalsegmentator(module: str):
    """A module of TotalSegmentator's, which is in the extra `evaluation`."""
    return pytest.importorskip(f"totalsegmentator.{module}", reason="needs the extra: pip install -e '.[evaluation]'")


def test_ids_become_amos22s_and_all_others_background():
    segmentation = np.array([[0.0, 3.0, 7.0], [104.0, 5.0, 3.0]])  # as get_fdata() gives them
    assert relabel(segmentation, {3: 9, 104: 14}).tolist() == [[0, 9, 0], [14, 0, 9]]
    assert relabel(np.zeros((2, 2, 1), np.uint8), {3: 9}).dtype == np.uint8
    assert relabel(np.array([300, 2], np.int16), {2: 15}).tolist() == [0, 15]


@pytest.mark.parametrize(("ours", "theirs"), [(TOTALSEGMENTATOR_V2, "total"), (TOTALSEGMENTATOR_V1, "total_v1")])
def test_each_id_is_the_organ_of_that_name(ours, theirs):
    names = totalsegmentator("map_to_binary").class_map[theirs]
    assert {organ: names[i] for i, organ in ours.items()} == {i: NAMES[i] for i in ours.values()}
    assert sorted(ours.values()) == list(range(1, 16 if theirs == "total" else 15))


# ------------------------------------------------------------------------------------------- what may be missing


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "totalsegmentator"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "totalsegmentator", None)
    with pytest.raises(FileNotFoundError, match=r"extra `evaluation`\): python -m pip install [^\n]*$"):
        TotalSegmentator()


@pytest.mark.parametrize(
    ("fast", "ids", "task"), [(True, (297,), "total_fast"), (False, (291, 292, 293, 294, 295), "total")]
)
def test_without_weights_one_line_says_how_to_fetch_them(tmp_path, monkeypatch, fast, ids, task):
    download = totalsegmentator("bin.totalseg_download_weights")
    assert set(ids) <= set(download.TASK_TO_ID[task])  # the remedy brings what is missing
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "weights"))
    with pytest.raises(FileNotFoundError) as caught:
        TotalSegmentator(fast)
    message = str(caught.value)
    assert str(tmp_path / "weights") in message and f"totalseg_download_weights -t {task}" in message
    assert message.count("Dataset") == len(ids) and all(f"Dataset{i}_TotalSegmentator" in message for i in ids)
    assert "\n" not in message
    assert not (tmp_path / "weights").exists()


def test_weights_without_a_checkpoint_are_incomplete(tmp_path, monkeypatch):
    totalsegmentator("config")
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    fold = weights_folder(tmp_path) / "fold_0"
    fold.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="incomplete"):
        TotalSegmentator(fast=True)
    (fold / "checkpoint_final.pth").touch()
    assert TotalSegmentator(fast=True).weights_dir == tmp_path / "nnunet" / "results"
    with pytest.raises(FileNotFoundError, match="Dataset291"):
        TotalSegmentator(fast=False)


# ------------------------------------------------------------------------------------------- TotalSegmentator itself


def weights_folder(home: Path) -> Path:
    """Where TotalSegmentator has the model of `fast`."""
    return (
        home
        / "nnunet/results/Dataset297_TotalSegmentator_total_3mm_1559subj"
        / "nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres"
    )


def write_weights(folder: Path, names: dict[int, str]) -> None:
    """A random U-Net of 5,000 parameters in nnU-Net's layout; its answers are always organs of ours or background."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    network = {
        **{"n_stages": 3, "features_per_stage": [4, 8, 8], "kernel_sizes": [[3, 3, 3]] * 3},
        **{"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_conv_per_stage": [1] * 3},
        **{"n_conv_per_stage_decoder": [1] * 2, "conv_bias": True, "norm_op_kwargs": {"eps": 1e-5, "affine": True}},
        **{"nonlin_kwargs": {"inplace": True}},
    }
    modules = {
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "nonlin": "torch.nn.modules.activation.LeakyReLU",
    }
    resampling = {"order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 1,
        "patch_size": [32, 32, 32],
        "spacing": [3.0, 3.0, 3.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": network | modules,
            "_kw_requires_import": list(modules),
        },
    }
    for what in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = {**resampling, "is_seg": what == "seg"}
    intensities = {"mean": 0.0, "std": 150.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}
    plans = {
        "dataset_name": folder.parent.name,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {"3d_fullres": configuration},
    }
    labels = {"background": 0, **{name: i for i, name in names.items()}}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}

    torch.manual_seed(0)
    classes = {"conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU}
    unet = PlainConvUNet(1, num_classes=len(labels), deep_supervision=True, **network, **classes)
    others = [i for i, name in names.items() if name not in NAMES.values()]
    for layer in unet.decoder.seg_layers:
        torch.nn.init.zeros_(layer.bias)
        layer.bias.data[others] = -1e3
    checkpoint = {
        "network_weights": unet.state_dict(),
        "trainer_name": "nnUNetTrainer_4000epochs_NoMirroring",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": None,
    }
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """TotalSegmentator's home with tiny weights, and a user's configuration that allows usage statistics."""
    names = totalsegmentator("map_to_binary").class_map["total"]
    home = tmp_path / "home"
    write_weights(weights_folder(home), names)
    (home / "config.json").write_text('{"totalseg_id": "me", "send_usage_stats": true, "prediction_counter": 5}')
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(home))
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    # nnU-Net looks once in a process where its weights are, when it is imported
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(home / "nnunet" / "results"))
    from nnunetv2.utilities import file_path_utilities

    monkeypatch.setattr(file_path_utilities, "nnUNet_results", str(home / "nnunet" / "results"))
    return home


def test_totalsegmentator_runs_through_adapter_and_handler_to_a_dice_table(home, tmp_path, monkeypatch):
    """Its real API on a volume that lies as scanners store it, and on a single slice of 1 mm."""
    api, names = totalsegmentator("python_api"), totalsegmentator("map_to_binary").class_map["total"]
    real_api, calls, posts = api.totalsegmentator, [], []

    def spied_api(image: nib.Nifti1Image, output: None, **options) -> nib.Nifti1Image:
        calls.append((image, options, real_api(image, output, **options)))
        return calls[-1][2]

    monkeypatch.setattr(api, "totalsegmentator", spied_api)
    monkeypatch.setattr("requests.post", lambda *arguments, **_: posts.append(arguments))
    volume, thin = phantom((24, 20, 16), spacing=(8, 8, 8)), phantom((24, 20, 1), spacing=(8, 8, 1))
    turned = np.diag((-1.0, -1.0, 1.0, 1.0)) @ volume.affine  # LPS
    cases = {"volume": (volume.label, volume.hu, turned), "thin": (thin.label, thin.hu, thin.affine)}
    segmenter, segmentations = TotalSegmentator(fast=True), []

    def remembering_segmenter(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        segmentations.append(segmenter(hu, affine))
        return segmentations[-1]

    engine = Engine(lambda _, batch: [{"pred": torch.from_numpy(cases[item["case"]][1])[None]} for item in batch])
    OrganDice(remembering_segmenter, tmp_path / "output").attach(engine)
    environment = dict(os.environ)
    engine.run(
        [
            [{"case": case, "label_map": MetaTensor(torch.from_numpy(label)[None], affine=torch.from_numpy(affine))}]
            for case, (label, _, affine) in cases.items()
        ]
    )

    # the adapter: CT in on its grid, and every voxel's answer out under AMOS22's id
    for (image, options, answer), (_, hu, affine), segmentation in zip(
        calls, cases.values(), segmentations, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(image.dataobj)[:, :, : hu.shape[2]], hu)
        np.testing.assert_allclose(image.affine, affine)
        assert options["fast"] and options["ml"] and options["device"] == "cpu"
        expected = np.zeros(hu.shape, np.uint8)
        for i, name in NAMES.items():
            theirs = next(j for j, n in names.items() if n == name)
            expected[np.asarray(answer.dataobj)[:, :, : hu.shape[2]] == theirs] = i
        np.testing.assert_array_equal(segmentation, expected)
        assert segmentation.dtype == np.uint8 and len(np.unique(segmentation)) > 3  # an answer to compare
    assert calls[0][0].shape == volume.hu.shape
    assert calls[1][0].shape == (24, 20, 3)  # a slice of 1 mm is no voxel of 3 mm

    # the table: Dice as sets of voxels give it
    with open(tmp_path / "output" / "organ_dice.csv", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(cases)
    dice = {case: {} for case in cases}
    for (case, (label, _, _)), segmentation in zip(cases.items(), segmentations, strict=True):
        for organ in ORGANS[:14]:
            mine, theirs = (set(map(tuple, np.argwhere(ids == organ.id))) for ids in (label, segmentation))
            if mine:
                dice[case][organ.name] = 2 * len(mine & theirs) / (len(mine) + len(theirs))
            assert rows[case][organ.name] == (f"{dice[case][organ.name]:.4f}" if mine else "")
    assert max(dice["volume"].values()) > 0
    for name in {name for values in dice.values() for name in values}:
        values = [values[name] for values in dice.values() if name in values]
        assert math.isclose(engine.state.metrics[f"dice_{name.replace(' ', '_')}"], sum(values) / len(values))

    # the run left nothing behind and told nobody
    assert posts == []
    assert json.loads((home / "config.json").read_text())["prediction_counter"] == 5
    assert {name: os.environ.get(name) for name in environment} == environment
    assert "TOTALSEG_WEIGHTS_PATH" not in os.environ


# ------------------------------------------------------------------------------------------- a MONAI bundle

CENTRES = (-1.0, 0.0, 1.0)
"""Intensities that the tiny bundle takes for its classes 0, 1 and 2."""


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle like the Model Zoo's that gives each voxel the class of the nearest centre, HU scaled by 1/100."""
    config = {
        "imports": ["$import glob", "$import math"],
        "bundle_root": str(tmp_path),
        "dataset_dir": "/nowhere",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii.gz'))",
        "device": "$torch.device('cuda:7')",
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
                {
                    "_target_": "ScaleIntensityRanged",
                    "keys": "image",
                    **{"a_min": -100, "a_max": 100, "b_min": -1, "b_max": 1},
                },
            ],
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            **{"roi_size": [8, 8, 8], "overlap": "$math.sqrt(1 / 16)", "device": "@device", "sw_device": "@device"},
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
    }
    folder = tmp_path / "bundle"
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    # the nearest centre c to x has the largest 2 c x - c²
    centres = torch.tensor(CENTRES)
    weights = {"weight": 2 * centres.reshape(3, 1, 1, 1, 1), "bias": -centres.square()}
    torch.save(weights, folder / "models" / "model.pt")
    return folder


def test_a_bundle_segments_on_the_cts_own_grid(bundle):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, (9, 12, 7))
    hu = (100 * np.array(CENTRES)[classes] + rng.uniform(-45, 45, classes.shape)).astype(np.int16)
    affine = np.array([[0, -2.0, 0, 30], [0, 0, 3.0, -10], [-1.5, 0, 0, 5], [0, 0, 0, 1]])
    segmentation = BundleSegmenter(bundle, {1: 6, 2: 8})(hu, affine)
    np.testing.assert_array_equal(segmentation, np.array([0, 6, 8])[classes])
    assert segmentation.dtype == np.uint8
    assert not (bundle.parent / "eval").exists()  # nothing is saved


def test_a_bundles_weights_may_stand_under_model(bundle):
    file = bundle / "models" / "model.pt"
    torch.save({"model": torch.load(file)}, file)
    hu = np.full((4, 4, 4), 100, np.float32)
    assert (BundleSegmenter(bundle, {2: 3})(hu, np.eye(4)) == 3).all()


@pytest.mark.parametrize("missing", ["configs/inference.json", "models/model.pt"])
def test_a_bundle_that_lacks_a_file_is_refused(bundle, missing):
    (bundle / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"needs configs/inference.json or .yaml and models/model.pt.*download"):
        BundleSegmenter(bundle, {1: 6})


def test_weights_of_another_network_are_refused(bundle):
    torch.save({"weight": torch.zeros(3, 1, 1, 1, 1)}, bundle / "models" / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt doesn't fit the network of .*inference.json"):
        BundleSegmenter(bundle, {1: 6})
