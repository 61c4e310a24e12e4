"""What runs of inference and evaluation left, read again for tables and pictures."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from .paper import METHODS


class Run(NamedTuple):
    """A folder that inference or evaluation wrote.

    Attributes:
        folder: where it is.
        started: when, in seconds since 1970; 0 where nobody knows.
        method: what made the volumes.
        iterations: of the training; None where nobody knows.
        image_size: of the slices that the network makes, pixels along a side; None where nobody knows.
        weights: SHA-256 of their file, None of volumes that were made elsewhere.
        settings: of the sampling; empty of volumes that were made elsewhere.
        volumes: the synthetic CTs by case.
    """

    folder: Path
    started: float
    method: str
    iterations: int | None
    image_size: int | None
    weights: str | None
    settings: dict
    volumes: dict[str, Path]

    def metrics(self) -> tuple[dict[str, float], dict[str, int]]:
        """All that was measured, by name, and the number of slices of each case.

        Raises:
            FileNotFoundError: nothing was measured.
            ValueError: an earlier run left the measurements, or they are damaged.
        """
        path, remedy = self.folder / "metrics.json", "evaluate with configs/evaluate.yaml"
        content = _read(path, remedy)
        if path.stat().st_mtime < self.started:
            raise ValueError(f"{path} is older than the volumes beside it: {remedy}")
        return content["metrics"], {case["case"]: case["slices"] for case in content["cases"]}


def read_run(argument: str) -> Run:
    """The run in a folder, `FOLDER` or `NAME=FOLDER`; a name takes the place of what the weights say.

    Raises:
        FileNotFoundError: no run in the folder.
        ValueError: a damaged report, or volumes of unknown origin without a name.
    """
    name, folder = ("", argument) if Path(argument).is_dir() else argument.rpartition("=")[::2]
    folder = Path(folder)
    report = _read(folder / "report.json", "name the output_dir of an inference or evaluation")
    weights = report.get("weights") or {}
    bundle = weights.get("bundle")
    if not (name or bundle):
        raise ValueError(f"{folder} doesn't say what made its volumes: give it a name, NAME={folder}")
    started = report.get("started")
    return Run(
        folder,
        datetime.fromisoformat(started).timestamp() if started else 0.0,
        name or METHODS.get(bundle, bundle),
        weights.get("iteration"),
        weights.get("image_size"),
        weights.get("sha256"),
        report.get("settings") or {},
        {case["case"]: folder / case["ct"] for case in report["cases"]},
    )


def _read(path: Path, remedy: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(content, dict) or "cases" not in content:
        raise ValueError(f"{path} is of something else: {remedy}")
    return content
