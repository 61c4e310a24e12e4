"""Spatially-adaptive modulation by hand, with given weights."""

from __future__ import annotations

import torch

from common.networks.modulation import SpatialModulation, modulate


def modulation() -> SpatialModulation:
    """γ = 2 relu(map_0 - 3 map_1 - 3) + 1, and β = half of the same relu one pixel to the right, - 4."""
    module = SpatialModulation(2, 1)
    for parameter in module.parameters():
        parameter.data.zero_()
    module.shared.weight.data[0, 0, 1, 1] = 1
    module.shared.weight.data[0, 1, 1, 1] = -3
    module.shared.bias.data[0] = -3
    module.gamma.weight.data[0, 0, 1, 1] = 2
    module.gamma.bias.data[0] = 1
    module.beta.weight.data[0, 0, 1, 2] = 0.5
    module.beta.bias.data[0] = -4
    return module


def condition() -> torch.Tensor:
    """Channel 0 counts the 16 pixels, channel 1 marks pixel 8."""
    pixels = torch.arange(16.0).reshape(4, 4)
    return torch.stack([pixels, (pixels == 8).float()])[None]


def test_gamma_and_beta_of_a_map_that_is_resized():
    gamma, beta = modulation()(condition(), (2, 2))
    # The nearest pixels are 0, 2, 8, 10. Their relu: 0 - 3, 2 - 3 -> 0, 0; 8 - 3 - 3 = 2; 10 - 3 = 7.
    assert gamma.tolist() == [[[[1, 1], [5, 15]]]]
    assert beta.tolist() == [[[[-4, -4], [-0.5, -4]]]]


def test_sizes_that_are_no_fraction_of_the_maps():
    gamma, _ = modulation()(condition(), (3, 8))
    # Rows floor(i 4/3) = 0, 1, 2; columns floor(j / 2).
    relu = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [2, 6, 7, 8]]).repeat_interleave(2, dim=1)
    assert torch.equal(gamma[0, 0], 2.0 * relu + 1)


def test_one_more_than_gamma_scales_and_beta_shifts():
    x = torch.tensor([[[[1, 2], [-1, 0.5]]]])
    gamma, beta = modulation()(condition(), (2, 2))
    assert modulate(x, gamma, beta).tolist() == [[[[1 * 2 - 4, 2 * 2 - 4], [-1 * 6 - 0.5, 0.5 * 16 - 4]]]]


def test_size_of_the_paper():
    """128 hidden channels: 17·9·128 + 128 and, for each of γ and β, 128·9·64 + 64."""
    assert sum(parameter.numel() for parameter in SpatialModulation(17, 64).parameters()) == 19_712 + 2 * 73_792
