"""SPADE (Park et al. 2019, arXiv 1903.07291): its generator, its discriminator, and the blocks that OASIS shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ..labels import NUM_CLASSES
from ..transforms import one_hot
from .modulation import SpatialModulation, modulate
from .sizes import check_halvable

SLOPE = 0.2
"""Of every leaky ReLU."""

WIDEST = 512
"""Most channels of a discriminator's layer (their appendix A)."""


def initialise(conv: nn.Conv2d) -> None:
    """Start a convolution with Xavier's normal weights, gain 0.02, and zero bias."""
    nn.init.xavier_normal_(conv.weight, gain=0.02)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def initialise_plain(network: nn.Module) -> None:
    """Start all convolutions of a network but the spectral ones, which did it when they were made."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            initialise(module)


class SpectralConv2d(nn.Conv2d):
    """Convolution whose weight is divided by its largest singular value (Miyato et al. 2018, arXiv 1802.05957).

    Each forward in training mode improves the estimate of that value by one power iteration; in evaluation it stays.
    The weight is (out, in · kernel) as a matrix.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Before the normalisation, whose first estimate is of the weight it finds.
        initialise(self)
        spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H', W')."""
        # Autocast on a GPU would run the power iteration's products in half precision.
        with torch.autocast("cuda", enabled=False):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class SPADENorm(nn.Module):
    """BatchNorm whose scale and shift differ from pixel to pixel with the condition (their equation 1).

    Args:
        map_channels: channels of the condition.
        channels: channels of the features.
    """

    def __init__(self, map_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.modulation = SpatialModulation(map_channels, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features (B, channels, h, w) and condition (B, map_channels, H, W) to (B, channels, h, w)."""
        return modulate(self.norm(x), *self.modulation(condition, x.shape[2:]))


class SPADEResBlock(nn.Module):
    """Residual block of the generators (their figure 4): twice SPADE norm, leaky ReLU and conv3x3.

    Where the width changes, the shortcut is a SPADE norm and a 1x1 conv without bias. All convs but those of the norms
    are spectral.

    Args:
        map_channels: channels of the condition.
        in_channels: channels that come in.
        out_channels: channels that go out; between the convs it is the smaller of the two.
    """

    def __init__(self, map_channels: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        self.norm1 = SPADENorm(map_channels, in_channels)
        self.conv1 = SpectralConv2d(in_channels, middle, 3, padding=1)
        self.norm2 = SPADENorm(map_channels, middle)
        self.conv2 = SpectralConv2d(middle, out_channels, 3, padding=1)
        self.changes_width = in_channels != out_channels
        if self.changes_width:
            self.shortcut_norm = SPADENorm(map_channels, in_channels)
            self.shortcut = SpectralConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features (B, in, h, w) and condition (B, map_channels, H, W) to (B, out, h, w)."""
        h = self.conv1(F.leaky_relu(self.norm1(x, condition), SLOPE))
        h = self.conv2(F.leaky_relu(self.norm2(h, condition), SLOPE))
        if self.changes_width:
            x = self.shortcut(self.shortcut_norm(x, condition))
        return x + h


class ModulatedGenerator(nn.Module):
    """What the generators of SPADE and OASIS share: SPADE residual blocks from the coarsest level to the finest.

    The condition, resized to the coarsest level, goes through a conv3x3; then come each level's blocks, with nearest
    doubling between levels; then leaky ReLU, conv3x3, tanh.

    Args:
        map_channels: channels of the condition.
        channels: width of each level, finest first; the resolution halves from one to the next.
        blocks: blocks of each level, in the same order; the first of a level takes over from the coarser one.
    """

    def __init__(self, map_channels: int, channels: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        widths = tuple(reversed(channels))
        self.first = nn.Conv2d(map_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for above, width, count in zip((widths[0], *widths[:-1]), widths, reversed(blocks), strict=True):
            inputs = [above] + [width] * (count - 1)
            self.levels.append(nn.ModuleList(SPADEResBlock(map_channels, w, width) for w in inputs))
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)
        initialise_plain(self)

    def generate(self, condition: Tensor) -> Tensor:
        """Condition (B, map_channels, H, W) to slices (B, 1, H, W) in [-1, 1].

        Raises:
            ValueError: a size that can't be halved at every level.
        """
        factor = 2 ** (len(self.levels) - 1)
        check_halvable(condition, factor)
        height, width = condition.shape[2:]
        h = self.first(F.interpolate(condition, size=(height // factor, width // factor), mode="nearest"))
        for index, level in enumerate(self.levels):
            if index:
                h = doubled(h)
            for block in level:
                h = block(h, condition)
        return torch.tanh(self.last(F.leaky_relu(h, SLOPE)))


class SPADEGenerator(ModulatedGenerator):
    """SPADE's generator (their figure 4 and appendix A): the label map alone decides the slice, there is no noise.

    One block a level, two at the second coarsest.

    Args:
        channels: width of each level, finest first; two or more.

    The paper's size has 92,477,761 parameters:

        first conv 157,696, last 577, and
        level       256²       128²        64²         32²         16²          8²
        blocks   915,968  2,010,368  4,911,872  13,565,696  47,277,056  23,638,528
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512, 1024, 1024)) -> None:
        super().__init__(NUM_CLASSES, channels, blocks=(*[1] * (len(channels) - 2), 2, 1))

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the noise of one slice: none."""
        return (0,)

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Label maps (B, 1, H, W) of ids 0...16 to slices (B, 1, H, W) in [-1, 1]; `noise` changes nothing.

        Raises:
            ValueError: a size that can't be halved at every level.
        """
        return self.generate(one_hot(image))


class SPADEDiscriminator(nn.Module):
    """SPADE's discriminator (their appendix A): the same stack of 4x4 convs at several scales, as in pix2pixHD.

    A stack's width doubles from layer to layer, up to 512. Its convs have stride 2 but for the last layer and the
    logits; all have padding 2, so that sizes go from n to n/2 + 1 and then to n + 1. The first layer and the logits are
    plain convs, the others spectral and with InstanceNorm.

    Args:
        channels: width of the first layer.
        num_scales: stacks; each sees the input at half the resolution of the one before.
        num_layers: layers of a stack, without the logits.

    The paper's size has 5,558,402 parameters; each of the two stacks has

        layers 18,496 + 131,072 + 524,288 + 2,097,152, logits 8,193
    """

    def __init__(self, channels: int = 64, num_scales: int = 2, num_layers: int = 4) -> None:
        super().__init__()
        widths = [min(channels * 2**layer, WIDEST) for layer in range(num_layers)]
        self.scales = nn.ModuleList(_stack(widths) for _ in range(num_scales))
        initialise_plain(self)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        """One-hot label maps and slices, concatenated (B, 17 + 1, H, W), to the features of every layer.

        Returns:
            One list a scale, finest first: the layers' features (B, C, h, w), and last the logits (B, 1, h, w).
        """
        outputs = []
        for scale, layers in enumerate(self.scales):
            if scale:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            features = [x]
            for layer in layers:
                features.append(layer(features[-1]))
            outputs.append(features[1:])
        return outputs


def doubled(x: Tensor) -> Tensor:
    """Repeat each pixel twice in both directions."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _stack(widths: Sequence[int]) -> nn.ModuleList:
    layers = [nn.Sequential(nn.Conv2d(NUM_CLASSES + 1, widths[0], 4, stride=2, padding=2), nn.LeakyReLU(SLOPE))]
    strides = [2] * (len(widths) - 2) + [1]
    for above, width, stride in zip(widths, widths[1:], strides, strict=False):
        conv = SpectralConv2d(above, width, 4, stride=stride, padding=2, bias=False)
        layers.append(nn.Sequential(conv, nn.InstanceNorm2d(width), nn.LeakyReLU(SLOPE)))
    layers.append(nn.Conv2d(widths[-1], 1, 4, padding=2))
    return nn.ModuleList(layers)
