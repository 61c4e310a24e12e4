"""The last line of a run: ours alone for what we raise on purpose, the whole traceback for everything else."""

from __future__ import annotations

import sys

import pytest

from common.errors import refusal, report_in_one_line
from common.evaluation.metrics import axial_slices
from common.inferers import DiffusionSampler, VolumeNoise


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a program prints that ends with the error of a call, wrapped as MONAI wraps it."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    report_in_one_line()

    def run(call) -> str:
        try:
            try:
                call()
            except Exception as error:
                raise RuntimeError("Failed to instantiate component") from error
        except RuntimeError:
            sys.excepthook(*sys.exc_info())
        return capsys.readouterr().err

    return run


def test_what_we_raise_on_purpose_is_one_line(printed):
    assert printed(lambda: VolumeNoise(0, "case", (2, 2), 2, correlation=2)) == (
        "error: noise_correlation is 2: choose a value from 0 (independent) to 1 (shared)\n"
    )
    assert printed(lambda: DiffusionSampler(None, "euler")).startswith("error: no sampler 'euler'")


def test_a_bug_of_ours_keeps_its_traceback(printed):
    text = printed(lambda: axial_slices([{}]))
    assert "Traceback" in text and "KeyError: 'mask_slices'" in text and "Failed to instantiate" in text


def test_what_we_raise_while_handling_counts_and_what_is_put_aside_does_not():
    def error_of(call) -> BaseException:
        with pytest.raises(Exception) as caught:
            call()
        return caught.value

    def refuse():
        VolumeNoise(0, "case", (2, 2), 2, correlation=2)

    def bug_after_a_refusal():
        try:
            refuse()
        except ValueError:
            raise KeyError("bug") from None

    def bug_while_handling_an_error_of_others():
        try:
            int("x")
        except ValueError:
            raise KeyError("bug")  # noqa: B904

    assert refusal(error_of(refuse)).args[0].startswith("noise_correlation is 2")
    assert refusal(error_of(bug_after_a_refusal)) is None
    assert refusal(error_of(bug_while_handling_an_error_of_others)) is None


def test_an_error_of_others_keeps_its_traceback(printed):
    text = printed(lambda: int("x"))
    assert "Traceback" in text and "ValueError: invalid literal" in text
