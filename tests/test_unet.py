"""The denoisers against their published sizes, against MONAI's network, and against a forward pass written by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import tiny_networks
import torch
import torch.nn.functional as F
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets import DiffusionModelUNet
from tiny_networks import randomised

from common.networks.unet import ConditionalUNet, GuidedUNet

TINY = {**tiny_networks.TINY, "num_head_channels": 16}
GUIDES = ("mask", "edge")
DENOISERS = [lambda: ConditionalUNet(**TINY), lambda: GuidedUNet("mask", **TINY), lambda: GuidedUNet("edge", **TINY)]


def batch(seed=1, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, size, size, generator=generator)
    image = torch.randint(0, 17, (2, 1, size // 4, size // 4), generator=generator, dtype=torch.uint8)
    return x, torch.tensor([3, 871]), image.repeat_interleave(4, 2).repeat_interleave(4, 3)


def channels_of_ids(image):
    return torch.stack([(image[:, 0] == i).float() for i in range(17)], dim=1)


def edges_by_hand(image):
    edges = torch.zeros(image.shape)
    *_, height, width = image.shape
    for b, i, j in itertools.product(range(len(image)), range(height), range(width)):
        for m, n in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if 0 <= m < height and 0 <= n < width and image[b, 0, i, j] != image[b, 0, m, n]:
                edges[b, 0, i, j] = 1
    return edges


class ByHand:
    """The U-Net of the paper as plain arithmetic on a state dict: independent of MONAI's forward passes."""

    def __init__(self, network, groups=4):
        self.state, self.groups = network.state_dict(), groups

    def has(self, name):
        return f"{name}.weight" in self.state

    def of(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def conv(self, name, h, stride=1):
        weight, bias = self.of(name)
        return F.conv2d(h, weight, bias, stride, padding=weight.shape[-1] // 2)

    def norm(self, name, h):
        return F.group_norm(h, self.groups, *self.of(name), eps=1e-5)

    def block(self, name, h, time=None):
        inner = self.conv(f"{name}.conv1.conv", F.silu(self.norm(f"{name}.norm1", h)))
        if time is not None:
            inner = inner + F.linear(F.silu(time), *self.of(f"{name}.time_emb_proj"))[:, :, None, None]
        inner = self.conv(f"{name}.conv2.conv", F.silu(self.norm(f"{name}.norm2", inner)))
        shortcut = [s for s in ("skip_connection.conv", "nin_shortcut.conv") if self.has(f"{name}.{s}")]
        return inner + (self.conv(f"{name}.{shortcut[0]}", h) if shortcut else h)

    def attention(self, name, h):
        if not self.has(f"{name}.norm"):
            return h
        tokens = self.norm(f"{name}.norm", h).flatten(2).mT
        q, k, v = (F.linear(tokens, *self.of(f"{name}.attn.to_{letter}")) for letter in "qkv")
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return h + F.linear(mixed, *self.of(f"{name}.attn.out_proj")).mT.reshape(h.shape)

    def encoder(self, guide):
        h, maps = self.conv("guide_encoder.conv_in.conv", guide), []
        for level in range(2):
            for index in range(2):
                h = self.block(f"guide_encoder.levels.{level}.{index}", h)
            maps.append(h)
            if level == 0:
                h = self.conv("guide_encoder.downsamplers.0.op.conv", h, stride=2)
        return maps

    def __call__(self, x, timesteps, maps=()):
        angles = timesteps[:, None] * 10000 ** (-torch.arange(4) / 4)
        time = F.linear(torch.cat([angles.cos(), angles.sin()], 1), *self.of("time_embed.0"))
        time = F.linear(F.silu(time), *self.of("time_embed.2"))
        h = self.conv("conv_in.conv", x)
        skips = [h]
        for level in range(3):
            for index in range(2):
                h = self.block(f"down_blocks.{level}.resnets.{index}", h, time)
                h = self.attention(f"down_blocks.{level}.attentions.{index}", h)
                if maps and index == 1 and level < 2:
                    h = torch.cat([h, maps[level]], 1)
                skips.append(h)
            if level < 2:
                down = f"guided_downsamplers.{level}" if maps else f"down_blocks.{level}.downsampler"
                h = self.conv(f"{down}.op.conv", h, stride=2)
                skips.append(h)
        h = self.block("middle_block.resnet_1", h, time)
        h = self.attention("middle_block.attention", h)
        h = self.block("middle_block.resnet_2", h, time)
        for level in range(3):
            for index in range(3):
                h = self.block(f"up_blocks.{level}.resnets.{index}", torch.cat([h, skips.pop()], 1), time)
                h = self.attention(f"up_blocks.{level}.attentions.{index}", h)
            if level < 2:
                h = self.conv(
                    f"up_blocks.{level}.upsampler.postconv.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                )
        return self.conv("out.2.conv", F.silu(self.norm("out.0", h)))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: ConditionalUNet(), 113_689_346),
        (lambda: ConditionalUNet(mask="scalar"), 113_670_914),
        (lambda: GuidedUNet(), 137_301_122),
        (lambda: GuidedUNet(guide="edge"), 137_302_274),
    ],
)
def test_paper_sizes(build, parameters):
    with torch.device("meta"):
        assert count(build()) == parameters


def test_sizes_by_level_are_those_of_the_docstrings():
    with torch.device("meta"):
        plain, mask, edge = ConditionalUNet(), GuidedUNet("mask"), GuidedUNet("edge")
    first_convs = [plain.conv_in, mask.conv_in, edge.conv_in, mask.guide_encoder.conv_in, edge.guide_encoder.conv_in]
    rows = {
        tuple(map(count, first_convs)): "20,864 1,280 20,864 19,712 1,280",
        tuple(map(count, (plain.time_embed, plain.middle_block, plain.out))): "328,704 11,020,288 2,562",
        tuple(map(count, plain.down_blocks)): "870,272 870,272 2,952,960 3,215,104 13,383,168 9,968,640",
        tuple(map(count, reversed(plain.up_blocks))): "1,625,856 1,937,536 6,364,672 7,348,480 27,811,840 25,968,128",
        tuple(map(count, mask.down_blocks)): "722,688 722,688 2,362,880 2,625,024 11,023,360 9,968,640",
        tuple(map(count, mask.guided_downsamplers)): "295,040 295,040 1,179,904 1,179,904 4,719,104",
        tuple(map(count, reversed(mask.up_blocks))): "1,789,952 2,101,632 7,020,544 8,004,352 30,434,304 25,968,128",
        tuple(map(count, mask.guide_encoder.levels)): "591,360 591,360 2,100,224 2,362,368 8,394,752",
        tuple(map(count, mask.guide_encoder.downsamplers)): "147,584 147,584 590,080 590,080",
    }
    for counted, stated in rows.items():
        assert " ".join(f"{n:,}" for n in counted) == stated


def test_paper_attends_at_16_and_in_the_middle_and_is_guided_down_to_16():
    with torch.device("meta"):
        network, x, t = GuidedUNet(), torch.empty(1, 1, 256, 256), torch.empty(1)
        maps = network.guide_encoder(torch.empty(1, 17, 256, 256))
        seen = []
        for module in network.modules():
            if isinstance(module, SpatialAttentionBlock):
                module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[1:])))
        network(x, t, condition=maps)
    assert seen == [(512, 16, 16)] * 2 + [(512, 8, 8)] + [(512, 16, 16)] * 3
    shapes = [(128, 256, 256), (128, 128, 128), (256, 64, 64), (256, 32, 32), (512, 16, 16)]
    assert [tuple(m.shape[1:]) for m in maps] == shapes


@pytest.mark.parametrize("mask", ["one_hot", "scalar"])
def test_conditional_is_monais_network_on_concatenated_channels(mask):
    x, t, image = batch()
    network = randomised(ConditionalUNet(mask=mask, **TINY))
    condition = channels_of_ids(image) if mask == "one_hot" else image / 8.0 - 1
    monai = DiffusionModelUNet(2, 1 + condition.shape[1], 2, norm_eps=1e-5, **TINY)
    monai.load_state_dict(network.state_dict())
    expected = monai(torch.cat([x, condition], 1), t)
    torch.testing.assert_close(network(x, t, image), expected)
    torch.testing.assert_close(ByHand(network)(torch.cat([x, condition], 1), t), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guide", GUIDES)
def test_guided_is_the_described_arithmetic(guide):
    x, t, image = batch()
    network = randomised(GuidedUNet(guide, **TINY))
    by_hand = ByHand(network)
    if guide == "mask":
        expected = by_hand(x, t, by_hand.encoder(channels_of_ids(image)))
    else:
        expected = by_hand(torch.cat([x, channels_of_ids(image)], 1), t, by_hand.encoder(edges_by_hand(image)))
    torch.testing.assert_close(network(x, t, image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guide", GUIDES)
def test_unwidened_tensors_have_monais_names_and_shapes(guide):
    ours = {name: tensor.shape for name, tensor in GuidedUNet(guide, **TINY).state_dict().items()}
    in_channels = 1 if guide == "mask" else 18
    monai = DiffusionModelUNet(2, in_channels, 2, norm_eps=1e-5, **TINY).state_dict()
    different = {name for name, tensor in monai.items() if ours.get(name) != tensor.shape}
    wider = {
        f"up_blocks.{level}.resnets.0.{layer}"
        for level in (1, 2)
        for layer in ("norm1.weight", "norm1.bias", "conv1.conv.weight", "skip_connection.conv.weight")
    }
    moved = {f"down_blocks.{level}.downsampler.op.conv.{kind}" for level in (0, 1) for kind in ("weight", "bias")}
    assert different == wider | moved


@pytest.mark.parametrize("guide", GUIDES)
def test_every_map_matters(guide):
    x, t, image = batch()
    network = randomised(GuidedUNet(guide, **TINY))
    condition = network.encode(image)
    reference = network(x, t, condition=condition)
    for i in range(len(condition)):
        zeroed = [torch.zeros_like(c) if i == j else c for j, c in enumerate(condition)]
        assert (network(x, t, condition=tuple(zeroed)) - reference).abs().max() > 0.01


@pytest.mark.parametrize("guide", GUIDES)
def test_gradient_reaches_every_parameter(guide):
    x, t, image = batch()
    network = randomised(GuidedUNet(guide, **TINY))
    network(x, t, image).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("build", DENOISERS)
def test_encoding_once_equals_encoding_inside(build):
    x, t, image = batch()
    network = randomised(build())
    condition = network.encode(image)
    for timesteps in (t, t.float() + 1):
        assert torch.equal(network(x, timesteps, condition=condition), network(x, timesteps, image))


def test_a_condition_is_not_encoded_again():
    x, t, image = batch()
    network = GuidedUNet(**TINY)
    calls = []
    network.guide_encoder.register_forward_hook(lambda *_: calls.append(1))
    condition = network.encode(image)
    for _ in range(3):
        network(x, t, condition=condition)
    assert len(calls) == 1


def test_residual_branches_start_closed():
    network = GuidedUNet(**TINY)
    h, time = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    assert torch.equal(network.middle_block(h, time), h)
    assert torch.equal(network.down_blocks[2](h, time)[0], h)
    assert torch.equal(network.down_blocks[1].attentions[0](h), h)
    first = torch.randn(2, 8, 4, 4)
    assert torch.equal(network.guide_encoder.levels[0](first), first)
    x, t, image = batch()
    assert not network(x, t, image).any()


@pytest.mark.parametrize("build", DENOISERS)
def test_bfloat16_agrees_with_float32(build):
    x, t, image = batch()
    network = randomised(build())
    with torch.no_grad():
        expected = network(x, t, image)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = network(x, t, image)
        outside = network.encode(image)
        with torch.autocast("cpu", torch.bfloat16):
            reused = network(x, t, condition=outside)
        cast = network.bfloat16()(x.bfloat16(), t, image)
    for output in (autocast, reused, cast):
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


@pytest.mark.parametrize("build", DENOISERS)
def test_image_or_condition_but_not_both(build):
    x, t, image = batch()
    network = build()
    with pytest.raises(ValueError, match="give either image"):
        network(x, t)
    with pytest.raises(ValueError, match="give either image"):
        network(x, t, image, condition=network.encode(image))


def test_sizes_that_cannot_be_halved_are_named():
    x, t, image = batch()
    with pytest.raises(ValueError, match=r"slices of 16x14 .* multiples of 4"):
        ConditionalUNet(**TINY)(x[..., :14], t, image[..., :14])


def test_unknown_options_name_the_known_ones():
    with pytest.raises(ValueError, match="'onehot'; use one of one_hot, scalar"):
        ConditionalUNet(mask="onehot")
    with pytest.raises(ValueError, match="'edges'; use one of mask, edge"):
        GuidedUNet(guide="edges")
