"""SDM's denoiser against its published sizes, and its norm and the whole against arithmetic by hand."""

from __future__ import annotations

import math
from weakref import ref

import pytest
import tiny_networks
import torch
import torch.nn.functional as F
from monai.networks.blocks import SpatialAttentionBlock
from tiny_networks import randomised
from torch.utils.flop_counter import FlopCounterMode

from common.diffusion import GaussianDiffusion
from common.inferers import DiffusionSampler, SliceNoise
from common.networks.modulation import SpatialModulation
from common.networks.sdm import SDMUNet, SPADEGroupNorm
from common.transforms import NO_CONDITION

TINY = {**tiny_networks.TINY, "num_head_channels": 8}
DEFAULT = (256, 256, 512, 512, 1024, 1024)


def batch(seed=1, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, size, size, generator=generator)
    image = torch.randint(0, 17, (2, 1, size, size), generator=generator, dtype=torch.uint8)
    return x, torch.tensor([3, 871]), image


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def modulations(network):
    return [module for module in network.modules() if isinstance(module, SpatialModulation)]


# ----------------------------------------------------------------------------------------------- sizes of the paper


@pytest.mark.parametrize(
    ("options", "parameters", "gmac"),
    [
        ({}, 652_876_290, 1718),
        ({"edges": True}, 652_933_890, 1719),
        ({"channels": [c // 2 for c in DEFAULT]}, 188_813_826, 587),
        ({"channels": [c // 4 for c in DEFAULT]}, 60_370_434, 230),
    ],
)
def test_published_sizes(options, parameters, gmac):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = SDMUNet(**options)
        assert count(network) == parameters
        network(torch.empty(1, 1, 256, 256), torch.empty(1), torch.empty(1, 1, 256, 256, dtype=torch.uint8))
    assert round(counter.get_total_flops() / 2e9) == gmac


@pytest.mark.parametrize(("part", "gigabytes"), [(1, (1.02, 2.04)), (4, (0.25, 0.51))])
def test_the_cache_is_as_large_as_the_docstring_says(part, gigabytes):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = SDMUNet(channels=[c // part for c in DEFAULT])
        pairs = network.encode(torch.empty(1, 1, 256, 256, dtype=torch.uint8))
    numbers = sum(tensor.numel() for pair in pairs for tensor in pair)
    assert tuple(round(size * numbers / 1e9, 2) for size in (2, 4)) == gigabytes
    if part == 1:
        assert sum(map(count, modulations(network))) == 100_162_048
        assert round(counter.get_total_flops() / 2e9) == 599


def test_the_default_attends_at_32_16_8_with_heads_of_64():
    seen = []
    with torch.device("meta"), torch.no_grad():
        network = SDMUNet()
        for module in network.modules():
            if isinstance(module, SpatialAttentionBlock):
                assert module.norm.num_channels // module.attn.num_heads == 64
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
        network(torch.empty(1, 1, 256, 256), torch.empty(1), torch.empty(1, 1, 256, 256, dtype=torch.uint8))
    assert seen == [32] * 2 + [16] * 2 + [8] * 2 + [8] + [8] * 3 + [16] * 3 + [32] * 3


# --------------------------------------------------------------------------------------------------- the arithmetic


def test_spade_norm_with_given_weights():
    norm = SPADEGroupNorm(num_groups=1, num_channels=2, map_channels=3, level=1)
    assert [name.split(".")[0] for name, _ in norm.named_parameters()] == ["modulation"] * 6  # the norm itself has none
    shared, gamma, beta = norm.modulation.shared, norm.modulation.gamma, norm.modulation.beta
    for parameter in norm.parameters():
        parameter.data.zero_()
    shared.weight.data[0, 2, 1, 1] = 2.0  # hidden 0 is 2 where the class is 2
    shared.weight.data[1, 1, 1, 1] = -3.0  # hidden 1 would be -3 where the class is 1: ReLU
    gamma.weight.data[0, 0, 1, 0] = 0.5  # γ of channel 0: half the hidden 0 of the pixel to the left, plus hidden 1
    gamma.weight.data[0, 1, 1, 1] = 7.0
    beta.weight.data[1, 0, 1, 1] = -1.0  # β of channel 1: minus hidden 0
    beta.bias.data[1] = 0.25

    ids = torch.tensor([[2, 0, 0, 0], [0, 0, 0, 0], [1, 2, 2, 0], [1, 1, 1, 1]])  # every second row and column counts
    one_hot = torch.stack([(ids == i).float() for i in range(3)])[None]
    x = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[2.0, 4.0], [6.0, 8.0]]]])
    normalised = (x - 4.5) / math.sqrt(5.25 + 1e-5)  # 1...8: mean 4.5, variance 63/12
    gammas = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    betas = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]], [[-1.75, 0.25], [0.25, -1.75]]]])
    expected = normalised * (1 + gammas) + betas
    torch.testing.assert_close(norm(x, one_hot), expected)
    torch.testing.assert_close(norm(x, (gammas, betas)), expected)


class ByHand:
    """SDM as plain arithmetic on a state dict."""

    def __init__(self, network, edges):
        self.state, self.edges = network.state_dict(), edges

    def of(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def conv(self, name, h):
        weight, bias = self.of(name)
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)

    def normalised(self, h):
        groups = h.unflatten(1, (4, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
        return ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)

    def norm(self, name, h):
        if f"{name}.weight" in self.state:
            weight, bias = self.of(name)
            return self.normalised(h) * weight[:, None, None] + bias[:, None, None]
        every = self.map.shape[2] // h.shape[2]
        hidden = self.conv(f"{name}.modulation.shared", self.map[..., ::every, ::every]).clamp(min=0)
        gamma, beta = (self.conv(f"{name}.modulation.{letter}", hidden) for letter in ("gamma", "beta"))
        return self.normalised(h) * (1 + gamma) + beta

    def block(self, name, h, resample=lambda h: h):
        inner = F.silu(self.norm(f"{name}.norm1", h))
        inner = self.conv(f"{name}.conv1", resample(inner))
        time = F.linear(F.silu(self.time), *self.of(f"{name}.time"))
        width = inner.shape[1]
        scale, shift = time[:, :width, None, None], time[:, width:, None, None]
        inner = F.silu(self.norm(f"{name}.norm2", inner) * (1 + scale) + shift)
        h = resample(h)
        shortcut = self.conv(f"{name}.skip", h) if f"{name}.skip.weight" in self.state else h
        h = shortcut + self.conv(f"{name}.conv2", inner)
        return self.attention(f"{name}.attention", h) if f"{name}.attention.norm.weight" in self.state else h

    def attention(self, name, h):
        tokens = self.norm(f"{name}.norm", h).flatten(2).mT
        mixed = []
        for head in (slice(0, 8), slice(8, 16)):
            q, k, v = (F.linear(tokens, *self.of(f"{name}.attn.to_{letter}"))[..., head] for letter in "qkv")
            mixed.append((q @ k.mT / math.sqrt(8)).softmax(-1) @ v)
        return h + F.linear(torch.cat(mixed, -1), *self.of(f"{name}.attn.out_proj")).mT.reshape(h.shape)

    def __call__(self, x, timesteps, image):
        channels = [(image == i).float() for i in range(17)]
        if self.edges:
            padded = F.pad(image.float(), (1, 1, 1, 1), mode="replicate")
            neighbours = [padded[..., i : i + 16, j : j + 16] for i, j in ((0, 1), (2, 1), (1, 0), (1, 2))]
            channels.append(torch.stack([n != image for n in neighbours]).any(0).float())
        self.map = torch.cat(channels, 1)
        angles = timesteps[:, None] * 10000 ** (-torch.arange(4) / 4)
        time = F.linear(torch.cat([angles.cos(), angles.sin()], 1), *self.of("time_embed.0"))
        self.time = F.linear(F.silu(time), *self.of("time_embed.2"))

        h = self.conv("conv_in", x)
        skips = [h]
        for index in range(8):  # two blocks a level, and a third that halves
            halve = index in (2, 5)
            h = self.block(f"encoder.{index}", h, *[lambda h: F.avg_pool2d(h, 2)] * halve)
            skips.append(h)
        h = self.block("middle.1", self.block("middle.0", h))
        for index in range(11):  # three blocks a level, and a fourth that doubles
            if index in (3, 7):
                h = self.block(f"decoder.{index}", h, lambda h: h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            else:
                h = self.block(f"decoder.{index}", torch.cat([h, skips.pop()], 1))
        assert not skips
        return self.conv("out.2", F.silu(self.norm("out.0", h)))


@pytest.mark.parametrize("edges", [False, True])
def test_sdm_is_the_described_arithmetic(edges):
    x, t, image = batch()
    network = randomised(SDMUNet(edges=edges, **TINY))
    by_hand = ByHand(network, edges)
    torch.testing.assert_close(network(x, t, image), by_hand(x, t, image), atol=1e-5, rtol=1e-5)
    has_spade = {name.split(".")[0] for name, module in network.named_modules() if isinstance(module, SPADEGroupNorm)}
    has_plain = {name.split(".")[0] for name in network.state_dict() if ".norm1.weight" in name}
    assert (has_spade, has_plain) == ({"middle", "decoder"}, {"encoder"})


def test_the_encoder_does_not_see_the_label_map():
    x, t, image = batch()
    network = randomised(SDMUNet(**TINY))
    seen = []
    network.encoder[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    different = (network(x, t, image) - network(x, t, (image + 1) % 17)).abs()
    assert torch.equal(*seen) and different.max() > 0.01


def test_no_condition_is_an_empty_map():
    _, _, image = batch()
    for edges in (False, True):
        network = SDMUNet(edges=edges, **TINY)
        assert not network.condition_map(torch.full_like(image, NO_CONDITION)).any()


def test_the_network_starts_closed():
    x, t, image = batch()
    network = SDMUNet(**TINY)
    assert not network(x, t, image).any()
    h, time, condition = torch.randn(2, 16, 4, 4), torch.randn(2, 32), network.condition_map(image)
    assert torch.equal(network.middle[0](h, time, condition, condition), h)
    assert torch.equal(network.encoder[-1](h, time), h)


def test_gradient_reaches_every_parameter():
    x, t, image = batch()
    network = randomised(SDMUNet(edges=True, **TINY))
    network(x, t, image).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


# -------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("edges", [False, True])
def test_cached_equals_computed_in_every_step(edges):
    x, t, image = batch()
    cached = randomised(SDMUNet(edges=edges, **TINY))
    uncached = randomised(SDMUNet(edges=edges, cache_modulation=False, **TINY))
    pairs, condition_map = cached.encode(image), uncached.encode(image)
    assert len(pairs) == len(modulations(cached)) == 26
    assert torch.equal(condition_map, cached.condition_map(image))
    for timesteps in (t, t.float() + 1):
        expected = uncached(x, timesteps, condition=condition_map)
        torch.testing.assert_close(cached(x, timesteps, condition=pairs), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(cached(x, timesteps, image), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("cache", "computed"), [(True, 1), (False, 5)])
def test_a_sampling_computes_gamma_and_beta_once(cache, computed):
    _, _, image = batch()
    network = randomised(SDMUNet(cache_modulation=cache, **TINY))
    calls = dict.fromkeys(modulations(network), 0)
    for module in calls:
        module.register_forward_hook(lambda module, *_: calls.update({module: calls[module] + 1}))
    start = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    sample = DiffusionSampler(GaussianDiffusion(), steps=5)
    with torch.no_grad():
        sample(network, image, SliceNoise(start, lambda: start), lambda: None)
    assert set(calls.values()) == {computed}


def test_training_lets_beta_go_after_its_norm():
    """Autograd doesn't need β once it is added: whoever kept γ and β of all norms would hold half of it for nothing."""
    x, t, image = batch()
    network = SDMUNet(**TINY)
    betas, alive = [], []
    for norm in network.modules():
        if isinstance(norm, SPADEGroupNorm):
            norm.modulation.register_forward_hook(lambda _, args, output: betas.append(ref(output[1])))
            norm.register_forward_hook(lambda *_: alive.append(sum(beta() is not None for beta in betas)))
    network(x, t, image).sum().backward()
    assert len(betas) == 26 and alive == [0] * 26


# -------------------------------------------------------------------------------------------------- its surroundings


@pytest.mark.parametrize("cache", [True, False])
def test_bfloat16_agrees_with_float32(cache):
    x, t, image = batch()
    network = randomised(SDMUNet(cache_modulation=cache, **TINY))
    with torch.no_grad():
        expected = network(x, t, image)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = network(x, t, image)
        outside = network.encode(image)
        with torch.autocast("cpu", torch.bfloat16):
            reused = network(x, t, condition=outside)
        cast = network.bfloat16().to(memory_format=torch.channels_last)(x.bfloat16(), t, image)
    for output in (autocast, reused, cast):
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_errors_name_the_remedy():
    x, t, image = batch()
    network = SDMUNet(**TINY)
    with pytest.raises(ValueError, match="give either image"):
        network(x, t, image, condition=network.encode(image))
    with pytest.raises(ValueError, match=r"slices of 16x14 .* multiples of 4"):
        network(x[..., :14], t, image[..., :14])
    with pytest.raises(ValueError, match="3 channels and 2 attention_levels: give one of each a level"):
        SDMUNet(**TINY | {"attention_levels": (False, True)})
