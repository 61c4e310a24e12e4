"""The Inception network whose features FID compares (Heusel et al. 2017, arXiv 1706.08500).

It is that of Szegedy et al. 2015 (arXiv 1512.00567) as TensorFlow's `inception-2015-12-05` has it: averages leave the
padding out, and the last block pools by maximum where the paper has an average. Names and shapes are those of
pytorch-fid's file of weights, a port of TensorFlow's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bundle import load_checkpoint
from ..download import download

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

SIDE = 299
"""Rows and columns of the pictures that the network was trained with."""

Conv = tuple[int, int | tuple[int, int]]
"""Output channels and kernel of a convolution."""

average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)

ROW, COLUMN = (1, 7), (7, 1)
CROSS = ((384, (1, 3)), (384, (3, 1)))


class ConvNormReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: str = "valid",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, in_channels, H, W) to (B, out_channels, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, concatenated in the order of the table; the last of them pools.

    Args:
        in_channels: channels of the input.
        branches: by name, the convolutions one after the other. A pair of them works side by side.
        pool: of the last branch. With `halving_pool` each branch ends with a convolution of stride 2 as well.
        pool_channels: output channels of a 1x1 convolution after the pooling; 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        branches: Mapping[str, Sequence[Conv | tuple[Conv, Conv]]],
        pool: Callable[[Tensor], Tensor],
        pool_channels: int = 0,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.pool_channels = pool_channels
        self.names: list[list[list[str]]] = []  # by branch, stage and side
        for branch, stages in branches.items():
            width = in_channels
            self.names.append([])
            for number, stage in enumerate(stages, start=1):
                name = f"{branch}_{number}" if len(stages) > 1 else branch
                sides = {f"{name}a": stage[0], f"{name}b": stage[1]} if stage is CROSS else {name: stage}
                halves = pool is halving_pool and number == len(stages)
                stride, padding = (2, "valid") if halves else (1, "same")
                for side, (channels, kernel) in sides.items():
                    self.add_module(side, ConvNormReLU(width, channels, kernel, stride, padding))
                self.names[-1].append(list(sides))
                width = sum(channels for channels, _ in sides.values())
        if pool_channels:
            self.branch_pool = ConvNormReLU(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, in_channels, H, W) to (B, out_channels, H', W')."""
        outputs = []
        for branch in self.names:
            h = x
            for sides in branch:
                h = torch.cat([getattr(self, side)(h) for side in sides], dim=1)
            outputs.append(h)
        pooled = self.pool(x)
        outputs.append(self.branch_pool(pooled) if self.pool_channels else pooled)
        return torch.cat(outputs, dim=1)


def _grid_35(in_channels: int, pool_channels: int) -> Mixed:
    branches = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return Mixed(in_channels, branches, average_pool, pool_channels)


def _from_35_to_17(in_channels: int) -> Mixed:
    branches = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return Mixed(in_channels, branches, halving_pool)


def _grid_17(in_channels: int, width: int) -> Mixed:
    branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, ROW), (192, COLUMN)],
        "branch7x7dbl": [(width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)],
    }
    return Mixed(in_channels, branches, average_pool, 192)


def _from_17_to_8(in_channels: int) -> Mixed:
    branches = {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3)]}
    return Mixed(in_channels, branches, halving_pool)


def _grid_8(in_channels: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), CROSS],
        "branch3x3dbl": [(448, 1), (384, 3), CROSS],
    }
    return Mixed(in_channels, branches, pool, 192)


class Inception(nn.Module):
    """Pictures to the 2,048 features after the last pooling (`pool3`), frozen.

    Grey pictures go in as R = G = B. Every picture is resized to 299x299, bilinear without antialiasing, and scaled
    from [0, 1] to [-1, 1], as pytorch-fid does. `fc`, the classifier behind the features, is there for the file's sake.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding="same")
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
        self.Mixed_5b = _grid_35(192, 32)
        self.Mixed_5c = _grid_35(256, 64)
        self.Mixed_5d = _grid_35(288, 64)
        self.Mixed_6a = _from_35_to_17(288)
        self.Mixed_6b = _grid_17(768, 128)
        self.Mixed_6c = _grid_17(768, 160)
        self.Mixed_6d = _grid_17(768, 160)
        self.Mixed_6e = _grid_17(768, 192)
        self.Mixed_7a = _from_17_to_8(768)
        self.Mixed_7b = _grid_8(1280, average_pool)
        self.Mixed_7c = _grid_8(2048, maximum_pool)
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str | os.PathLike | None = None) -> Inception:
        """Read pytorch-fid's file of weights; without a path it is downloaded, once.

        Raises:
            FileNotFoundError: no such file.
            OSError: the download fails; the message says what to do offline.
            ValueError: the file is damaged or holds other weights.
        """
        if path is None:
            path = download(URL, SHA256, option="inception_weights")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no Inception weights at {path}: give a copy of {URL}, or null to download it")
        network = cls()
        try:
            network.load_state_dict(load_checkpoint(path))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} holds no weights of the Inception: give a copy of {URL}") from error
        return network

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 1 or 3, H, W) in [0, 1] to features (B, 2048)."""
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = (2 * x - 1).expand(-1, 3, -1, -1)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halving_pool(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))
