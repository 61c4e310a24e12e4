"""Two processes under torchrun are one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ITERATIONS = 3

PREPARE_FROM_CONTENT = '''
import zlib

import torch
from scripts.diffusion import NoisySample
from scripts.engines import PrepareNoisyBatch


class PrepareFromContent(PrepareNoisyBatch):
    """The same slice gets the same noise and timestep, whoever takes it."""

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        image, x_0 = batchdata["image"], batchdata["ct"] * 2 - 1
        generators = [torch.Generator().manual_seed(zlib.crc32(slice_.numpy().tobytes())) for slice_ in x_0]
        t = torch.cat([torch.randint(len(self.diffusion), (1,), generator=g) for g in generators])
        noise = torch.stack([torch.randn(x_0.shape[1:], generator=g) for g in generators])
        x_t = self.diffusion.add_noise(x_0, noise, t)
        return x_t, NoisySample(x_0, noise, t, x_t), (t, image), {}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the module with the deterministic noise lies, and the runs."""
    path = tmp_path_factory.mktemp("distributed")
    (path / "from_content.py").write_text(PREPARE_FROM_CONTENT)
    return path


@pytest.fixture(scope="module")
def options(amos, tiny_training) -> dict:
    return tiny_training | {
        "dataset_dir": str(amos),
        "cache_dir": str(amos / "cache"),
        "iterations": ITERATIONS,
        "learning_rate": 1e-3,
        "train#trainer#prepare_batch": {"_target_": "from_content.PrepareFromContent", "diffusion": "@diffusion"},
    }


@pytest.fixture(scope="module")
def alone(bundles, folder, options, run_bundle):
    """`alone(name, **overrides)`: the checkpoint of a run in this process, with twice the batch."""

    def run(name: str, **overrides) -> dict:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            several = options | {"batch_size": 2 * options["batch_size"], "output_dir": folder / name} | overrides
            run_bundle(bundles["abdominal_ct_mask_guided_ddpm"], "train", **several)
        return checkpoint(folder / name)

    return run


@pytest.fixture(scope="module")
def together(bundles, folder, options):
    """`together(name, **overrides)`: the folder of a run of two processes, with a folder in it for each rank."""

    def run(name: str, **overrides) -> Path:
        configs = bundles["abdominal_ct_mask_guided_ddpm"] / "configs"
        arguments = options | {
            "config_file": [str(configs / "train.yaml"), str(configs / "multi_gpu_train.yaml")],
            "output_dir": f"$'{folder / name}/rank' + os.environ['RANK']",
        }
        (folder / "arguments.json").write_text(json.dumps(arguments | overrides))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*torchrun, "-m", "monai.bundle", "run", "training", "--args_file", str(folder / "arguments.json")]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return folder / name

    return run


@pytest.fixture(scope="module")
def pair(together) -> Path:
    """A run of two processes from the start."""
    return together("pair")


@pytest.fixture(scope="module")
def whole(alone) -> dict:
    """The weights of a run of one process that goes two iterations further, without a stop."""
    return alone("whole", iterations=ITERATIONS + 2)["network"]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(alone, pair):
    one, two = alone("one"), checkpoint(pair / "rank0")
    assert one["iteration"] == two["iteration"] == ITERATIONS
    for part in ("network", "ema"):
        assert largest_difference(one[part], two[part]) < 1e-6
    # What a step changes, and what half of the batch would have made of it, is a different order of magnitude.
    half = alone("half", batch_size=4)
    assert largest_difference(one["network"], half["network"]) > 1e-4


def test_the_first_process_alone_writes(pair):
    assert {path.name for path in pair.iterdir()} == {"rank0"}
    assert {path.name for path in (pair / "rank0").iterdir()} == {"checkpoint.pt", "model.pt", "tensorboard"}
    assert len(list((pair / "rank0" / "tensorboard").iterdir())) == 1
    assert len(checkpoint(pair / "rank0")["random"]) == 2  # but it holds the random state of both


def test_one_process_resumes_what_two_began(alone, pair, whole):
    resumed = alone("resumed", iterations=ITERATIONS + 2, resume=pair / "rank0" / "checkpoint.pt")
    assert resumed["iteration"] == ITERATIONS + 2
    assert largest_difference(whole, resumed["network"]) < 1e-6


def test_two_processes_resume_what_they_began(pair, together, whole):
    resumed = together("resumed_pair", iterations=ITERATIONS + 2, resume=str(pair / "rank0" / "checkpoint.pt"))
    assert {path.name for path in resumed.iterdir()} == {"rank0"}
    assert largest_difference(whole, checkpoint(resumed / "rank0")["network"]) < 1e-6
