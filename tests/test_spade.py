"""SPADE's networks against their published sizes and against a forward pass written by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.networks.spade import (
    SPADEDiscriminator,
    SPADEGenerator,
    SPADENorm,
    SPADEResBlock,
    SpectralConv2d,
)

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def randomised(network, seed=0, training=False):
    """A network all of whose numbers matter, with spectral norms that have converged."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) / math.sqrt(max(1, value[0].numel())))
            if "running_var" in name:
                value.abs_().add_(0.5)
    with torch.no_grad():
        for conv in network.modules():
            for _ in range(300 if isinstance(conv, SpectralConv2d) else 0):
                conv.weight  # noqa: B018 (an access is a power iteration)
    return network.train(training)


def label_maps(size=32, count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 17, (count, 1, size // 4, size // 4), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


def channels_of_ids(image):
    return torch.stack([(image[:, 0] == i).float() for i in range(17)], dim=1)


def normal(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaky(h):
    return torch.where(h > 0, h, 0.2 * h)


def doubled(h):
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)


class ByHand:
    """Generators and discriminators as plain arithmetic on a state dict; statistics as they were before the forward."""

    def __init__(self, network):
        self.state = {name: value.clone() for name, value in network.state_dict().items()}
        self.training = network.training

    def conv(self, name, h, stride=1, padding=1):
        return F.conv2d(h, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def spectral(self, name, h, stride=1, padding=1):
        weight = self.state[f"{name}.parametrizations.weight.original"]
        largest = torch.linalg.svdvals(weight.flatten(1))[0]
        return F.conv2d(h, weight / largest, self.state.get(f"{name}.bias"), stride, padding)

    def norm(self, name, h, condition):
        mean, variance = self.state[f"{name}.norm.running_mean"], self.state[f"{name}.norm.running_var"]
        if self.training:
            mean = h.mean((0, 2, 3))
            variance = (h - mean[:, None, None]).square().mean((0, 2, 3))
        h = (h - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        every = condition.shape[2] // h.shape[2]
        hidden = self.conv(f"{name}.modulation.shared", condition[..., ::every, ::every]).clamp(min=0)
        return h * (1 + self.conv(f"{name}.modulation.gamma", hidden)) + self.conv(f"{name}.modulation.beta", hidden)

    def block(self, name, h, condition, learnt):
        inner = self.spectral(f"{name}.conv1", leaky(self.norm(f"{name}.norm1", h, condition)))
        inner = self.spectral(f"{name}.conv2", leaky(self.norm(f"{name}.norm2", inner, condition)))
        if learnt:
            h = self.spectral(f"{name}.shortcut", self.norm(f"{name}.shortcut_norm", h, condition), padding=0)
        return h + inner

    def last(self, h):
        return self.conv("last", leaky(h)).tanh()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def with_commas(modules):
    return " ".join(f"{count(module):,}" for module in modules)


def assert_initial_weights(network):
    """Xavier's with gain 0.02 within five standard errors, biases zero."""
    for name, value in network.named_parameters():
        if value.ndim == 1:
            assert not value.any(), name
            continue
        receptive = value[0, 0].numel()
        expected = 0.02 * math.sqrt(2 / (receptive * (value.shape[0] + value.shape[1])))
        assert abs(value.std() / expected - 1) < 5 / math.sqrt(2 * value.numel()), name
        assert abs(value.mean()) < 5 * expected / math.sqrt(value.numel()), name


def test_paper_size_of_the_generator():
    with torch.device("meta"):
        network, image = SPADEGenerator(), torch.empty(2, 1, 256, 256, dtype=torch.uint8)
        with FlopCounterMode(display=False) as flops:
            output = network(image)
    assert count(network) == 92_477_761
    assert (count(network.first), count(network.last)) == (157_696, 577)
    assert with_commas(reversed(network.levels)) == "915,968 2,010,368 4,911,872 13,565,696 47,277,056 23,638,528"
    assert output.shape == (2, 1, 256, 256)
    assert flops.get_total_flops() / 2 / len(image) == pytest.approx(140.5e9, abs=0.05e9)  # GMAC


def test_paper_size_of_the_discriminator():
    with torch.device("meta"):
        network = SPADEDiscriminator()
        outputs = network(torch.empty(2, 18, 256, 256))
    assert count(network) == 5_558_402
    for stack in network.scales:
        assert with_commas(stack) == "18,496 131,072 524,288 2,097,152 8,193"
    shapes = [[tuple(features.shape) for features in scale] for scale in outputs]
    sizes = [(129, 65, 33, 34, 35), (65, 33, 17, 18, 19)]
    assert shapes == [[(2, c, n, n) for c, n in zip((64, 128, 256, 512, 1), scale, strict=True)] for scale in sizes]


def test_widths_of_the_discriminator_end_at_512():
    with torch.device("meta"):
        outputs = SPADEDiscriminator(channels=256, num_scales=1, num_layers=3)(torch.empty(1, 18, 64, 64))
    assert [features.shape[1] for features in outputs[0]] == [256, 512, 512, 1]


@pytest.mark.parametrize("build", [lambda: SPADEGenerator((16, 32)), lambda: SPADEDiscriminator(16)])
def test_initial_weights(build):
    torch.manual_seed(0)
    assert_initial_weights(build())


def test_spectral_conv_is_the_conv_with_largest_singular_value_one():
    conv, x = randomised(SpectralConv2d(6, 10, 3, padding=1)), normal(2, 6, 8, 8)
    original = conv.parametrizations.weight.original.detach().clone().requires_grad_()
    by_hand = F.conv2d(x, original / torch.linalg.svdvals(original.flatten(1))[0], conv.bias.detach(), padding=1)
    output = conv(x)
    torch.testing.assert_close(output, by_hand)
    # The gradient flows through the singular value, too.
    output.square().mean().backward()
    by_hand.square().mean().backward()
    torch.testing.assert_close(conv.parametrizations.weight.original.grad, original.grad, atol=1e-5, rtol=1e-4)


def test_spectral_norm_holds_from_the_first_forward():
    torch.manual_seed(0)
    for conv in (SpectralConv2d(16, 16, 3), SpectralConv2d(32, 8, 1, bias=False), SpectralConv2d(18, 24, 4)):
        assert torch.linalg.svdvals(conv.eval().weight.detach().flatten(1))[0].item() == pytest.approx(1, abs=0.05)


def test_power_iterations_belong_to_training():
    torch.manual_seed(0)
    conv, x = SpectralConv2d(8, 8, 3, padding=1), normal(1, 8, 4, 4)
    conv.parametrizations.weight.original.data.normal_()
    before = copy.deepcopy(conv.state_dict())
    first = conv.eval()(x)
    assert torch.equal(conv(x), first)
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
    conv.train()(x)
    moved = {name for name, value in conv.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"parametrizations.weight.0._u", "parametrizations.weight.0._v"}


def test_spectral_norm_is_outside_autocast():
    conv, seen = SpectralConv2d(2, 2, 1), []
    conv.parametrizations.weight[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cuda")))
    torch.set_autocast_enabled("cuda", True)
    try:
        conv(torch.zeros(1, 2, 1, 1))
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [False]


def test_norm_with_given_weights():
    """γ = 2 and β = 0.5 for class 3, γ = 0 and β = 0 elsewhere."""
    norm, image = SPADENorm(17, 1), torch.tensor([[[[3, 0], [3, 5]]]])
    for parameter in norm.parameters():
        parameter.data.zero_()
    norm.modulation.shared.weight.data[0, 3, 1, 1] = 1
    norm.modulation.gamma.weight.data[0, 0, 1, 1] = 2
    norm.modulation.beta.weight.data[0, 0, 1, 1] = 0.5
    x = torch.tensor([[[[9.0, 9.0], [5.0, 5.0]]]])  # mean 7, variance 4
    one = 2 / math.sqrt(4 + 1e-5)
    expected = torch.tensor([[[[3 * one + 0.5, one], [-3 * one + 0.5, -one]]]])
    torch.testing.assert_close(norm(x, channels_of_ids(image)), expected)
    torch.testing.assert_close(norm.norm.running_mean, torch.tensor([0.1 * 7]))
    torch.testing.assert_close(norm.norm.running_var, torch.tensor([0.9 + 0.1 * 4 * 4 / 3]))
    assert not norm.norm.affine


@MODES
@pytest.mark.parametrize("widths", [(6, 6), (8, 4), (4, 8)], ids=str)
def test_residual_block(widths, training):
    block, x = randomised(SPADEResBlock(17, *widths), training=training), normal(2, widths[0], 8, 8)
    condition = channels_of_ids(label_maps(16))
    expected = ByHand(nn.ModuleDict({"block": block}).train(training)).block("block", x, condition, len({*widths}) > 1)
    torch.testing.assert_close(block(x, condition), expected, atol=1e-5, rtol=1e-5)
    assert block.conv1.out_channels == min(widths)


@MODES
def test_generator(training):
    """Three levels, two blocks in the middle one; its width changes at the first of the two."""
    network, image = randomised(SPADEGenerator((4, 6, 8)), training=training), label_maps()
    by_hand, condition = ByHand(network), channels_of_ids(image)
    h = by_hand.conv("first", condition[..., ::4, ::4])
    h = by_hand.block("levels.0.0", h, condition, learnt=False)
    h = by_hand.block("levels.1.0", doubled(h), condition, learnt=True)
    h = by_hand.block("levels.1.1", h, condition, learnt=False)
    h = by_hand.block("levels.2.0", doubled(h), condition, learnt=True)
    torch.testing.assert_close(network(image), by_hand.last(h), atol=1e-5, rtol=1e-5)


@MODES
def test_generator_of_two_levels_has_its_middle_blocks_in_full_resolution(training):
    network, image = randomised(SPADEGenerator((4, 8)), training=training), label_maps(16)
    by_hand, condition = ByHand(network), channels_of_ids(image)
    h = by_hand.block("levels.0.0", by_hand.conv("first", condition[..., ::2, ::2]), condition, learnt=False)
    h = by_hand.block("levels.1.0", doubled(h), condition, learnt=True)
    h = by_hand.block("levels.1.1", h, condition, learnt=False)
    torch.testing.assert_close(network(image), by_hand.last(h), atol=1e-5, rtol=1e-5)


def test_generator_takes_no_noise():
    network, image = randomised(SPADEGenerator((4, 8))), label_maps()
    assert network.noise_shape(32, 32) == (0,)
    assert torch.equal(network(image, normal(2, *network.noise_shape(32, 32))), network(image))


@MODES
def test_discriminator(training):
    network = randomised(SPADEDiscriminator(4, num_scales=2, num_layers=3), training=training)
    x = torch.cat([channels_of_ids(label_maps()), normal(2, 1, 32, 32)], dim=1)
    by_hand = ByHand(network)

    def normalised(h):
        mean = h.mean((2, 3), keepdim=True)
        return (h - mean) / ((h - mean).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()

    ones = torch.ones(1, 18, 32, 32)
    box = torch.ones(18, 1, 3, 3)
    averaged = F.conv2d(x, box, stride=2, padding=1, groups=18) / F.conv2d(ones, box, stride=2, padding=1, groups=18)
    for scale, (h, outputs) in enumerate(zip((x, averaged), network(x), strict=True)):
        features = [leaky(by_hand.conv(f"scales.{scale}.0.0", h, 2, 2))]
        features.append(leaky(normalised(by_hand.spectral(f"scales.{scale}.1.0", features[-1], 2, 2))))
        features.append(leaky(normalised(by_hand.spectral(f"scales.{scale}.2.0", features[-1], 1, 2))))
        features.append(by_hand.conv(f"scales.{scale}.3", features[-1], 1, 2))
        for output, expected in zip(outputs, features, strict=True):
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_coarse_scale_averages_without_the_padding():
    network, seen = SPADEDiscriminator(4, num_layers=2), []
    for stack in network.scales:
        stack[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(torch.arange(16.0).reshape(4, 4).expand(1, 18, 4, 4))
    assert seen[0].shape[2:] == (4, 4)
    # Corner: of 0, 1, 4, 5. Beside it: of 1, 2, 3 and 5, 6, 7. Below: of 4, 5, 8, 9, 12, 13. Inside: of nine.
    assert seen[1][0, 0].tolist() == [[2.5, 4.0], [8.5, 10.0]]


@pytest.mark.parametrize("run_first", [False, True])
def test_deep_copies_are_independent(run_first):
    """As the EMA takes them, before or after a forward."""
    network, image = randomised(SPADEGenerator((4, 8)), training=True), label_maps()
    if run_first:
        network(image).mean().backward()
    clone = copy.deepcopy(network).eval()
    network.eval()
    expected = network(image)
    assert torch.equal(clone(image), expected)
    for parameter in network.parameters():
        parameter.data.mul_(-1.5)
    assert torch.equal(clone(image), expected)
    assert not torch.equal(network(image), expected)


@pytest.mark.parametrize("build", [lambda: SPADEGenerator((4, 8)), lambda: SPADEDiscriminator(4, num_layers=2)])
def test_state_dict_is_all_there_is(build):
    torch.manual_seed(0)
    network, other = randomised(build()), build().eval()
    given = label_maps() if isinstance(network, SPADEGenerator) else normal(2, 18, 32, 32)
    other.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(other(given), network(given), atol=0, rtol=0)


def test_two_forwards_before_one_backward():
    """Fake and real one after the other, then one loss: gradients are the sum of each one's."""
    network = randomised(SPADEDiscriminator(4, num_layers=3), training=True)
    fake, real = normal(2, 18, 32, 32, seed=3), normal(2, 18, 32, 32, seed=4)

    def loss(x):
        return sum(scale[-1].square().mean() for scale in network(x))

    (loss(fake) + loss(real)).backward()
    together = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    loss(fake).backward()
    loss(real).backward()
    for parameter, expected in zip(network.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)


def test_every_batchnorm_can_be_synchronised():
    """Two norms a block, three where its width changes; same state, same result."""
    network, image = randomised(SPADEGenerator((4, 6, 8))), label_maps()
    expected = network(image)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    kinds = [type(module) for module in converted.modules()]
    assert kinds.count(nn.SyncBatchNorm) == 2 + 3 + 2 + 3
    assert kinds.count(nn.BatchNorm2d) == 0
    assert converted.state_dict().keys() == network.state_dict().keys()
    torch.testing.assert_close(converted(image), expected)


def test_a_slice_does_not_depend_on_its_batch_in_evaluation():
    network, image = randomised(SPADEGenerator((4, 6, 8))), label_maps(count=3)
    together = network(image)
    assert torch.equal(network(image), together)
    alone = torch.cat([network(image[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_every_parameter():
    network = randomised(SPADEGenerator((4, 6, 8)))
    network(label_maps()).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_bfloat16_agrees_with_float32():
    network, image = randomised(SPADEGenerator((4, 6, 8))), label_maps()
    expected = network(image)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(image)
    assert (output.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_sizes_that_cannot_be_halved_are_named():
    with pytest.raises(ValueError, match=r"slices of 16x14 .* multiples of 4"):
        SPADEGenerator((4, 6, 8))(label_maps(16)[..., :14])
