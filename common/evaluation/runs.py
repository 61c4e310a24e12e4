"""What runs of inference and evaluation left, read again for tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..records import read_metrics, read_report
from .paper import METHODS


class Run(NamedTuple):
    """A folder that inference or evaluation wrote.

    Attributes:
        folder: where it is.
        method: what made the volumes.
        iterations: of the training; None where nobody knows.
        image_size: of the slices that were made and measured, pixels along a side; None where nobody knows.
        weights: SHA-256 of their file, None of volumes that were made elsewhere.
        settings: of the sampling; empty of volumes that were made elsewhere.
        volumes: the synthetic CTs by case.
        metrics: all that was measured, by name; None is not a number. Empty where this run measured nothing.
        slices: how many were measured of each case.
        segmenter: which one found the organs for Dice; empty without Dice.
    """

    folder: Path
    method: str
    iterations: int | None
    image_size: int | None
    weights: str | None
    settings: dict
    volumes: dict[str, Path]
    metrics: dict[str, float | None]
    slices: dict[str, int]
    segmenter: dict


def read_run(argument: str) -> Run:
    """The run in a folder, `FOLDER` or `NAME=FOLDER`; a name takes the place of what the weights say.

    Raises:
        FileNotFoundError: no run in the folder.
        ValueError: a damaged report, or volumes of unknown origin without a name.
    """
    name, folder = ("", argument) if Path(argument).is_dir() else argument.rpartition("=")[::2]
    folder = Path(folder)
    report = read_report(folder)
    weights = report.get("weights") or {}
    bundle = weights.get("bundle")
    if not (name or bundle):
        raise ValueError(f"{folder} doesn't say what made its volumes: give it a name, NAME={folder}")
    measured = read_metrics(folder) or {"metrics": {}, "cases": []}
    settings = measured.get("settings", {})
    return Run(
        folder,
        name or METHODS.get(bundle, bundle),
        weights.get("iteration"),
        settings.get("image_size", weights.get("image_size")),
        weights.get("sha256"),
        report.get("settings") or {},
        {case["case"]: folder / case["ct"] for case in report["cases"]},
        measured["metrics"],
        {case["case"]: case["slices"] for case in measured["cases"]},
        settings.get("Dice", {}),
    )
