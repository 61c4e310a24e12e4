"""Weights and checkpoints: what was saved comes back, and what can't be loaded is said in one line."""

from __future__ import annotations

import pickle
import resource
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import nn

from common import bundle
from common.bundle import bundle_root, load_checkpoint, load_weights, save_checkpoint, save_weights
from common.networks.unet import ConditionalUNet

FACTS = {"bundle": "abdominal_ct_conditional_ddpm", "image_size": 16, "iteration": 7}
SIZES = {
    "num_res_blocks": 1,
    "attention_levels": (False, False),
    "num_head_channels": 8,
    "norm_num_groups": 4,
}


def network(seed: int = 0, channels: tuple[int, ...] = (8, 8), **options) -> ConditionalUNet:
    torch.manual_seed(seed)
    return ConditionalUNet(channels=channels, **SIZES, **options)


def assert_equal_states(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def test_weights_come_back_bit_by_bit(tmp_path):
    saved, loaded = network(seed=0), network(seed=1)
    assert not torch.equal(next(saved.parameters()), next(loaded.parameters()))
    save_weights(tmp_path / "models" / "model.pt", saved.state_dict(), FACTS)
    assert load_weights(loaded, tmp_path / "models" / "model.pt") is loaded
    assert_equal_states(saved.state_dict(), loaded.state_dict())
    assert torch.load(tmp_path / "models" / "model.pt", weights_only=True)["facts"] == FACTS


def test_a_plain_state_dict_fits(tmp_path):
    saved, loaded = network(seed=0), network(seed=1)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    load_weights(loaded, tmp_path / "model.pt")
    assert_equal_states(saved.state_dict(), loaded.state_dict())


def test_without_a_path_the_network_stays_as_it_is():
    fresh = network(seed=3)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    assert load_weights(fresh, None) is fresh
    assert_equal_states(before, fresh.state_dict())


def test_a_checkpoint_comes_back_with_values_and_dtypes(tmp_path):
    content = {
        "tensor": torch.tensor([0.1, float("inf"), -0.0], dtype=torch.float64),
        "half": torch.arange(4, dtype=torch.bfloat16),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "iteration": 12,
        "nested": {"lr": 1e-4, "names": ["a", "b"], "none": None},
    }
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    assert loaded.keys() == content.keys()
    for name in ("tensor", "half", "bytes"):
        assert loaded[name].dtype == content[name].dtype and torch.equal(loaded[name], content[name])
    assert loaded["iteration"] == 12 and loaded["nested"] == content["nested"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"iteration": 1})

    def full_disk(content, file):
        Path(file).write_bytes(b"half a checkpoint")
        raise RuntimeError(
            "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0: c10::ThrowEnforceNotMet"
        )

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError) as caught:
        save_checkpoint(path, {"iteration": 2})
    message = one_line(caught.value)
    assert f"cannot write {path}" in message and "unexpected pos 64 vs 0" in message
    assert "free the disk" in message and "Errno None" not in message
    assert list(tmp_path.iterdir()) == [path] and load_checkpoint(path) == {"iteration": 1}


def test_a_write_that_the_system_refuses_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"iteration": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # files of this process may have 64 KiB
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(path, {"weights": torch.zeros(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {path}" in one_line(caught.value) and "free the disk" in str(caught.value)
    assert list(tmp_path.iterdir()) == [path] and load_checkpoint(path) == {"iteration": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no GPU that PyTorch can use: leave out --device"):
        load_weights(network(), None, "cuda:0")


def test_weights_beside_the_missing_ones_are_named(tmp_path):
    save_weights(tmp_path / "model_small.pt", {}, {})
    with pytest.raises(FileNotFoundError, match=r"name a file with --checkpoint; there is .*model_small\.pt$"):
        load_weights(network(), tmp_path / "model.pt")


def test_missing_weights_name_path_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_weights(network(), tmp_path / "model.pt")
    message = one_line(caught.value)
    assert str(tmp_path / "model.pt") in message and "--checkpoint" in message and "run training" in message


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_called_damaged(tmp_path, share):
    path = tmp_path / "model.pt"
    save_weights(path, network().state_dict(), FACTS)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError) as caught:
        load_weights(network(), path)
    assert str(path) in one_line(caught.value) and "damaged" in str(caught.value) and "replace it" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"<!DOCTYPE html><html>",
        b"\x1f\x8b\x08\x00gz",
        b"\x89PNG\r\n\x1a\n",
        b"version https://git-lfs",
        b"\0" * 400,
    ],
    ids=["text", "html", "gzip", "png", "lfs", "zeros"],
)
def test_a_file_of_something_else_is_called_so(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert str(path) in one_line(caught.value) and "replace it" in str(caught.value)


class Intruder:
    """Unpickled without care, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, legacy):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    if legacy:
        path.write_bytes(pickle.dumps({"model": Intruder(trace)}, protocol=2))
    else:
        torch.save({"model": Intruder(trace)}, path)
    with pytest.raises(ValueError) as caught:
        load_weights(network(), path)
    assert str(path) in one_line(caught.value) and "replace it" in str(caught.value)
    assert not trace.exists()


def test_what_is_no_dict_is_named(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "model.pt")
    with pytest.raises(ValueError) as caught:
        load_checkpoint(tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in one_line(caught.value) and "list" in str(caught.value)


def test_weights_of_another_bundle_are_called_by_its_name(tmp_path):
    save_weights(tmp_path / "model.pt", nn.Linear(3, 4).state_dict(), {"bundle": "abdominal_ct_spade", "iteration": 5})
    with pytest.raises(ValueError) as caught:
        load_weights(network(), tmp_path / "model.pt")
    message = one_line(caught.value)
    assert "abdominal_ct_spade" in message and str(tmp_path / "model.pt") in message and "--checkpoint" in message


def test_weights_of_another_size_point_at_the_overlay(tmp_path):
    path = tmp_path / "model.pt"
    small, large = network(channels=(8, 8)), network(channels=(8, 16))
    save_weights(path, small.state_dict(), FACTS)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(large, path)
    message = one_line(caught.value)
    assert FACTS["bundle"] in message and str(path) in message and "small.yaml" in message
    assert_equal_states(before, large.state_dict())  # nothing half-loaded


def test_weights_of_another_size_without_facts_are_refused_in_one_line(tmp_path):
    torch.save(network(channels=(8, 8)).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError) as caught:
        load_weights(network(channels=(8, 16)), tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in one_line(caught.value)


def test_a_training_checkpoint_given_as_weights_is_refused_in_one_line(tmp_path):
    trained = network()
    content = {"network": trained.state_dict(), "ema": trained.state_dict(), "iteration": 3}
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    with pytest.raises(ValueError) as caught:
        load_weights(network(), tmp_path / "checkpoint.pt")
    assert str(tmp_path / "checkpoint.pt") in one_line(caught.value)


def make_bundle(folder: Path) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text("{}")
    return folder


def test_bundle_root_is_where_monai_put_it_and_not_the_working_directory(tmp_path, monkeypatch):
    here, there = make_bundle(tmp_path / "working directory"), make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(here)
    for first in (str(here), ""):
        monkeypatch.setattr(sys, "path", [first, str(there), *sys.path[1:]])
        assert bundle_root() == str(there)


def test_bundle_root_is_absolute_wherever_the_user_goes(tmp_path, monkeypatch):
    there = make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "bundle", *sys.path[1:]])
    assert bundle_root() == str(there)


def test_bundle_root_without_monai_is_the_folder_above_the_package(tmp_path, monkeypatch):
    copy = make_bundle(tmp_path / "bundle") / "scripts" / "bundle.py"
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    monkeypatch.setattr(bundle, "__file__", str(copy))
    assert bundle_root() == str(tmp_path / "bundle")


def test_bundle_root_is_that_of_the_workflow_that_asks(tmp_path, monkeypatch):
    """Whichever of two ran last, is on `sys.path` first, or runs the other in the midst of its own run."""
    one, other = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "other")
    workflows = {}
    for root in (one, other):
        (root / "configs" / "ask.yaml").write_text(
            "bundle_root: {_target_: common.bundle.bundle_root}\n"
            "first: null\n"
            "run: ['$@first() if @first else None', $@bundle_root]\n"
        )
        config = str(root / "configs" / "ask.yaml")
        workflows[root] = ConfigWorkflow(config_file=config, workflow_type="infer", logging_file=False)
    monkeypatch.setattr(sys, "path", ["", str(other), *sys.path[1:]])
    for root in (one, other, one):
        workflows[root].initialize()
        assert workflows[root].bundle_root == str(root)
    for root in (one, other, one):
        workflows[root].initialize()
        assert workflows[root].run() == [None, str(root)]
    workflows[one].parser["first"] = workflows[other].run
    workflows[one].initialize()
    assert workflows[one].run() == [[None, str(other)], str(one)]


def test_bundle_root_of_a_config_outside_a_bundle_is_on_the_path(tmp_path, monkeypatch):
    there = make_bundle(tmp_path / "bundle")
    config = tmp_path / "mine.yaml"
    config.write_text("run: [{_target_: common.bundle.bundle_root}]\n")
    monkeypatch.setattr(sys, "path", ["", str(there), *sys.path[1:]])
    made = ConfigWorkflow(config_file=str(config), workflow_type=None, logging_file=False)
    made.initialize()
    assert made.run() == [str(there)]


def test_weights_of_slices_of_another_size_are_refused(tmp_path):
    save_weights(tmp_path / "model.pt", network(seed=0).state_dict(), FACTS | {"image_size": 64})
    load_weights(network(seed=1), tmp_path / "model.pt", image_size=64)
    load_weights(network(seed=1), tmp_path / "model.pt")  # training may begin with them
    with pytest.raises(ValueError, match=r"trained on slices of 64x64: give --image_size 64, not 256$"):
        load_weights(network(seed=1), tmp_path / "model.pt", image_size=256)
    torch.save(network(seed=0).state_dict(), tmp_path / "plain.pt")
    load_weights(network(seed=1), tmp_path / "plain.pt", image_size=256)  # unknown size


def test_halving_leaves_counters_alone_and_refuses_what_float16_cannot_hold(tmp_path, monkeypatch, capsys):
    norm = torch.nn.BatchNorm2d(2)
    norm.num_batches_tracked.fill_(977_600)
    monkeypatch.setattr(sys, "argv", ["bundle", str(tmp_path / "model.pt"), str(tmp_path / "half.pt")])
    save_weights(tmp_path / "model.pt", norm.state_dict(), FACTS)
    bundle.main()
    assert load_weights(torch.nn.BatchNorm2d(2), tmp_path / "half.pt").num_batches_tracked == 977_600
    norm.running_var.fill_(7e4)
    save_weights(tmp_path / "model.pt", norm.state_dict(), FACTS)
    (tmp_path / "half.pt").unlink()
    with pytest.raises(SystemExit):
        bundle.main()
    assert "running_var holds values that float16 can't" in capsys.readouterr().err
    assert not (tmp_path / "half.pt").exists()


def test_halved_weights_are_the_weights_to_float16(tmp_path, monkeypatch):
    saved, loaded = network(seed=0), network(seed=1)
    save_weights(tmp_path / "model.pt", saved.state_dict(), FACTS)
    monkeypatch.setattr(sys, "argv", ["bundle", str(tmp_path / "model.pt"), str(tmp_path / "half.pt")])
    bundle.main()
    load_weights(loaded, tmp_path / "half.pt")
    expected = {name: value.half().float() for name, value in saved.state_dict().items()}
    assert_equal_states(expected, loaded.state_dict())
    assert torch.load(tmp_path / "half.pt", weights_only=True)["facts"] == FACTS
    assert (tmp_path / "half.pt").stat().st_size < 0.7 * (tmp_path / "model.pt").stat().st_size
