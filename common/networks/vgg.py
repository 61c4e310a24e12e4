"""VGG19 (Simonyan & Zisserman 2015, arXiv 1409.1556) as a ruler for pictures: what the perceptual loss compares."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from ..bundle import load_checkpoint

BLOCKS = ((0, 2), (5, 7), (10, 12, 14, 16), (19, 21, 23, 25), (28,))
"""Numbers of the convs in torchvision's `vgg19().features` up to relu5_1; max pooling stands between the blocks."""


class VGG19(nn.Module):
    """The convs of VGG19 up to relu5_1, frozen; names are torchvision's, widths those of the weights.

    Args:
        weights: state dict in torchvision's layout (`features.0.weight`, ...); what lies deeper is left out.

    Raises:
        ValueError: convs of VGG19 are missing, or don't follow one another.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        numbers = [number for block in BLOCKS for number in block]
        names = [f"features.{number}.{kind}" for number in numbers for kind in ("weight", "bias")]
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"no VGG19 ({len(missing)} tensors are missing, such as {missing[0]})")
        self.features = nn.ModuleDict()
        above = 3
        for number in numbers:
            shape = tuple(weights[f"features.{number}.weight"].shape)
            if shape[1:] != (above, 3, 3):
                raise ValueError(f"no VGG19 (features.{number}.weight is {shape}, not (…, {above}, 3, 3))")
            self.features[str(number)] = nn.Conv2d(above, shape[0], 3, padding=1)
            above = shape[0]
        self.load_state_dict({name: weights[name] for name in names})
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str | os.PathLike) -> VGG19:
        """Read torchvision's file of VGG19 weights.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or holds other weights.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no VGG19 weights at {path}: name torchvision's file, or leave vgg_weights out")
        weights = load_checkpoint(path)
        try:
            return cls(weights)
        except ValueError as error:
            raise ValueError(f"{path} holds {error}: name torchvision's file, or leave vgg_weights out") from error

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) to relu1_1, relu2_1, ... relu5_1: (B, 64, H, W), ... (B, 512, H/16, W/16)."""
        maps = []
        for block in BLOCKS:
            if maps:
                x = F.max_pool2d(x, 2)
            for number in block:
                x = F.relu(self.features[str(number)](x))
                if number == block[0]:
                    maps.append(x)
        return maps
