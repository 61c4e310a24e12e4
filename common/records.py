"""What a run of inference or evaluation wrote down about itself, read again."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path


def read_report(folder: Path) -> dict:
    """The `report.json` of a run.

    Raises:
        FileNotFoundError: no run in the folder.
        ValueError: a damaged report, or one of something else.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: name the output_dir of an inference or evaluation")
    report = _read(path)
    if not {"started", "cases"} <= report.keys():
        raise ValueError(f"{path} is of something else or an earlier version: run inference or evaluation again")
    return report


def read_metrics(folder: Path, report: dict) -> dict | None:
    """The `metrics.json` of the run of that report; None where that run measured nothing.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / "metrics.json"
    return _read(path) if _is_of_run(path, report) else None


def read_dice(folder: Path, report: dict) -> dict[str, dict[str, float]]:
    """Dice by case and organ out of the `organ_dice.csv` of the run of that report; empty where there is none."""
    path = folder / "organ_dice.csv"
    if not _is_of_run(path, report):
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row.pop("case"): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}


def _is_of_run(path: Path, report: dict) -> bool:
    """Whether the run wrote the file, or another one left it in the same folder, before."""
    return path.is_file() and path.stat().st_mtime >= datetime.fromisoformat(report["started"]).timestamp()


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run inference or evaluation again") from error
    return content if isinstance(content, dict) else {}
