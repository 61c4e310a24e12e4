"""The Inception against a forward pass written by hand over a state dict of pytorch-fid's layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from common.networks import inception
from common.networks.inception import Inception

A = (
    *("1x1 64 1x1", "5x5_1 48 1x1", "5x5_2 64 5x5"),
    *("3x3dbl_1 64 1x1", "3x3dbl_2 96 3x3", "3x3dbl_3 96 3x3", "_pool P 1x1"),
)
B = ("3x3 384 3x3", "3x3dbl_1 64 1x1", "3x3dbl_2 96 3x3", "3x3dbl_3 96 3x3")
C = (
    *("1x1 192 1x1", "7x7_1 W 1x1", "7x7_2 W 1x7", "7x7_3 192 7x1", "7x7dbl_1 W 1x1", "7x7dbl_2 W 7x1"),
    *("7x7dbl_3 W 1x7", "7x7dbl_4 W 7x1", "7x7dbl_5 192 1x7", "_pool 192 1x1"),
)
D = ("3x3_1 192 1x1", "3x3_2 320 3x3", "7x7x3_1 192 1x1", "7x7x3_2 192 1x7", "7x7x3_3 192 7x1", "7x7x3_4 192 3x3")
E = (
    *("1x1 320 1x1", "3x3_1 384 1x1", "3x3_2a 384 1x3", "3x3_2b 384 3x1", "3x3dbl_1 448 1x1", "3x3dbl_2 384 3x3"),
    *("3x3dbl_3a 384 1x3", "3x3dbl_3b 384 3x1", "_pool 192 1x1"),
)
"""The convolutions of each kind of block, written down from the public file: branch, channels, kernel."""

STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
}
BLOCKS = {
    "Mixed_5b": (A, 192, 32),
    "Mixed_5c": (A, 256, 64),
    "Mixed_5d": (A, 288, 64),
    "Mixed_6a": (B, 288, None),
    "Mixed_6b": (C, 768, 128),
    "Mixed_6c": (C, 768, 160),
    "Mixed_6d": (C, 768, 160),
    "Mixed_6e": (C, 768, 192),
    "Mixed_7a": (D, 768, None),
    "Mixed_7b": (E, 1280, None),
    "Mixed_7c": (E, 2048, None),
}


def conv_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of every convolution's weight by name."""
    shapes = dict(STEM)
    for block, (convs, inputs, width) in BLOCKS.items():
        previous, channels = "", inputs
        for conv in convs:
            branch, out, kernel = conv.split()
            out = width if out in "PW" else int(out)
            number = branch.rpartition("_")[2]
            # The first of a branch takes the block's input, the others what the one before gave; "b" what "a" took.
            if number in ("1", "pool") or "_" not in branch:
                channels = inputs
            elif number.endswith("b"):
                channels = shapes[f"{block}.branch{previous}"][1]
            else:
                channels = shapes[f"{block}.branch{previous}"][0]
            shapes[f"{block}.branch{branch}"] = (out, channels, *map(int, kernel.split("x")))
            previous = branch
    return shapes


def random_weights(batches_tracked: bool = True) -> dict[str, torch.Tensor]:
    """A state dict of pytorch-fid's layout in which every number counts."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in conv_shapes().items():
        spread = math.sqrt(2 / math.prod(shape[1:]))
        weights[f"{name}.conv.weight"] = spread * torch.randn(shape, generator=generator)
        for kind, low, high in (("weight", 0.5, 1.5), ("bias", -0.2, 0.5), ("running_mean", -0.3, 0.3)):
            weights[f"{name}.bn.{kind}"] = low + (high - low) * torch.rand(shape[0], generator=generator)
        weights[f"{name}.bn.running_var"] = 0.5 + torch.rand(shape[0], generator=generator)
        if batches_tracked:
            weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    weights["fc.weight"] = torch.randn(1008, 2048, generator=generator)
    weights["fc.bias"] = torch.randn(1008, generator=generator)
    return weights


class ByHand:
    """The features as plain arithmetic on a state dict."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, same: bool = True) -> torch.Tensor:
        kernel, norm = self.weights[f"{name}.conv.weight"], f"{name}.bn."
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2) if same else 0
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        mean, variance, scale, shift = (
            self.weights[norm + kind].view(1, -1, 1, 1) for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / torch.sqrt(variance + 0.001) * scale + shift).clamp(min=0)

    def chain(self, x: torch.Tensor, *names: str) -> torch.Tensor:
        for name in names:
            x = self.conv(name, x)
        return x

    @staticmethod
    def average(x: torch.Tensor) -> torch.Tensor:
        """Mean over the neighbours that exist."""
        ones = torch.ones_like(x[:1, :1])
        total, count = (F.pad(v, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).sum(dim=(-2, -1)) for v in (x, ones))
        return total / count

    @staticmethod
    def maximum(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1).amax(dim=(-2, -1))

    @staticmethod
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax(dim=(-2, -1))

    def a(self, b: str, x: torch.Tensor) -> torch.Tensor:
        b += ".branch"
        return torch.cat(
            [
                self.chain(x, b + "1x1"),
                self.chain(x, b + "5x5_1", b + "5x5_2"),
                self.chain(x, b + "3x3dbl_1", b + "3x3dbl_2", b + "3x3dbl_3"),
                self.chain(self.average(x), b + "_pool"),
            ],
            dim=1,
        )

    def c(self, b: str, x: torch.Tensor) -> torch.Tensor:
        b += ".branch"
        return torch.cat(
            [
                self.chain(x, b + "1x1"),
                self.chain(x, *(f"{b}7x7_{i}" for i in range(1, 4))),
                self.chain(x, *(f"{b}7x7dbl_{i}" for i in range(1, 6))),
                self.chain(self.average(x), b + "_pool"),
            ],
            dim=1,
        )

    def e(self, b: str, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        b += ".branch"
        single = self.chain(x, b + "3x3_1")
        double = self.chain(x, b + "3x3dbl_1", b + "3x3dbl_2")
        return torch.cat(
            [
                self.chain(x, b + "1x1"),
                self.conv(b + "3x3_2a", single),
                self.conv(b + "3x3_2b", single),
                self.conv(b + "3x3dbl_3a", double),
                self.conv(b + "3x3dbl_3b", double),
                self.chain(pooled, b + "_pool"),
            ],
            dim=1,
        )

    def __call__(self, rgb: torch.Tensor) -> torch.Tensor:
        x = resized(rgb) * 2 - 1
        x = self.conv("Conv2d_1a_3x3", x, stride=2, same=False)
        x = self.conv("Conv2d_2b_3x3", self.conv("Conv2d_2a_3x3", x, same=False))
        x = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", self.halve(x)), same=False)
        x = self.halve(x)
        for letter in "bcd":
            x = self.a(f"Mixed_5{letter}", x)
        b = "Mixed_6a.branch"
        double = self.conv(b + "3x3dbl_3", self.chain(x, b + "3x3dbl_1", b + "3x3dbl_2"), stride=2, same=False)
        x = torch.cat([self.conv(b + "3x3", x, stride=2, same=False), double, self.halve(x)], dim=1)
        for letter in "bcde":
            x = self.c(f"Mixed_6{letter}", x)
        b = "Mixed_7a.branch"
        threes = self.conv(b + "3x3_2", self.chain(x, b + "3x3_1"), stride=2, same=False)
        sevens = self.chain(x, *(f"{b}7x7x3_{i}" for i in range(1, 4)))
        sevens = self.conv(b + "7x7x3_4", sevens, stride=2, same=False)
        x = torch.cat([threes, sevens, self.halve(x)], dim=1)
        x = self.e("Mixed_7b", x, self.average(x))
        x = self.e("Mixed_7c", x, self.maximum(x))
        assert x.shape[1:] == (2048, 8, 8)
        return x.flatten(2).mean(dim=2)


def resized(x: torch.Tensor) -> torch.Tensor:
    """To 299x299 by two matrices: pixel i's centre lies at (i + 1/2) · side/299 − 1/2, between two pixels there."""

    def matrix(side: int) -> torch.Tensor:
        weights = torch.zeros(299, side)
        for i in range(299):
            place = min(max((i + 0.5) * side / 299 - 0.5, 0), side - 1)
            low = int(place)
            weights[i, low] += 1 - (place - low)
            weights[i, min(low + 1, side - 1)] += place - low
        return weights

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(weights, file)
    return file


@pytest.fixture(scope="module")
def network(path) -> Inception:
    return Inception.load(path)


def test_layout_is_that_of_the_public_file(weights):
    """94 convolutions; 21,785,568 numbers in them and their norms, 2,065,392 in the classifier."""
    with torch.device("meta"):
        network = Inception()
    assert {name: tuple(v.shape) for name, v in network.state_dict().items()} == {
        name: tuple(v.shape) for name, v in weights.items()
    }
    assert len(conv_shapes()) == 94
    assert sum(p.numel() for p in network.parameters()) == 21_785_568 + 2_065_392


def test_features_are_those_of_the_same_arithmetic_by_hand(network, weights):
    """A slice that is enlarged to 299 one way and shrunk the other."""
    pictures = torch.rand(1, 1, 180, 340, generator=torch.Generator().manual_seed(1))
    features = network(pictures)
    expected = ByHand(weights)(pictures.repeat(1, 3, 1, 1))
    assert features.shape == (1, 2048)
    assert expected.std() > 0.1 * expected.abs().mean() > 0  # neither dead nor all the same
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_colour_is_taken_as_it_is_and_grey_as_three_equal_channels(network):
    grey = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(2))
    colour = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    of_grey, of_three, of_colour = network(torch.cat([grey.expand(-1, 3, -1, -1), grey.repeat(1, 3, 1, 1), colour]))
    torch.testing.assert_close(network(grey)[0], of_grey)
    torch.testing.assert_close(of_grey, of_three)
    assert (of_colour - of_grey).abs().max() > 1e-2 * of_grey.abs().max()


def test_nothing_in_it_learns(network):
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_files_from_before_batches_were_counted_fit(weights, tmp_path, network):
    """PyTorch before 0.4.1 had no `num_batches_tracked`; its state dicts say so by having no version."""
    torch.save({name: v for name, v in weights.items() if "num_batches" not in name}, tmp_path / "old.pth")
    loaded = Inception.load(tmp_path / "old.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_other_weights_are_refused_with_the_way_out(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*none\.pth: give a copy of https://.*null"):
        Inception.load(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("<html>")
    small = {name: torch.zeros(()).expand(v.shape) for name, v in weights.items()}
    torch.save({name: v for name, v in small.items() if "7c" not in name}, tmp_path / "shorter.pth")
    torch.save(small | {"fc.weight": torch.zeros(()).expand(1000, 2048)}, tmp_path / "torchvision.pth")
    for name in ("text.pth", "shorter.pth", "torchvision.pth"):
        with pytest.raises(ValueError, match=rf"^.*{name} holds no weights of the Inception: give a copy of https:.*$"):
            Inception.load(tmp_path / name)


def test_without_a_path_the_public_file_is_downloaded(path, monkeypatch, network):
    asked = []
    monkeypatch.setattr(inception, "download", lambda *args, **options: asked.append((args, options)) or path)
    loaded = Inception.load()
    assert torch.equal(loaded.fc.weight, network.fc.weight)
    [((url, digest), options)] = asked
    assert url.startswith("https://github.com/mseitzer/pytorch-fid/releases/download/")
    # torch.hub's convention: the file's name ends with the beginning of its SHA-256
    assert len(digest) == 64 and url.endswith(f"-{digest[:8]}.pth") and options["option"]
