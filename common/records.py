"""What a run of inference or evaluation wrote down about itself, read again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

MEASURED = ("metrics.json", "metrics.csv", "metrics.md", "organ_dice.csv")
"""What evaluation writes beside `report.json`."""


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


def read_metrics(folder: Path) -> dict | None:
    """The `metrics.json` of a run; None where it measured nothing.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / "metrics.json"
    return _read(path) if path.is_file() else None


def read_dice(folder: Path) -> dict[str, dict[str, float]]:
    """Dice by case and organ out of the `organ_dice.csv` of a run; empty where there is none."""
    path = folder / "organ_dice.csv"
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row.pop("case"): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run inference or evaluation again") from error
    return content if isinstance(content, dict) else {}
