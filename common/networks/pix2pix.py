"""pix2pix's generator (Isola et al. 2017, arXiv 1611.07004); its discriminator is MONAI's `PatchDiscriminator`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.utils import normal_init
from torch import Tensor, nn

from ..labels import NUM_CLASSES
from ..transforms import one_hot
from .sizes import check_halvable


class Pix2PixGenerator(nn.Module):
    """The U-Net "unet_256" of the authors' PyTorch code, whose only source of noise is dropout (their §3.2).

    A level halves the size on the way down (conv4x4 of stride 2) and doubles it on the way up (its transpose), where
    it takes what came from below beside what it made itself on the way down. BatchNorm follows every conv but the
    first, the innermost one down and the last.

    Dropout stands behind the way up of the inner half of the levels that are neither outermost nor innermost: three of
    eight, one of four or three, none of two. (The paper's appendix has it one level further in.) It works in training
    and inference alike: each element is dropped, or kept and doubled, by the sign of a standard normal number.

    Args:
        channels: width of each level, finest first; the first has half the size of the slice.
        dropout: False switches the noise off; weights are the same.

    The paper's size has 54,424,193 parameters.
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512, 512, 512, 512, 512), dropout: bool = True) -> None:
        super().__init__()
        self.channels = tuple(channels)
        innermost = len(channels) - 1
        between = range(1, innermost)
        self.dropped = between[len(between) // 2 :] if dropout else range(0)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(channels):
            down = nn.Conv2d(channels[level - 1] if level else NUM_CLASSES, width, 4, 2, 1, bias=False)
            inside = width if level == innermost else 2 * width
            if level == 0:
                self.downs.append(down)
                self.ups.append(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(inside, 1, 4, 2, 1), nn.Tanh()))
                continue
            above = channels[level - 1]
            norm = nn.Identity() if level == innermost else nn.BatchNorm2d(width)
            up = nn.ConvTranspose2d(inside, above, 4, 2, 1, bias=False)
            self.downs.append(nn.Sequential(nn.LeakyReLU(0.2), down, norm))
            self.ups.append(nn.Sequential(nn.ReLU(), up, nn.BatchNorm2d(above)))
        self.apply(normal_init)  # N(0, 0.02), in BatchNorm N(1, 0.02)

    def noise_shape(self, height: int, width: int) -> tuple[int]:
        """Standard normal numbers that a slice of this size needs: one for each element that can be dropped."""
        return (sum(self.channels[level - 1] * (height >> level) * (width >> level) for level in self.dropped),)

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Make CT slices.

        Args:
            image: label map (B, 1, H, W), ids 0...16.
            noise: standard normal (B, *noise_shape(H, W)); drawn when None.

        Returns:
            (B, 1, H, W) in [-1, 1].

        Raises:
            ValueError: a size that can't be halved at every level.
        """
        check_halvable(image, 2 ** len(self.channels))
        if noise is None:
            # As torch.randn; a trace would keep its device, and len(image), as constants.
            shape = image.shape[0], *self.noise_shape(*image.shape[2:])
            noise = image.new_empty(shape, dtype=torch.float32).normal_()

        x, skips = one_hot(image), []
        for down in self.downs:
            x = down(x)
            skips.append(x)
        innermost = len(skips) - 1
        for level in range(innermost, -1, -1):
            x = self.ups[level](x if level == innermost else torch.cat([skips[level], x], dim=1))
            if level in self.dropped:
                numbers, noise = noise.tensor_split([x[0].numel()], dim=1)
                x = 2 * x * (numbers.reshape(x.shape) > 0)
        return x
