"""OASIS' networks against their published sizes and against a forward pass written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from test_spade import (
    MODES,
    ByHand,
    assert_initial_weights,
    channels_of_ids,
    count,
    doubled,
    label_maps,
    leaky,
    normal,
    randomised,
    with_commas,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.networks.oasis import DownBlock, OASISDiscriminator, OASISGenerator, UpBlock

TINY = {"channels": (4, 6, 8), "noise_channels": 5}


def averaged(h):
    return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4


class SegmenterByHand(ByHand):
    """The discriminator's blocks as described: everything is done in the order and resolution of its figure."""

    def residual(self, name, h, learnt):
        inner = self.spectral(f"{name}.conv2", leaky(self.spectral(f"{name}.conv1", h["activated"])))
        return inner + (self.spectral(f"{name}.shortcut", h["raw"], padding=0) if learnt else h["raw"])

    def down(self, name, h, learnt, activate=True):
        return averaged(self.residual(name, {"raw": h, "activated": leaky(h) if activate else h}, learnt))

    def up(self, name, h, learnt=True):
        return self.residual(name, {"raw": doubled(h), "activated": leaky(doubled(h))}, learnt)


def test_paper_size_of_the_generator():
    with torch.device("meta"):
        network, image = OASISGenerator(), torch.empty(2, 1, 256, 256, dtype=torch.uint8)
        with FlopCounterMode(display=False) as flops:
            output = network(image)
    assert count(network) == 70_608_705
    assert (count(network.first), count(network.last)) == (747_520, 577)
    assert with_commas(reversed(network.levels)) == "1,137,152 2,231,552 5,133,056 13,786,880 23,785,984 23,785,984"
    assert output.shape == (2, 1, 256, 256)
    assert flops.get_total_flops() / 2 / len(image) == pytest.approx(153.8e9, abs=0.05e9)  # GMAC
    assert network.noise_shape(256, 256) == (64,)


def test_paper_size_of_the_discriminator():
    with torch.device("meta"):
        network, x = OASISDiscriminator(), torch.empty(2, 1, 256, 256)
        seen = []
        for block in (*network.down_blocks, *network.up_blocks):
            block.register_forward_hook(lambda _, args, output: seen.append((args[0].shape[1], *output.shape[1:3])))
        with FlopCounterMode(display=False) as flops:
            logits = network(x)
    assert count(network) == 22_247_634
    assert with_commas(network.down_blocks) == "149,120 295,168 918,272 1,180,160 3,671,552 4,719,616"
    assert with_commas(network.up_blocks) == "4,719,616 3,212,032 1,901,312 803,200 475,520 200,896"
    assert count(network.last) == 1_170
    assert seen[:6] == [(1, 128, 128), (128, 128, 64), (128, 256, 32), (256, 256, 16), (256, 512, 8), (512, 512, 4)]
    assert seen[6:] == [
        (512, 512, 8),
        (512 + 512, 256, 16),
        (256 + 256, 256, 32),
        (256 + 256, 128, 64),
        (128 + 128, 128, 128),
        (128 + 128, 64, 256),
    ]
    assert logits.shape == (2, 18, 256, 256)
    # The published network has 48.2 GMAC: its learnt shortcuts run in the larger of a block's two resolutions.
    shortcuts = [(1, 128, 256), (128, 256, 64), (256, 512, 16)]
    shortcuts += [(1024, 256, 16), (512, 256, 32), (512, 128, 64), (256, 128, 128), (256, 64, 256)]
    saved = sum(i * o * n**2 * 3 / 4 for i, o, n in shortcuts)
    assert flops.get_total_flops() / 2 / len(x) + saved == pytest.approx(48.2e9, abs=0.05e9)


@pytest.mark.parametrize("build", [lambda: OASISGenerator((16, 32)), lambda: OASISDiscriminator((16, 32))])
def test_initial_weights(build):
    torch.manual_seed(0)
    assert_initial_weights(build())


@MODES
def test_generator(training):
    """One block a level; the noise vector stands before the one-hot map wherever the map goes in."""
    network, image, noise = randomised(OASISGenerator(**TINY), training=training), label_maps(), normal(2, 5)
    by_hand = ByHand(network)
    everywhere = noise[:, :, None, None] * torch.ones(1, 1, 32, 32)
    condition = torch.cat([everywhere, channels_of_ids(image)], dim=1)
    h = by_hand.conv("first", condition[..., ::4, ::4])
    h = by_hand.block("levels.0.0", h, condition, learnt=False)
    h = by_hand.block("levels.1.0", doubled(h), condition, learnt=True)
    h = by_hand.block("levels.2.0", doubled(h), condition, learnt=True)
    torch.testing.assert_close(network(image, noise), by_hand.last(h), atol=1e-5, rtol=1e-5)


def test_noise_changes_the_slice_and_is_drawn_anew_when_missing():
    network, image = randomised(OASISGenerator(**TINY)), label_maps()
    reference = network(image, normal(2, 5))
    assert (network(image, normal(2, 5, seed=3)) - reference).abs().max() > 0.01
    torch.manual_seed(0)
    first, second = network(image), network(image)
    assert (first - second).abs().max() > 0.01
    torch.manual_seed(0)
    assert torch.equal(network(image, torch.randn(2, *network.noise_shape(32, 32))), first)


def test_noise_belongs_to_its_slice_alone():
    network, image, noise = randomised(OASISGenerator(**TINY)), label_maps(count=3), normal(3, 5)
    together = network(image, noise)
    assert torch.equal(network(image, noise), together)
    alone = torch.cat([network(image[k : k + 1], noise[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@MODES
@pytest.mark.parametrize(("widths", "activate"), [((4, 4), True), ((4, 6), True), ((1, 6), False)], ids=str)
def test_down_block(widths, activate, training):
    block, x = randomised(DownBlock(*widths, activate), training=training), normal(2, widths[0], 8, 8)
    by_hand = SegmenterByHand(nn.ModuleDict({"block": block}))
    expected = by_hand.down("block", x, learnt=widths[0] != widths[1], activate=activate)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@MODES
@pytest.mark.parametrize("widths", [(4, 4), (6, 4)], ids=str)
def test_up_block(widths, training):
    block, x = randomised(UpBlock(*widths), training=training), normal(2, widths[0], 4, 4)
    expected = SegmenterByHand(nn.ModuleDict({"block": block})).up("block", x, learnt=widths[0] != widths[1])
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@MODES
def test_discriminator(training):
    network, x = randomised(OASISDiscriminator((4, 4, 6)), training=training), normal(2, 1, 32, 32)
    by_hand = SegmenterByHand(network)
    first = by_hand.down("down_blocks.0", x, learnt=True, activate=False)
    second = by_hand.down("down_blocks.1", first, learnt=False)
    innermost = by_hand.down("down_blocks.2", second, learnt=True)
    h = by_hand.up("up_blocks.0", innermost)
    h = by_hand.up("up_blocks.1", torch.cat([h, second], dim=1))
    h = by_hand.up("up_blocks.2", torch.cat([h, first], dim=1))
    expected = by_hand.conv("last", h, padding=0)
    assert expected.shape == (2, 18, 32, 32)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)


def test_discriminator_tells_signs_apart():
    """The image goes in before any activation, so that x and -x differ in more than what a slope of 0.2 leaves."""
    block = randomised(DownBlock(1, 4, activate=False))
    block.conv1.bias.data.zero_()
    seen = []
    block.conv1.register_forward_hook(lambda *args: seen.append(args[-1]))
    x = normal(1, 1, 8, 8)
    block(x), block(-x)
    torch.testing.assert_close(seen[0], -seen[1])


@pytest.mark.parametrize("build", [lambda: OASISGenerator(**TINY), lambda: OASISDiscriminator((4, 4, 6))])
def test_copies_and_saved_weights_give_the_same(build):
    torch.manual_seed(0)
    network, other = randomised(build()), build().eval()
    given = (label_maps(), normal(2, 5)) if isinstance(network, OASISGenerator) else (normal(2, 1, 32, 32),)
    expected = network(*given)
    other.load_state_dict(network.state_dict(), strict=True)
    for same in (other, copy.deepcopy(network)):
        assert torch.equal(same(*given), expected)


def test_three_forwards_before_one_backward():
    """Fake, real and their mixture, then one loss: gradients are the sum of each one's."""
    network = randomised(OASISDiscriminator((4, 4, 6)), training=True)
    slices = [normal(2, 1, 32, 32, seed=seed) for seed in (3, 4, 5)]
    sum(network(x).square().mean() for x in slices).backward()
    together = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    for x in slices:
        network(x).square().mean().backward()
    for parameter, expected in zip(network.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)
        assert expected.any()


@pytest.mark.parametrize(
    ("call", "factor"),
    [
        (lambda: OASISGenerator(**TINY)(label_maps()[..., :30]), 4),
        (lambda: OASISDiscriminator((4, 4, 6))(normal(1, 1, 32, 30)), 8),
    ],
)
def test_sizes_that_cannot_be_halved_are_named(call, factor):
    with pytest.raises(ValueError, match=rf"slices of 32x30 .* multiples of {factor}$"):
        call()
