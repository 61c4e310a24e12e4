"""Two processes are one with twice the batch; they share cases, and a rerun makes up for one that was lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from test_evaluation import copies, of_one_process
from tiny_run import TinyGenerator, equal
from torch import nn

from common.distributed import replicate
from common.phantom import write_dataset

ITERATIONS = 3
SLURM = {"SLURM_JOB_ID": "1", "SLURM_LOCALID": "none of torchrun's"}
"""What a process sees in a job; Ignite would take its local rank from there."""

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


def torchrun(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """A command in two processes, from the folder, whose modules it finds."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(folder)} | environment
    return subprocess.run(start, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the module with the deterministic noise lies, and the runs."""
    path = tmp_path_factory.mktemp("distributed")
    (path / "from_content.py").write_text(PREPARE_FROM_CONTENT)
    return path


@pytest.fixture(scope="module")
def options(amos, bundles, tiny_training) -> dict:
    return tiny_training(bundles["abdominal_ct_mask_guided_ddpm"]) | {
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
        command = ("-m", "monai.bundle", "run", "training", "--args_file", folder / "arguments.json")
        done = torchrun(folder, *command, **SLURM)
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


# ------------------------------------------------------------------------------------------------------------ GANs

PLAIN_GENERATOR = """
import torch
from scripts.transforms import one_hot
from torch import nn


class PlainGenerator(nn.Sequential):
    \"""Without noise and BatchNorm: what it makes of a slice depends on no other slice and no other process.\"""

    def __init__(self):
        super().__init__(nn.Conv2d(17, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1), nn.Tanh())

    def noise_shape(self, height, width):
        return (0,)

    def forward(self, image, noise=None):
        return super().forward(one_hot(image))
"""

TRAIN_SEVERAL = """
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import bundle_on_path
from monai.bundle import ConfigWorkflow
from test_distributed import in_a_process

dist.init_process_group("gloo")
folder, rank = Path(sys.argv[1]), dist.get_rank()
torch.save(in_a_process(rank), folder / f"replica{rank}.pt")
for name, arguments in json.loads((folder / "runs.json").read_text()).items():
    config_file = arguments.pop("config_file")
    # The process group is here already, and is needed further.
    arguments |= {"initialize": ["$torch.manual_seed(@seed + dist.get_rank())"], "finalize": []}
    arguments["output_dir"] = str(folder / name / f"rank{rank}")
    with bundle_on_path(Path(config_file[0]).parents[1]):
        workflow = ConfigWorkflow(config_file, workflow_type="train", logging_file=False, run_id="run", **arguments)
        workflow.initialize()
        workflow.run()
        networks = [workflow.parser.get_parsed_content(part).module for part in ("network", "discriminator")]
    torch.save([network.state_dict() for network in networks], folder / name / f"networks{rank}.pt")
dist.destroy_process_group()
"""


def slices_of(rank: int) -> torch.Tensor:
    return torch.randint(1, 17, (2, 3, 1, 8, 8), generator=torch.Generator().manual_seed(rank))


def backward_of_two_forwards(network: nn.Module, rank: int) -> dict:
    """What is left when a loss came from two calls of a network."""
    first, second = (network(image, torch.ones(image.shape)) for image in slices_of(rank))
    (first.square().mean() + (second - 1).square().mean()).backward()
    network = getattr(network, "module", network)
    return {
        "gradients": {name: value.grad for name, value in network.named_parameters()},
        "buffers": {name: value.clone() for name, value in network.named_buffers()},
    }


def in_a_process(rank: int) -> dict:
    """What a replica of a network is and does, for those who read what this process saves."""
    torch.manual_seed(rank)  # each process begins with weights of its own
    network = TinyGenerator()
    network.dropout.p = 0.0
    replica = replicate(network)
    start = deepcopy(replica.module.state_dict())
    return {"start": dict(start)} | backward_of_two_forwards(replica, rank)


@pytest.fixture(scope="module")
def gans(bundles, amos, tiny_training, folder):
    """`gans(name)`: configs and overrides of a run of a GAN, of those that `processes` trains."""
    (folder / "plain_generator.py").write_text(PLAIN_GENERATOR)

    def run(name: str) -> tuple[Path, dict]:
        kind = name.split("_")[0]
        bundle = bundles[f"abdominal_ct_{kind}"]
        options = tiny_training(bundle) | {"dataset_dir": str(amos), "cache_dir": str(amos / "cache")}
        if kind == "pix2pix":
            options |= {
                "network_def": {"_target_": "plain_generator.PlainGenerator"},
                "discriminator_def#norm": "INSTANCE",
                "discriminator_def#activation": "ELU",  # smooth: no kink for rounding to fall on either side of
                "train#trainer#order": name.split("_")[1:],
                "learning_rate": 1e-3,
            }
        return bundle, options

    return run


@pytest.fixture(scope="module")
def processes(gans, folder) -> Path:
    """Folder in which two processes have trained GANs, one after the other."""
    runs = {}
    for name, overrides in {
        "oasis_whole": {},
        "oasis_half": {"iterations": 2},
        "oasis_rest": {"resume": str(folder / "oasis_half" / "rank0" / "checkpoint.pt")},
        "pix2pix_discriminator_generator": {},
        "pix2pix_generator_discriminator": {},
    }.items():
        bundle, options = gans(name)
        configs = [str(bundle / "configs" / f"{config}.yaml") for config in ("train", "multi_gpu_train")]
        runs[name] = options | overrides | {"config_file": configs}
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "train_several.py").write_text(TRAIN_SEVERAL)
    tests = Path(__file__).absolute().parent
    path = os.pathsep.join(map(str, (folder, tests, tests.parent)))
    done = torchrun(folder, folder / "train_several.py", folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_process_alone_has_no_replicas():
    network = nn.Linear(1, 1)
    assert replicate(network) is network


def test_replicas_begin_as_the_first_and_average_the_gradients_of_two_forwards(processes):
    replicas = [torch.load(processes / f"replica{rank}.pt") for rank in (0, 1)]
    torch.manual_seed(0)
    first = TinyGenerator()
    first.dropout.p = 0.0
    for replica in replicas:
        assert equal(replica["start"], dict(first.state_dict()))
    alone = [backward_of_two_forwards(deepcopy(first), rank) for rank in (0, 1)]
    for name in dict(first.named_parameters()):
        mean = (alone[0]["gradients"][name] + alone[1]["gradients"][name]) / 2
        for replica in replicas:
            torch.testing.assert_close(replica["gradients"][name], mean, rtol=1e-5, atol=1e-7)
    # Each has BatchNorm's statistics of its own slices.
    for rank, replica in enumerate(replicas):
        for name, value in replica["buffers"].items():
            torch.testing.assert_close(value, alone[rank]["buffers"][name], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(*(replica["buffers"]["norm.running_mean"] for replica in replicas), rtol=1e-3)


@pytest.mark.parametrize("name", ["pix2pix_discriminator_generator", "pix2pix_generator_discriminator"])
def test_two_processes_take_the_steps_of_a_gan_with_twice_the_batch(processes, gans, run_bundle, name):
    bundle, options = gans(name)
    folder = processes / name / "alone"
    twice = options | {"batch_size": 2 * options["batch_size"], "output_dir": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(processes)
        run_bundle(bundle, "train", **twice)
        run_bundle(bundle, "train", **(options | {"output_dir": folder / "half"}))
    one, two, half = checkpoint(folder), checkpoint(processes / name / "rank0"), checkpoint(folder / "half")
    for part in ("network", "discriminator"):
        assert largest_difference(one[part], two[part]) < 1e-6
        # Half of the batch would have made something else of it.
        assert largest_difference(one[part], half[part]) > 1e-5


def test_two_processes_resume_the_gan_they_began(processes):
    for name in ("checkpoint.pt", "model.pt"):
        whole, rest = (torch.load(processes / f"oasis_{run}" / "rank0" / name) for run in ("whole", "rest"))
        assert equal(whole, rest), name
    assert len(checkpoint(processes / "oasis_rest" / "rank0")["random"]) == 2


@pytest.mark.parametrize("name", ["oasis_whole", "oasis_rest", "pix2pix_generator_discriminator"])
def test_both_networks_of_a_gan_are_the_same_in_all_processes(processes, name):
    first, second = (torch.load(processes / name / f"networks{rank}.pt") for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        # On CPUs each has BatchNorm's statistics of its own slices.
        assert equal(*({name: value for name, value in state.items() if "running" not in name} for state in (a, b)))


# ------------------------------------------------------------------------------------------------ shares of the cases

WATCHED_GENERATOR = """
import os
import signal
import time
import zlib
from pathlib import Path

import torch
from torch import nn


class WatchedGenerator(nn.Conv2d):
    \"""Writes down who samples what. Of a run with a victim, each process does one case; then that one is killed.\"""

    def __init__(self):
        super().__init__(2, 1, 3, padding=1)

    def noise_shape(self, height, width):
        return (1, height, width)

    def forward(self, image, noise):
        begun, rank = Path(os.environ["BEGUN"]), os.environ.get("RANK", "alone")
        begun.mkdir(exist_ok=True)
        with open(begun / rank, "a") as file:
            print(zlib.crc32(image.numpy().tobytes()), file=file)
        if "VICTIM" in os.environ and len((begun / rank).read_text().splitlines()) == 2:
            while sum(len(file.read_text().splitlines()) for file in begun.iterdir()) < 4:
                time.sleep(0.05)
            if rank == os.environ["VICTIM"]:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(240)  # much longer than torchrun takes to notice
        return torch.tanh(super().forward(torch.cat([image / 16, noise], dim=1)))
"""


def test_the_cases_of_a_lost_rank_are_made_up_by_a_rerun(bundles, run_bundle, folder, tmp_path, monkeypatch):
    """Five cases; the second process is killed in its second one, while the first is in its second."""
    write_dataset(tmp_path, train=0, validation=5, shape=(32, 32, 4))
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (tmp_path / "labelsVa").iterdir())
    (folder / "watched_generator.py").write_text(WATCHED_GENERATOR)
    monkeypatch.syspath_prepend(folder)
    options = {"network_def": {"_target_": "watched_generator.WatchedGenerator"}, "image_size": 32}
    options |= {"dataset_dir": str(tmp_path / "labelsVa"), "checkpoint": str(tmp_path / "model.pt")}
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(1, 2, 3, 3, generator=generator), "bias": torch.zeros(1)}
    torch.save({"model": weights}, tmp_path / "model.pt")

    bundle, overlays = bundles["abdominal_ct_pix2pix"], ("inference", "multi_gpu_inference")
    alone, together = tmp_path / "alone", tmp_path / "together"

    def sampled(name: str, run: Callable[[], object]) -> tuple[Any, dict[str, list[str]]]:
        """What a run returns, and what each of its processes has sampled."""
        monkeypatch.setenv("BEGUN", str(tmp_path / name))
        done = run()
        return done, {file.name: file.read_text().split() for file in (tmp_path / name).iterdir()}

    _, of_each = sampled("of_alone", lambda: run_bundle(bundle, "inference", **options, output_dir=alone))
    a, b, c, d, e = of_each["alone"]
    assert len({a, b, c, d, e}) == 5

    arguments = {"config_file": [str(bundle / "configs" / f"{name}.yaml") for name in overlays]}
    (folder / "arguments.json").write_text(json.dumps(options | arguments | {"output_dir": str(together)}))
    command = ("-m", "monai.bundle", "run", "--args_file", folder / "arguments.json")
    lost, of_each = sampled("of_lost", lambda: torchrun(folder, *command, VICTIM="1", **SLURM))
    assert lost.returncode != 0 and "SIGKILL" in lost.stderr
    assert of_each == {"0": [a, c], "1": [b, d]}
    done = {f"{case}_{what}" for case in cases[:2] for what in ("ct.nii.gz", "preview.png")}
    assert {path.name for path in together.iterdir()} == done | {"report.json", "kept"}
    assert len(list((together / "kept").iterdir())) == 2
    assert [case["case"] for case in report(together)] == cases[:1]  # the first process's
    assert_same_volumes(together, alone, cases[:2])

    def again(output: Path) -> None:
        run_bundle(bundle, *overlays, **options, output_dir=output)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        what = (again, together, free.getsockname()[1])
    fork = torch.multiprocessing.start_processes
    _, of_each = sampled("of_rerun", lambda: fork(of_one_process, what, nprocs=2, start_method="fork"))
    assert of_each == {"0": [c, e], "1": [d]}  # the rest only, each once
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()} | {"kept"}
    assert [case["case"] for case in report(together)] == cases
    assert report(together) == report(alone)
    assert_same_volumes(together, alone, cases)


def test_shared_volumes_that_were_made_earlier_need_no_weights(bundle, amos, workflow, on_path, tmp_path):
    options = {"dataset_dir": amos, "predictions_dir": copies(amos, tmp_path / "made"), "image_size": 32}
    alone = {"initialize": [], "finalize": [], "checkpoint": tmp_path / "none.pt", "output_dir": tmp_path / "out"}
    for overlays in (("evaluate", "multi_gpu_inference"), ("multi_gpu_inference", "evaluate")):
        with on_path(bundle):
            made = workflow(bundle, "inference", *overlays, **options, **alone)
            evaluator = made.parser.get_parsed_content("evaluator")
        assert evaluator.network is None and evaluator.inferer.inferer is None


def report(folder: Path) -> list[dict]:
    """What report.json says of the cases, but for how long they took."""
    return [case | {"seconds": 0} for case in json.loads((folder / "report.json").read_text())["cases"]]


def assert_same_volumes(folder: Path, other: Path, cases: list[str]) -> None:
    for case in cases:
        first, second = (np.asanyarray(nib.load(path / f"{case}_ct.nii.gz").dataobj) for path in (folder, other))
        np.testing.assert_array_equal(first, second)
        assert first.std() > 10
