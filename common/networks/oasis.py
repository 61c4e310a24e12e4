"""OASIS (Schönfeld et al. 2021, arXiv 2012.04781): a generator with 3D noise, and a discriminator that segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..labels import NUM_CLASSES
from ..transforms import one_hot
from .sizes import check_halvable
from .spade import SLOPE, ModulatedGenerator, SpectralConv2d, doubled, initialise_plain


class OASISGenerator(ModulatedGenerator):
    """OASIS' generator (their §3): SPADE's with one block a level, and noise in the condition.

    A slice's noise vector stands at every pixel, before the one-hot label map, in what goes into the first conv and
    into every norm.

    Args:
        channels: width of each level, finest first.
        noise_channels: length of the noise vector.

    The paper's size has 70,608,705 parameters:

        first conv 747,520, last 577, and
        level         256²       128²        64²         32²         16²          8²
        blocks   1,137,152  2,231,552  5,133,056  13,786,880  23,785,984  23,785,984
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512, 1024, 1024), noise_channels: int = 64) -> None:
        super().__init__(noise_channels + NUM_CLASSES, channels, blocks=[1] * len(channels))
        self.noise_channels = noise_channels

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the noise of one slice, whatever its size."""
        return (self.noise_channels,)

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Label maps and noise to slices.

        Args:
            image: (B, 1, H, W), ids 0...16.
            noise: standard normal (B, noise_channels); drawn when missing.

        Returns:
            (B, 1, H, W) in [-1, 1].

        Raises:
            ValueError: a size that can't be halved at every level.
        """
        labels = one_hot(image)
        if noise is None:
            # As torch.randn; a trace would keep its device, and len(image), as constants.
            noise = image.new_empty(image.shape[0], self.noise_channels, dtype=torch.float32).normal_()
        everywhere = noise[:, :, None, None].expand(-1, -1, *image.shape[2:])
        return self.generate(torch.cat([everywhere, labels], dim=1))


class ResidualBlock(nn.Module):
    """Two conv3x3, and a shortcut that is a 1x1 conv where the width changes; all spectral."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3, padding=1)
        changes_width = in_channels != out_channels
        self.shortcut = SpectralConv2d(in_channels, out_channels, 1) if changes_width else nn.Identity()


class DownBlock(ResidualBlock):
    """Residual block that halves the resolution after its convs, by averaging.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        activate: begin with a leaky ReLU; not for an image, whose sign means something.
    """

    def __init__(self, in_channels: int, out_channels: int, activate: bool = True) -> None:
        super().__init__(in_channels, out_channels)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H/2, W/2)."""
        h = self.conv1(F.leaky_relu(x, SLOPE) if self.activate else x)
        h = self.conv2(F.leaky_relu(h, SLOPE))
        # A 1x1 conv of averages is the average of the 1x1 conv, at a quarter of the price.
        return self.shortcut(F.avg_pool2d(x, 2)) + F.avg_pool2d(h, 2)


class UpBlock(ResidualBlock):
    """Residual block that doubles the resolution before its convs (nearest)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, 2H, 2W)."""
        h = self.conv1(doubled(F.leaky_relu(x, SLOPE)))
        h = self.conv2(F.leaky_relu(h, SLOPE))
        return doubled(self.shortcut(x)) + h


class OASISDiscriminator(nn.Module):
    """OASIS' discriminator (their §3): a U-Net that segments the slice.

    Each pixel gets one logit for "fake" and one for each class that a real pixel can have. Down: one residual block a
    level, each halves the resolution. Up: as many, each doubles it; from the second on they take the output of the
    block before, and beside it the output of the down block of that resolution. Last a plain 1x1 conv.

    Args:
        channels: width of each down block's output. The up blocks have the same widths on the way back, without the
            innermost, and the last has half of the outermost.

    The paper's size has 22,247,634 parameters. Of all that was searched (widths of the up blocks and between a block's
    convs, what is concatenated, biases, learnt shortcuts), only this gives that number:

        block            1          2          3          4          5          6
        down, to      128²        64²        32²        16²         8²         4²
        width          128        128        256        256        512        512
        params     149,120    295,168    918,272  1,180,160  3,671,552  4,719,616
        up, to          8²        16²        32²        64²       128²       256²
        takes          512  512 + 512  256 + 256  256 + 256  128 + 128  128 + 128
        width          512        256        256        128        128         64
        params   4,719,616  3,212,032  1,901,312    803,200    475,520    200,896

        and the last conv 1,170
    """

    def __init__(self, channels: Sequence[int] = (128, 128, 256, 256, 512, 512)) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(
            DownBlock(above, width, activate=index > 0)
            for index, (above, width) in enumerate(zip((1, *channels), channels, strict=False))
        )
        skips = tuple(reversed(channels[:-1]))
        widths = (*skips, channels[0] // 2)
        self.up_blocks = nn.ModuleList(
            UpBlock(below + skip, width)
            for below, skip, width in zip((channels[-1], *skips), (0, *skips), widths, strict=True)
        )
        self.last = nn.Conv2d(widths[-1], 1 + NUM_CLASSES, 1)
        initialise_plain(self)

    def forward(self, x: Tensor) -> Tensor:
        """Slices (B, 1, H, W) in [-1, 1] to logits (B, 1 + 17, H, W): channel 0 is fake, c + 1 is class c.

        Raises:
            ValueError: a size that can't be halved at every level.
        """
        check_halvable(x, 2 ** len(self.down_blocks))
        h, skips = x, []
        for block in self.down_blocks:
            h = block(h)
            skips.append(h)
        h = self.up_blocks[0](skips.pop())
        for block in self.up_blocks[1:]:
            h = block(torch.cat([h, skips.pop()], dim=1))
        return self.last(h)
