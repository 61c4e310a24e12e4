"""What an inference run leaves: CT volumes, previews and a report."""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import ignite.distributed as idist
import monai
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from torch.utils.data import Dataset
from tqdm import trange

from .bundle import load_checkpoint
from .dicom.writing import check_series, save_series
from .distributed import gather
from .faithfulness import faithfulness
from .files import replacing, sha256
from .html_report import write_html
from .inferers import VolumeInferer
from .records import MEASURED
from .report import HU_BINS, hu_histogram, hu_statistics, label_histogram, save_preview
from .transforms import file_name

NIFTI = (".nii", ".nii.gz")


def save_ct(path: str | os.PathLike, hu: np.ndarray, affine: np.ndarray, source: str | os.PathLike) -> None:
    """Write a CT as int16 NIfTI on the grid of its label map.

    Args:
        path: file to write.
        hu: (X, Y, Z) in HU.
        affine: 4x4, voxel to mm (RAS+).
        source: the label map's file; of a NIfTI the whole geometry is kept: affines, their codes, units.
    """
    if str(source).endswith(NIFTI):
        header = nib.load(source).header.copy()
        affine = header.get_best_affine()
        header["cal_min"] = header["cal_max"] = 0  # the display range of the labels
        header.set_intent("none")
        header["descrip"] = b"synthetic CT"
    else:
        header = None
    image = nib.Nifti1Image(hu.astype(np.int16), affine, header)
    image.set_data_dtype(np.int16)
    image.header.set_slope_inter(1, 0)
    with replacing(path) as temporary:
        nib.save(image, temporary)


class CheckCases:
    """Load and preprocess every case once before the first is sampled, so that a bad one is found at once.

    Args:
        dataset: the cases with their preprocessing.
        writer: what will write them, to find what it can't write.
    """

    def __init__(self, dataset: Dataset, writer: ResultWriter) -> None:
        self.dataset = dataset
        self.writer = writer

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self._check)

    def _check(self, engine: Engine) -> None:
        if len(self.dataset) > 1 or self.writer.dicom:  # a single case is loaded at once anyway
            for i in trange(len(self.dataset), desc="checking", unit="case"):
                self.writer.check(self.dataset[i])


class ResultWriter:
    """Write each case as it is done, CT and `CASE_preview.png`, and `report.json` about the run.

    Reads from the engine's decollated batch `label_map`, the label map on its own grid, and from its output `pred`, the
    CT in HU on that grid, and in evaluation `real`, the real CT as coarse as the synthetic one. At the end
    `report.html` shows the report and what the handlers of an evaluation have written. Under torchrun each process
    writes its own cases and the first one the report, with the cases of all when the run is complete. What an earlier
    run measured in the same folder is removed: it would be taken for this one's.

    Args:
        output_dir: folder to write into.
        checkpoint: the weights' file, for its hash and the facts in it; None for volumes that weren't sampled.
        inferer: what made the volumes; its settings go into the report; None likewise.
        output_format: of the CTs: "nifti", `CASE_ct.nii.gz`, or "dicom", a folder `CASE_ct` with a file a slice.
        keep_identity: in DICOM, take patient and study over from the label map's, which has to be DICOM then.

    Raises:
        ValueError: another format, a `keep_identity` that is neither True nor False, or an identity to keep in NIfTI.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        checkpoint: str | os.PathLike | None,
        inferer: VolumeInferer | None,
        output_format: Literal["nifti", "dicom"] = "nifti",
        keep_identity: bool = False,
    ) -> None:
        if output_format not in ("nifti", "dicom"):
            raise ValueError(f"output_format is {output_format!r}: choose nifti or dicom")
        if not isinstance(keep_identity, bool):  # "false" on a command line is a word, and would count as yes
            raise ValueError(f"keep_identity is {keep_identity!r}: write True or False")
        if keep_identity and output_format != "dicom":
            raise ValueError("a NIfTI has no identity to keep: add --output_format dicom, or leave out --keep_identity")
        self.output_dir = Path(output_dir)
        self.checkpoint = checkpoint
        self.inferer = inferer
        self.dicom = output_format == "dicom"
        self.keep_identity = keep_identity
        self.cases: list[dict] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._start_case)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish_case)

    def check(self, item: dict) -> None:
        """Check that a case can be written, before it is sampled: the errors of `check_series`."""
        if self.dicom:
            affine, source = _origin(item["label_map"])
            check_series(affine, source, source if self.keep_identity else None)

    def _start(self, engine: Engine) -> None:
        self.cases = []
        if idist.get_rank() == 0:
            for name in MEASURED:
                (self.output_dir / name).unlink(missing_ok=True)
        self.origin = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "monai": monai.__version__,
                "numpy": np.__version__,
                "nibabel": version("nibabel"),
            },
            "device": str(engine.state.device),
            "weights": None if self.checkpoint is None else weights_facts(self.checkpoint),
            "settings": None if self.inferer is None else self.inferer.settings,
            "hu_bins": HU_BINS,
        }
        # Only now, so that it comes after every other handler of that event: report.html shows what they write.
        if not engine.has_event_handler(self._finish, Events.COMPLETED):
            engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start_case(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _finish_case(self, engine: Engine) -> None:
        seconds = round((time.perf_counter() - self._started) / len(engine.state.output), 2)
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.cases.append({"case": item["case"], "seconds": seconds, **self._write_case(item, output)})
            if idist.get_rank() == 0:
                self._write_report(self.cases)

    def _finish(self, engine: Engine) -> None:
        cases = sorted(gather(self.cases), key=lambda case: case["case"])
        if idist.get_rank() == 0:
            self._write_report(cases)
            write_html(self.output_dir)
            engine.logger.info("CTs of %d cases and report.html in %s", len(cases), self.output_dir)

    def _write_case(self, item: dict, output: dict) -> dict:
        """Write one case's files and give what the report says about them."""
        label_map, hu = _array(item["label_map"]), _array(output["pred"])
        real = _array(output["real"]) if "real" in output else None
        affine, source = _origin(item["label_map"])
        preview = self.output_dir / f"{item['case']}_preview.png"
        if self.dicom:
            ct = self.output_dir / f"{item['case']}_ct"
            save_series(ct, hu, affine, source if self.keep_identity else None)
        else:
            ct = self.output_dir / f"{item['case']}_ct.nii.gz"
            save_ct(ct, hu, affine, source)
        save_preview(preview, label_map, hu, affine)
        histograms = {"synthetic": hu_histogram(label_map, hu)}
        if real is not None:
            histograms["real"] = hu_histogram(label_map, real)
        return {
            "ct": ct.name,
            "preview": preview.name,
            "shape": list(hu.shape),
            "label_histogram": label_histogram(label_map),
            "hu": hu_statistics(label_map, hu),
            "hu_histogram": histograms,
            "faithfulness": faithfulness(label_map, hu, affine, real),
        }

    def _write_report(self, cases: list[dict]) -> None:
        with replacing(self.output_dir / "report.json") as temporary:
            temporary.write_text(json.dumps({**self.origin, "cases": cases}, indent=2), encoding="utf-8")


def weights_facts(path: str | os.PathLike) -> dict:
    """Which weights these are: `file`, `sha256`, and what training wrote into the file (`bundle`, `iteration`, ...)."""
    return {"file": str(path), "sha256": sha256(path), **load_checkpoint(path).get("facts", {})}


def _origin(volume: MetaTensor) -> tuple[np.ndarray, str]:
    """Affine and file of a volume."""
    return np.asarray(volume.affine.cpu()), file_name(volume)


def _array(volume: torch.Tensor) -> np.ndarray:
    """(1, X, Y, Z) on any device to (X, Y, Z)."""
    return np.asarray(volume[0].cpu())
