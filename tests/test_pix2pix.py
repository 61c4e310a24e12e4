"""pix2pix's networks against their published sizes, and the generator against a forward pass written by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.networks.pix2pix import Pix2PixGenerator

TINY = (4, 6, 8, 8)
"""Four levels: noise behind the way up of level 2 alone, 6 maps of a quarter of the size."""


def generator(channels=TINY, seed=0, **options) -> Pix2PixGenerator:
    """A generator all of whose numbers matter: statistics and biases aren't those of a new one."""
    network = Pix2PixGenerator(channels, **options)
    random = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=random) / math.sqrt(max(1, value[0].numel())))
            if "running_var" in name:
                value.abs_().add_(0.5)
    return network


def label_maps(size=32, count=2, seed=1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 17, (count, 1, size // 4, size // 4), generator=random, dtype=torch.uint8)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


def noise_for(network, image, seed=2) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(len(image), *network.noise_shape(*image.shape[2:]), generator=random)


def by_hand(network, image, keep=None, training=False) -> torch.Tensor:
    """The four levels as plain arithmetic on the weights; `keep` is what dropout leaves behind level 2's way up."""
    state = network.state_dict()

    def norm(name, h):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean, variance = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
        h = (h - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return h * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def down(name, h):
        return F.conv2d(h, state[name], stride=2, padding=1)

    def up(name, h):
        return F.conv_transpose2d(h.clamp(min=0), state[f"{name}.weight"], state.get(f"{name}.bias"), 2, 1)

    def leaky(h):
        return torch.where(h > 0, h, 0.2 * h)

    one_hot = torch.stack([(image[:, 0] == i).float() for i in range(17)], dim=1)
    d0 = down("downs.0.weight", one_hot)
    d1 = norm("downs.1.2", down("downs.1.1.weight", leaky(d0)))
    d2 = norm("downs.2.2", down("downs.2.1.weight", leaky(d1)))
    d3 = down("downs.3.1.weight", leaky(d2))
    u3 = norm("ups.3.2", up("ups.3.1", d3))
    u2 = norm("ups.2.2", up("ups.2.1", torch.cat([d2, u3], 1)))
    if keep is not None:
        u2 = torch.where(keep, u2 * 2, 0.0)
    u1 = norm("ups.1.2", up("ups.1.1", torch.cat([d1, u2], 1)))
    return up("ups.0.1", torch.cat([d0, u1], 1)).tanh()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_paper_size():
    with torch.device("meta"):
        network, image = Pix2PixGenerator(), torch.empty(2, 1, 256, 256, dtype=torch.uint8)
        with FlopCounterMode(display=False) as flops:
            output = network(image)
    assert count(network) == 54_424_193
    assert output.shape == (2, 1, 256, 256)
    assert flops.get_total_flops() / 2 / len(image) == pytest.approx(6.2e9, abs=0.05e9)  # GMAC
    assert network.noise_shape(256, 256) == (512 * (16**2 + 8**2 + 4**2),)


def test_monais_discriminator_is_the_papers():
    """70x70 PatchGAN: 30x30 logits, each of which sees 70x70 pixels and no more, and the paper's initial weights."""
    torch.manual_seed(0)
    network = PatchDiscriminator(
        spatial_dims=2,
        channels=64,
        in_channels=18,
        out_channels=1,
        num_layers_d=3,
        kernel_size=4,
        activation=("LEAKYRELU", {"negative_slope": 0.2}),
        norm="BATCH",
        bias=False,
        padding=1,
    )
    assert count(network) == 2_780_993
    pixels = torch.rand(1, 18, 256, 256, requires_grad=True)
    logits = network.eval()(pixels)[-1]
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]
    assert_initial_weights(network)


def assert_initial_weights(network: nn.Module) -> None:
    """N(0, 0.02) in convs, N(1, 0.02) in BatchNorm, no biases: within five standard errors."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            weight, n = module.weight.detach(), module.weight.numel()
            centre = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            assert weight.mean().item() == pytest.approx(centre, abs=5 * 0.02 / math.sqrt(n))
            assert weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
            assert module.bias is None or not module.bias.any()


def test_initial_weights():
    torch.manual_seed(0)
    network = Pix2PixGenerator((16, 32, 32))
    assert_initial_weights(network)
    with_bias = [name for name, module in network.named_modules() if getattr(module, "bias", None) is not None]
    assert with_bias == ["downs.1.2", "ups.0.1", "ups.1.2", "ups.2.2"]  # BatchNorm and the last conv


@pytest.mark.parametrize("training", [False, True])
def test_forward_is_the_described_arithmetic(training):
    network, image = generator().train(training), label_maps()
    noise = noise_for(network, image)
    assert noise.shape == (2, 6 * 8 * 8)
    keep = noise.view(2, 6, 8, 8) > 0
    expected = by_hand(network, image, keep, training)  # before the forward pass moves the statistics
    torch.testing.assert_close(network(image, noise), expected, atol=1e-5, rtol=1e-5)


def test_without_dropout_the_same_weights_fit_and_nothing_is_drawn():
    network = generator(dropout=False).eval()
    assert network.state_dict().keys() == generator().state_dict().keys()
    image = label_maps()
    assert network.noise_shape(32, 32) == (0,)
    expected = by_hand(network, image)
    torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(network(image, torch.randn(2, 0)), network(image))


@pytest.mark.parametrize("training", [False, True])
def test_noise_is_drawn_and_seeded_by_torch(training):
    network, image = generator().train(training), label_maps()

    def make(seed):
        torch.manual_seed(seed)
        return network(image)

    first = make(5)
    assert torch.equal(make(5), first)
    assert (make(6) - first).abs().max() > 0.01
    torch.manual_seed(5)
    assert torch.equal(network(image, torch.randn(2, *network.noise_shape(32, 32))), first)


def test_a_slice_depends_on_its_own_noise_alone():
    network, image = generator().eval(), label_maps(count=3)
    noise = noise_for(network, image)
    together = network(image, noise)
    for i in range(3):
        torch.testing.assert_close(network(image[i : i + 1], noise[i : i + 1]), together[i : i + 1])
    other = noise.clone()
    other[1] = -other[1]
    changed = (network(image, other) - together).abs().flatten(1).amax(1)
    assert changed[1] > 0.01 and changed[0] == 0 and changed[2] == 0


def test_half_of_the_elements_is_kept_and_doubled():
    network, image = generator((4, 32, 8, 8)).eval(), label_maps(size=64)
    inner = []
    network.ups[2].register_forward_hook(lambda *args: inner.append(args[2]))
    network.ups[1].register_forward_pre_hook(lambda _, args: inner.append(args[0][:, 32:]))
    torch.manual_seed(0)
    network(image)
    before, after = inner
    kept = after != 0
    n = kept.numel()
    assert torch.equal(after[kept], 2 * before[kept])
    assert abs(kept.float().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("channels", "dropped"),
    [((8, 16), []), ((8, 16, 16), [1]), ((8,) * 4, [2]), ((8,) * 5, [2, 3]), ((8,) * 8, [4, 5, 6])],
)
def test_which_levels_have_noise(channels, dropped):
    size = 2 ** len(channels)
    assert list(Pix2PixGenerator(channels).dropped) == dropped
    numbers = sum(8 * (size // 2**level) ** 2 for level in dropped)
    assert Pix2PixGenerator(channels).noise_shape(size, size) == (numbers,)


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 16, 16, 16)])
def test_trains_at_batch_one_down_to_a_single_pixel(channels):
    """At 32 pixels five levels end in 1x1, where BatchNorm would have nothing to normalise."""
    network, image = generator(channels), label_maps(count=1)
    network(image).sub(1).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_inference_uses_running_statistics():
    network, image = generator().eval(), label_maps()
    noise = noise_for(network, image)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(image, noise)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.train()(image, noise)
    assert not torch.equal(network.ups[2][2].running_mean, before["ups.2.2.running_mean"])


def test_autocast_agrees_with_float32():
    network, image = generator().eval(), label_maps()
    noise = noise_for(network, image)
    with torch.no_grad():
        expected = network(image, noise)
        with torch.autocast("cpu", torch.bfloat16):
            output = network(image, noise)
    assert (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_sizes_that_cannot_be_halved_are_named():
    with pytest.raises(ValueError, match=r"slices of 32x24 .* multiples of 16"):
        generator()(label_maps()[..., :24])
