"""Spatially-adaptive modulation (Park et al. 2019, arXiv 1903.07291): what SPADE, OASIS and SDM share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN_CHANNELS = 128


class SpatialModulation(nn.Module):
    """γ and β of every pixel, computed from a map of the condition (their figure 2).

    The map is resized to the features' size (nearest), then conv3x3 to 128 channels and ReLU, then a conv3x3 for each
    of γ and β.

    Args:
        map_channels: channels of the condition.
        channels: channels of the features to modulate.
    """

    def __init__(self, map_channels: int, channels: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(map_channels, HIDDEN_CHANNELS, 3, padding=1)
        self.gamma = nn.Conv2d(HIDDEN_CHANNELS, channels, 3, padding=1)
        self.beta = nn.Conv2d(HIDDEN_CHANNELS, channels, 3, padding=1)

    def forward(self, condition: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Condition (B, map_channels, H, W) to γ and β, (B, channels, *size) each."""
        hidden = F.relu(self.shared(F.interpolate(condition, size=tuple(size), mode="nearest")))
        return self.gamma(hidden), self.beta(hidden)


def modulate(normalised: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Scale and shift normalised features (B, C, H, W): x · (1 + γ) + β (their equation 1)."""
    return torch.addcmul(normalised + beta, normalised, gamma)
