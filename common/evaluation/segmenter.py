"""Segmenters: from a CT to the organs that it shows.

A segmenter is any callable that takes a CT in HU (X, Y, Z) and its affine, 4x4 from voxel to mm, and gives a label map
of AMOS22's ids on the same grid, 0 where there is no organ: what `Segmenter` says. Its `settings`, plain values, tell
its answers from another's. Two are here.

TotalSegmentator calls the organs of `labels.ORGANS`, in their order: spleen, kidney_right, kidney_left, gallbladder,
esophagus, liver, stomach, aorta, inferior_vena_cava, pancreas, adrenal_gland_right, adrenal_gland_left, duodenum,
urinary_bladder, prostate. Version 1, which the paper used, has the same names under other ids, and no prostate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

from ..bundle import load_checkpoint
from ..files import sha256
from ..labels import ORGANS


class Segmenter(Protocol):
    """What segments."""

    settings: dict

    def __call__(self, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Turn a CT in HU (X, Y, Z) into a label map of its grid."""


TOTALSEGMENTATOR_V1 = {c.totalsegmentator_v1: c.id for c in ORGANS if c.totalsegmentator_v1 is not None}
"""AMOS22's ids by those of TotalSegmentator v1's 104 classes, which MONAI's `wholeBody_ct_segmentation` has as well."""

TOTALSEGMENTATOR_V2 = {c.totalsegmentator_v2: c.id for c in ORGANS}
"""AMOS22's ids by those of TotalSegmentator v2's 117 classes."""

MIN_EXTENT = 3.0
"""How far a volume has to reach along each axis, in mm, to be a voxel on TotalSegmentator's coarse grid."""


def relabel(segmentation: np.ndarray, class_map: Mapping[int, int]) -> np.ndarray:
    """A segmentation's ids as AMOS22's, uint8 of the same shape; ids that `class_map` lacks become 0."""
    segmentation = segmentation.astype(np.int64)
    table = np.zeros(max(segmentation.max(initial=0), *class_map) + 1, np.uint8)
    table[list(class_map)] = list(class_map.values())
    return table[segmentation]


class TotalSegmentator:
    """TotalSegmentator v2's task `total` (Wasserthal et al. 2023, doi:10.1148/ryai.230024) as a `Segmenter`.

    It runs with a configuration of its own that sends no usage statistics; the user's isn't touched.

    Args:
        fast: the one model at 3 mm instead of the five at 1.5 mm.
        device: where it runs.

    Raises:
        FileNotFoundError: the package or its weights aren't there.
    """

    def __init__(self, fast: bool = False, device: torch.device | str = "cpu") -> None:
        self.fast = fast
        self.device = torch.device(device)
        self.weights_dir = self.check()

    @property
    def settings(self) -> dict:
        """What tells its answers from another segmenter's."""
        return {"segmenter": "TotalSegmentator", "version": version("TotalSegmentator"), "fast": self.fast}

    def check(self) -> Path:
        """Give the folder of the weights, or say what is missing."""
        try:
            from totalsegmentator.config import get_weights_dir
            from totalsegmentator.map_tasks_config import TASK_CONFIGS, TASK_ID_WEIGHTS_CONFIGS
        except ImportError as error:
            raise FileNotFoundError(
                "TotalSegmentator isn't installed or too old (the extra `evaluation`): "
                "python -m pip install 'TotalSegmentator>=2.18,<3' nnunetv2==2.6.0"
            ) from error
        ids = TASK_CONFIGS["total"]["sub_modes"]["fast" if self.fast else "default"]["task_id"]
        names = [TASK_ID_WEIGHTS_CONFIGS[i]["foldername"] for i in (ids if isinstance(ids, list) else [ids])]
        folder = get_weights_dir().absolute()
        missing = [name for name in names if not any((folder / name).glob("*/fold_0/checkpoint_final.pth"))]
        if missing:
            raise FileNotFoundError(
                f"TotalSegmentator's weights are missing or incomplete in {folder}: {', '.join(missing)}; remove what "
                f"is there of these and run totalseg_download_weights -t {'total_fast' if self.fast else 'total'}"
            )
        return folder

    def __call__(self, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Segment a CT in HU (X, Y, Z); a volume thinner than `MIN_EXTENT` is continued with its last slice."""
        from totalsegmentator.python_api import totalsegmentator

        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        lacking = (np.ceil(MIN_EXTENT / spacing).astype(int) - hu.shape).clip(0)
        image = nib.Nifti1Image(np.pad(hu, [(0, n) for n in lacking], mode="edge"), affine)
        kind = "gpu" if self.device.type == "cuda" else self.device.type
        with self._private_configuration():
            segmentation = totalsegmentator(
                image,
                None,
                ml=True,
                fast=self.fast,
                device=kind if self.device.index is None else f"{kind}:{self.device.index}",
                quiet=True,
                nr_thr_saving=1,  # each is a process, and there is one volume to save
            )
        x, y, z = hu.shape
        return relabel(np.asarray(segmentation.dataobj)[:x, :y, :z], TOTALSEGMENTATOR_V2)

    @contextmanager
    def _private_configuration(self) -> Iterator[None]:
        """For a while TotalSegmentator's home is a temporary folder; the weights stay where they are."""
        settings = {"send_usage_stats": False, "statistics_disclaimer_shown": True, "prediction_counter": 0}
        names = ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH")
        before = {name: os.environ[name] for name in names if name in os.environ}
        with TemporaryDirectory() as home:
            (Path(home) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
            os.environ |= dict(zip(names, (home, str(self.weights_dir)), strict=True))
            try:
                yield
            finally:
                for name in names:
                    del os.environ[name]
                os.environ |= before


class BundleSegmenter:
    """A MONAI bundle as a `Segmenter`, such as the Model Zoo's `wholeBody_ct_segmentation`.

    The bundle's inference config is used as it is, without what it would save: its `network_def`, `preprocessing` (from
    a file at `image`), `inferer` and `postprocessing` (to the label map `pred` on the file's grid).

    Args:
        bundle_dir: folder with `configs/inference.json` or `.yaml` and `models/model.pt`; no Python of its own.
        class_map: AMOS22's ids by the bundle's, `TOTALSEGMENTATOR_V1` for the one above.
        device: where it runs.

    Raises:
        FileNotFoundError: no config or no weights there.
        ValueError: weights that don't fit the network.
    """

    def __init__(
        self, bundle_dir: str | os.PathLike, class_map: Mapping[int, int], device: torch.device | str = "cpu"
    ) -> None:
        bundle_dir = Path(bundle_dir)
        config = next(bundle_dir.glob("configs/inference.*"), None)
        weights = bundle_dir / "models" / "model.pt"
        if config is None or not weights.is_file():
            raise FileNotFoundError(
                f"{bundle_dir} needs configs/inference.json or .yaml and models/model.pt to segment with it: download "
                "the bundle (python -m monai.bundle download)"
            )
        parser = ConfigParser()
        parser.read_config(config)
        parser["device"] = self.device = torch.device(device)
        transforms = parser["postprocessing"]["transforms"]
        parser["postprocessing"]["transforms"] = [t for t in transforms if not t["_target_"].endswith("SaveImaged")]
        self.class_map = class_map
        classes = {str(theirs): ours for theirs, ours in class_map.items()}
        files = {"config": sha256(config), "weights": sha256(weights)}
        self.settings = {"segmenter": bundle_dir.name, **files, "class_map": classes}
        self.preprocessing, self.inferer, self.postprocessing, network = (
            parser.get_parsed_content(name) for name in ("preprocessing", "inferer", "postprocessing", "network_def")
        )
        content = load_checkpoint(weights)
        try:
            network.load_state_dict(content.get("model", content))
        except RuntimeError as error:
            raise ValueError(f"{weights} doesn't fit the network of {config}: download the bundle again") from error
        self.network = network.to(self.device).eval()

    def __call__(self, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Segment a CT in HU (X, Y, Z)."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "ct.nii.gz"
            nib.save(nib.Nifti1Image(hu, affine), file)
            data = self.preprocessing({"image": str(file)})
        with torch.inference_mode():
            data["pred"] = self.inferer(data["image"][None].to(self.device), self.network)[0]
        return relabel(np.asarray(self.postprocessing(data)["pred"][0].cpu()), self.class_map)
