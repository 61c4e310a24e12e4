"""What a network is tested with: small sizes, and weights of which each counts."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

TINY = {"channels": (8, 16, 16), "attention_levels": (False, True, False), "num_res_blocks": 2, "norm_num_groups": 4}
"""Sizes of a denoiser."""

Network = TypeVar("Network", bound=nn.Module)


def randomised(network: Network) -> Network:
    """The network with random weights everywhere: what starts at zero would hide errors behind it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    return network
