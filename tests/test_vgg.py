"""VGG19 for the perceptual loss: torchvision's layout of weights, and a forward pass written by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from common.networks.vgg import VGG19

LAYERS = [1, 1, "pool", 2, 2, "pool", 3, 3, 3, 3, "pool", 4, 4, 4, 4, "pool", 5, 5, 5, 5, "pool"]
"""Configuration E of Simonyan & Zisserman; a number is a conv, and twice its value is its width in these tests."""


def torchvision_layout(seed=0) -> dict[str, torch.Tensor]:
    """A tiny `vgg19().state_dict()`: a conv and its ReLU take a number each, and so does a pooling."""
    random = torch.Generator().manual_seed(seed)
    state, index, above = {}, 0, 3
    for layer in LAYERS:
        if layer == "pool":
            index += 1
            continue
        width = 2 * layer
        state[f"features.{index}.weight"] = torch.randn(width, above, 3, 3, generator=random) / math.sqrt(4.5 * above)
        state[f"features.{index}.bias"] = torch.randn(width, generator=random) / 4
        above, index = width, index + 2
    for number in (0, 3, 6):
        state[f"classifier.{number}.weight"] = torch.zeros(1, 1)
        state[f"classifier.{number}.bias"] = torch.zeros(1)
    return state


def by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Layer by layer; the first map after the input and after each pooling is kept."""
    maps, index, is_first = [], 0, True
    for layer in LAYERS:
        if layer == "pool":
            x, index, is_first = F.max_pool2d(x, 2), index + 1, True
            continue
        x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1).clamp(min=0)
        if is_first:
            maps.append(x)
        index, is_first = index + 2, False
    return maps


def test_maps_are_the_described_arithmetic(tmp_path):
    state = torchvision_layout()
    torch.save(state, tmp_path / "vgg19.pth")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps, expected = VGG19.load(tmp_path / "vgg19.pth")(x), by_hand(state, x)
    assert [m.shape[1:] for m in maps] == [(2, 32, 32), (4, 16, 16), (6, 8, 8), (8, 4, 4), (10, 2, 2)]
    for ours, theirs in zip(maps, expected, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_names_of_tensors_are_torchvisions():
    state = torchvision_layout()
    ours = VGG19(state).state_dict()
    assert list(ours) == [name for name in state if name.startswith("features") and int(name.split(".")[1]) <= 28]
    assert all(torch.equal(value, state[name]) for name, value in ours.items())


def test_half_precision_weights_work_in_float32():
    state = {name: value.half() for name, value in torchvision_layout().items()}
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = by_hand({name: value.float() for name, value in state.items()}, x)
    torch.testing.assert_close(VGG19(state)(x)[-1], expected[-1], atol=1e-5, rtol=1e-5)


def test_frozen_but_transparent_to_gradients():
    network = VGG19(torchvision_layout())
    assert not network.training
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    network(x)[-1].sum().backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def vgg16() -> dict[str, torch.Tensor]:
    """What a file of VGG16 looks like: its fourth pooling takes number 23, so that features.25 isn't there."""
    state = torchvision_layout()
    return {name: value for name, value in state.items() if not name.startswith(("features.16.", "features.25."))}


def other_widths() -> dict[str, torch.Tensor]:
    return torchvision_layout() | {"features.7.weight": torch.zeros(4, 5, 3, 3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (vgg16, r"holds no VGG19 \(4 tensors are missing, such as features.16.weight\): name torchvision's file"),
        (other_widths, r"holds no VGG19 \(features.7.weight is \(4, 5, 3, 3\), not \(…, 4, 3, 3\)\): name torch"),
    ],
)
def test_other_weights_are_refused_in_one_line(tmp_path, content, message):
    torch.save(content(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message) as caught:
        VGG19.load(tmp_path / "other.pth")
    assert str(tmp_path / "other.pth") in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no VGG19 weights at .*nowhere.pth: name torchvision's file"):
        VGG19.load(tmp_path / "nowhere.pth")
