"""What a run wrote is read again, and what can't be read says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.records import MEASURED, read_dice, read_metrics, read_report

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
    assert read_metrics(run) == METRICS
    assert read_dice(run) == {"a": {"liver": 0.5}, "b": {"liver": 0.25, "spleen": 1.0}}


def test_a_run_that_measured_nothing_has_neither(run):
    for name in MEASURED:
        (run / name).unlink(missing_ok=True)
    assert read_metrics(run) is None and read_dice(run) == {}


def test_what_is_missing_or_damaged_is_named_with_a_remedy(run):
    with pytest.raises(FileNotFoundError, match=r"no .*none.report\.json: name the output_dir"):
        read_report(run / "none")
    for content in ('{"cases": [', "[]", '{"cases": []}'):
        (run / "report.json").write_text(content)
        with pytest.raises(ValueError, match=r"report\.json is (damaged|of something else).*: run inference or eval"):
            read_report(run)
    (run / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged .*: run inference or evaluation again"):
        read_metrics(run)
