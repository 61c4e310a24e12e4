"""Options that no config has are refused, and values of another kind than the config's."""

from __future__ import annotations

import sys

import pytest

from common.options import check_options

CONFIG = """
dataset_dir: $@bundle_root + '/masks'
sampler: dpmpp_2m
sampling_steps: 20
noise_correlation: 0.0
keep_identity: false
checkpoint: null
network_def: {_target_: torch.nn.Identity}
inferer: {_target_: SimpleInferer}
handlers: []
train: {trainer: {max_epochs: 1}}
"""
OVERLAY = "{'fid': false, 'inferer#folder': kept, '+handlers': []}"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command("--name value ...")`: checks what the command line of a run with a config and an overlay says."""
    (tmp_path / "inference.yaml").write_text(CONFIG)
    (tmp_path / "evaluate.yaml").write_text(OVERLAY)
    files = f"['{tmp_path}/inference.yaml','{tmp_path}/evaluate.yaml']"

    def check(options: str, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["python -m", "run", "inference", *options.split(), *more])
        check_options()

    return lambda options: (check(options, "--config_file", files), check(f"--config_file={files} {options}"))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--sampler ddim --sampling_steps 50 --noise_correlation 1 --keep_identity True",
        "--sampling_steps=50 --noise-correlation=0.5 --fid --checkpoint model.pt",
        "--sampling_steps $2*5 --keep_identity @fid --noise_correlation %other.yaml::correlation",
        "--network_def#channels (8,16) --train::trainer::max_epochs 2 --inferer#folder x --handlers []",
        "--meta_file None --logging_file False --tracking mlflow --_meta_#version 2",
        "--dataset_dir masks",
    ],
)
def test_what_the_configs_have_passes(command, options):
    command(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--smapler ddim", "no option --smapler here: did you mean --sampler?"),
        ("--sampling_steps 5 --samplng-steps=7", "no option --samplng_steps here: did you mean --sampling_steps?"),
        ("--guidance_scale 2", "no option --guidance_scale here"),
        ("--netwrk_def#channels (8,)", "no option --netwrk_def#channels here: did you mean --network_def?"),
        ("--sampling_steps abc", "--sampling_steps abc: give a whole number, such as 20"),
        ("--sampling_steps 2.5", "--sampling_steps 2.5: give a whole number, such as 20"),
        ("--sampling_steps True", "--sampling_steps True: give a whole number, such as 20"),
        ("--sampling_steps", "--sampling_steps True: give a whole number, such as 20"),
        ("--noise_correlation much", "--noise_correlation much: give a number, such as 0.0"),
        ("--keep_identity false", "--keep_identity false: give True or False, such as False"),
        ("--fid true", "--fid true: give True or False, such as False"),
        ("--fid 1", "--fid 1: give True or False, such as False"),
    ],
)
def test_what_no_config_has_is_refused(command, options, message):
    with pytest.raises(ValueError) as caught:
        command(options)
    assert str(caught.value) == message


def test_a_run_from_python_has_no_command_line(monkeypatch):
    for line in (["pytest", "--smapler", "ddim"], ["python"]):
        monkeypatch.setattr(sys, "argv", line)
        check_options()
