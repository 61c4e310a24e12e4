"""What a run wrote is read again, what an earlier one left beside it isn't, and what can't be read says what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.records import read_dice, read_metrics, read_report

STARTED = 1_767_225_600  # 2026-01-01
REPORT = {"started": "2026-01-01T00:00:00+00:00", "cases": [{"case": "a"}]}
METRICS = {"metrics": {"FID": 10.5, "dice_liver": None}, "cases": []}


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "organ_dice.csv").write_text("case,liver,spleen\na,0.5,\nb,0.25,1\n")
    return tmp_path


def test_all_is_read_as_it_was_written(run):
    assert read_report(run) == REPORT
    assert read_metrics(run, REPORT) == METRICS
    assert read_dice(run, REPORT) == {"a": {"liver": 0.5}, "b": {"liver": 0.25, "spleen": 1.0}}


def test_measurements_of_an_earlier_run_in_the_same_folder_are_not_of_this_one(run):
    for name, read, nothing in (("metrics.json", read_metrics, None), ("organ_dice.csv", read_dice, {})):
        os.utime(run / name, (STARTED - 1, STARTED - 1))
        assert read(run, REPORT) == nothing
        os.utime(run / name, (STARTED + 1, STARTED + 1))
        assert read(run, REPORT)
        (run / name).unlink()
        assert read(run, REPORT) == nothing


def test_what_is_missing_or_damaged_is_named_with_a_remedy(run):
    with pytest.raises(FileNotFoundError, match=r"no .*none.report\.json: name the output_dir"):
        read_report(run / "none")
    for content in ('{"cases": [', "[]", '{"cases": []}'):
        (run / "report.json").write_text(content)
        with pytest.raises(ValueError, match=r"report\.json is (damaged|of something else).*: run inference or eval"):
            read_report(run)
    (run / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged .*: run inference or evaluation again"):
        read_metrics(run, REPORT)
