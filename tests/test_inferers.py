"""From a label volume to a CT volume: a perfect denoiser whose samples are known, and the statistics of the noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.stats import kstest
from torch import nn

from common.diffusion import GaussianDiffusion
from common.inferers import DiffusionSampler, GeneratorPass, SliceNoise, VolumeInferer, VolumeNoise
from common.networks.oasis import OASISGenerator
from common.networks.pix2pix import Pix2PixGenerator
from common.networks.sdm import SDMUNet
from common.networks.spade import SPADEGenerator
from common.networks.unet import ConditionalUNet, GuidedUNet
from common.samplers import SAMPLERS
from common.transforms import NO_CONDITION

STD = 0.1
MEANS = torch.zeros(17).index_put((torch.tensor([1, 6, 16]),), torch.tensor([0.2, -0.5, 0.4]))
LOG_ALPHAS_CUMPROD = np.log(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
DIFFUSION = GaussianDiffusion()


class Oracle(nn.Module):
    """The perfect denoiser of slices whose pixels are N(mean of the pixel's class, 0.1²), in network space."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[torch.Tensor] = []
        self.calls = 0

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        self.encoded.append(image)
        return MEANS[image.long()]

    def forward(self, x, timesteps, image=None, condition=None):
        assert image is None and len(condition) == len(x)
        self.calls += 1
        alpha = float(np.exp(np.interp(timesteps[0].item(), np.arange(1000), LOG_ALPHAS_CUMPROD)))
        epsilon = (x - alpha**0.5 * condition) * (1 - alpha) ** 0.5 / (alpha * STD**2 + 1 - alpha)
        return torch.cat([epsilon, torch.zeros_like(x)], dim=1)


def label_volume(depth: int = 12, side: int = 16, empty: tuple[int, ...] = ()) -> torch.Tensor:
    """(1, 1, side, side, depth): class 1 in the upper half, 6 in the lower, but for the first column; no two alike."""
    volume = torch.ones(side, side, depth, dtype=torch.uint8)
    volume[side // 2 :] = 6
    volume[:, 0] = 0
    for k in range(depth):
        volume[k % side, 1 + k // side, k] = 16
    volume[..., list(empty)] = 0
    return volume[None, None]


def infer(labels: torch.Tensor, network: nn.Module | None = None, sampler: str = "ddpm", steps: int = 5, **options):
    generate = DiffusionSampler(DIFFUSION, sampler, steps)
    return VolumeInferer(generate, progress=False, **options)(labels, network or Oracle())


# ------------------------------------------------------------------------------------------------------ the volume


def test_at_least_one_slice_at_a_time():
    with pytest.raises(ValueError, match="batch_size is 0: choose 1 or more"):
        VolumeInferer(Generator(), batch_size=0)


def test_a_perfect_denoiser_gives_the_data():
    labels = label_volume(depth=20, side=48)
    pred = infer(labels, sampler="dpmpp_2m", steps=20)
    assert pred.shape == labels.shape and pred.dtype == torch.float32
    for label in (1, 6):
        values = pred[labels == label].double()  # 22,000 pixels of network space's N(mean, 0.1²), in [0, 1]
        assert abs(values.mean().item() - (MEANS[label].item() + 1) / 2) < 4 * (STD / 2) / len(values) ** 0.5 + 2e-4
        assert values.std().item() == pytest.approx(STD / 2, rel=0.03)


def test_pixels_are_independent_within_and_between_slices():
    pred = infer(label_volume(depth=20, side=48), sampler="dpmpp_2m", steps=10)[0, 0, :24, 2:].double()
    residual = (pred - 0.6).flatten(0, 1)  # (pixels, slices); 1,104 pixels each
    between = np.corrcoef(residual.T.numpy())
    assert abs(between - np.eye(20)).max() < 0.15
    within = np.corrcoef(pred[:, 1:].flatten(), pred[:, :-1].flatten())[0, 1]
    assert abs(within) < 0.03


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("noise_correlation", [0.0, 0.7])
def test_the_result_does_not_depend_on_the_batch_size(sampler, noise_correlation):
    labels = label_volume(depth=11, empty=(4,))
    options = {"sampler": sampler, "noise_correlation": noise_correlation}
    expected = infer(labels, batch_size=1, **options)
    assert expected[labels == 1].std() > 0.01  # of the noise, that is
    for batch_size in (2, 3, 7, 64):
        torch.testing.assert_close(infer(labels, batch_size=batch_size, **options), expected, rtol=0, atol=1e-6)


def test_slices_without_a_body_are_air_and_cost_nothing():
    empty = (0, 3, 4, 11)
    labels, network = label_volume(empty=empty), Oracle()
    pred = infer(labels, network, batch_size=3)
    assert (pred[..., list(empty)] == 0).all()
    assert (pred[..., 1] != 0).any()
    seen = torch.cat(network.encoded)
    occupied = [k for k in range(12) if k not in empty]
    assert torch.equal(seen, labels[0].movedim(-1, 0)[occupied])


def test_a_volume_without_any_body_is_all_air():
    network = Oracle()
    pred = infer(torch.zeros(1, 1, 8, 8, 5), network)
    assert torch.equal(pred, torch.zeros(1, 1, 8, 8, 5)) and network.encoded == []


def test_the_mask_is_encoded_once_a_batch_and_the_network_called_once_a_step():
    network = Oracle()
    infer(label_volume(depth=10), network, sampler="dpmpp_2m", steps=6, batch_size=4)
    assert [len(image) for image in network.encoded] == [4, 4, 2]
    assert network.calls == 3 * 6


def test_slices_come_back_where_they_were():
    labels = label_volume()
    pred = infer(labels, sampler="dpmpp_2m", steps=20)
    expected = (MEANS[labels.long()] + 1) / 2
    assert (pred - expected).abs().max() < 6 * STD / 2


def test_the_same_mask_and_seed_give_the_same_ct_under_any_name():
    labels = label_volume()
    first, second = (
        MetaTensor(labels.float(), meta={"filename_or_obj": name, "affine": torch.eye(4) * scale})
        for name, scale in (("a.nii.gz", 1), ("b.nii.gz", 2))
    )
    expected = infer(labels, seed=3)
    for volume in (first, second, labels.long()):
        assert torch.equal(torch.as_tensor(infer(volume, seed=3)), expected)


def test_another_seed_or_mask_gives_other_noise():
    labels = label_volume()
    other = labels.clone()
    other[0, 0, 2, 2, 0] = 16
    a, b, c = infer(labels, seed=0), infer(labels, seed=1), infer(other, seed=0)
    same = (labels == 1) & (other == 1)
    for x, y in ((a, b), (a, c)):
        assert abs(np.corrcoef(x[same], y[same])[0, 1]) < 0.1  # 1,300 pixels


def test_one_starting_noise_for_all_makes_slices_of_one_mask_alike():
    labels = torch.ones(1, 1, 8, 8, 6, dtype=torch.uint8)
    shared = infer(labels, sampler="dpmpp_2m", noise_correlation=1.0)
    assert torch.equal(shared, shared[..., :1].expand_as(shared))
    independent = infer(labels, sampler="dpmpp_2m", noise_correlation=0.0)
    assert not torch.isclose(independent[..., 0], independent[..., 1]).all()


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    expected = infer(label_volume())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(infer(label_volume()), expected)


class Generator:
    """Makes slices without a network: class 1 becomes 5, class 6 becomes -5, the rest 0.25."""

    steps, settings = 1, {}

    def noise_shape(self, network, size):
        return (0,)

    def __call__(self, network, image, noise, callback):
        callback()
        return torch.where(image == 1, 5.0, torch.where(image == 6, -5.0, 0.25))


def test_predictions_beyond_the_window_are_held_to_it():
    labels = label_volume()
    pred = VolumeInferer(Generator(), progress=False)(labels, nn.Identity())
    expected = torch.full(labels.shape, 0.25)
    expected[labels == 1], expected[labels == 6] = 1, 0
    assert torch.equal(pred, expected)


@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (2, 1, 8, 8, 4), (1, 2, 8, 8, 4), (8, 8, 4)])
def test_other_shapes_are_refused(shape):
    network = Oracle()
    with pytest.raises(ValueError) as caught:
        infer(torch.ones(shape), network)
    assert str(tuple(shape)) in str(caught.value) and "\n" not in str(caught.value) and not network.calls


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'euler'.*ddpm, ddim, dpmpp_2m"):
        DiffusionSampler(DIFFUSION, "euler")


def test_settings_tell_how_the_volume_was_made():
    generate = DiffusionSampler(DIFFUSION, "ddim", 25, {"eta": 1.0}, guidance_scale=1.5)
    assert VolumeInferer(generate, seed=4, noise_correlation=0.5).settings == {
        "sampler": "ddim",
        "sampling_steps": 25,
        "sampler_options": {"eta": 1.0},
        "guidance_scale": 1.5,
        "diffusion_steps": 1000,
        "seed": 4,
        "noise_correlation": 0.5,
        "precision": "float32",
    }


# ---------------------------------------------------------------------------------------------------- the guidance


class Known(nn.Module):
    """A denoiser whose answers with and without a label map are known, v among them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[torch.Tensor] = []
        self.sizes: list[int] = []

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.encoded.append(image)
        return (image == NO_CONDITION).float(), image / 16.0

    def answer(self, x, t, is_null, condition):
        time = t.view(-1, 1, 1, 1) / 1000
        noise = torch.where(is_null > 0, 0.3 * x, x - 0.5 * condition + time)
        return torch.cat([noise, torch.where(is_null > 0, -0.8, 0.4 * torch.sin(condition + time))], dim=1)

    def forward(self, x, timesteps, image=None, condition=None):
        self.sizes.append(len(x))
        return self.answer(x, timesteps, *condition)


def guided_slices(network, image, scale, sampler="ddpm", steps=6):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(image.shape, generator=generator)

    generate = DiffusionSampler(DIFFUSION, sampler, steps, guidance_scale=scale)
    with torch.no_grad():
        return generate(network, image, SliceNoise(draw(), draw), lambda: None)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_is_its_formula_and_the_variance_is_that_of_the_label_map(sampler, scale):
    network, image = Known(), label_volume(depth=3)[0].movedim(-1, 0)

    def by_hand(x, t):
        given = network.answer(x, t, torch.zeros(image.shape), image / 16.0)
        null = network.answer(x, t, torch.ones(image.shape), image / 16.0)
        noise = (1 - scale) * null[:, :1] + scale * given[:, :1]
        return torch.cat([noise, given[:, 1:]], dim=1)

    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(image.shape, generator=generator)

    expected = (SAMPLERS[sampler](by_hand, draw(), DIFFUSION, 6, draw) + 1) / 2
    torch.testing.assert_close(guided_slices(network, image, scale, sampler), expected, atol=1e-5, rtol=1e-5)
    assert network.sizes == [6] * 6  # one call a step, with both halves
    (encoded,) = network.encoded
    assert torch.equal(encoded[:3], image) and (encoded[3:] == NO_CONDITION).all() and len(encoded) == 6


def test_a_scale_of_one_asks_for_the_label_map_alone():
    network, image = Known(), label_volume(depth=3)[0].movedim(-1, 0)
    guided_slices(network, image, 1.0)
    assert network.sizes == [3] * 6 and torch.equal(network.encoded[0], image)


TINY = {
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_head_channels": 8,
    "num_res_blocks": 1,
    "norm_num_groups": 4,
}


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConditionalUNet(**TINY),
        lambda: ConditionalUNet("scalar", **TINY),
        lambda: GuidedUNet("mask", **TINY),
        lambda: GuidedUNet("edge", **TINY),
        lambda: SDMUNet(edges=True, **TINY),
        lambda: SDMUNet(cache_modulation=False, **TINY),
    ],
)
def test_every_denoiser_can_be_guided(build):
    torch.manual_seed(0)
    network, image = build(), label_volume(depth=2)[0].movedim(-1, 0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    start, t = torch.randn(image.shape), torch.tensor([3, 871])
    generate = DiffusionSampler(DIFFUSION, guidance_scale=3.0)
    generate.sampler = lambda model, x, *args, **options: model(x, t)
    with torch.no_grad():
        output = generate(network, image, SliceNoise(start, lambda: start), lambda: None) * 2 - 1
        given, null = network(start, t, image), network(start, t, torch.full_like(image, NO_CONDITION))
    torch.testing.assert_close(output[:, :1], 3 * given[:, :1] - 2 * null[:, :1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output[:, 1:], given[:, 1:], atol=1e-4, rtol=1e-4)
    assert ((given - null).abs().amax(dim=(0, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("scale", [0.0, 0.99, -1.5, float("nan"), float("inf")])
def test_an_impossible_guidance_is_refused(scale):
    with pytest.raises(ValueError, match=r"guidance_scale is .*: choose 1 \(no guidance\) or more"):
        DiffusionSampler(DIFFUSION, guidance_scale=scale)


# --------------------------------------------------------------------------------------------- a generator's pass


class Shows(nn.Module):
    """A generator whose slices show what it was given: id / 16 - 0.5, with its noise, `count` a pixel, averaged."""

    def __init__(self, count: int = 1, gain: float = 0.01) -> None:
        super().__init__()
        self.count, self.gain = count, gain
        self.sizes: list[int] = []

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (self.count, height, width)

    def forward(self, image, noise=None):
        assert noise.shape == (len(image), self.count, *image.shape[2:])
        self.sizes.append(len(image))
        return image / 16 - 0.5 + self.gain * noise.mean(dim=1, keepdim=True)


def generated(labels: torch.Tensor, network: nn.Module, **options) -> torch.Tensor:
    return VolumeInferer(GeneratorPass(), progress=False, **options)(labels, network)


def test_slices_of_a_generator_come_from_their_labels_out_of_network_space():
    labels = label_volume(depth=5)[:, :, :10]  # 10 rows, 16 columns
    pred = generated(labels, Shows(gain=0.0))
    expected = torch.where(labels.flatten(0, 3).any(0), (labels / 16 + 0.5) / 2, 0)
    assert pred.dtype == torch.float32
    torch.testing.assert_close(pred, expected, rtol=0, atol=1e-6)


def test_the_noise_of_a_generators_slice_is_standard_normal_and_its_own():
    labels = torch.ones(1, 1, 48, 40, 20, dtype=torch.uint8)
    pred = generated(labels, Shows(count=4), batch_size=6)
    noise = (pred[0, 0].double() * 2 - 1 - (1 / 16 - 0.5)) / 0.01 * 2  # the mean of four, times two
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    between = np.corrcoef(noise.flatten(0, 1).T.numpy())
    assert abs(between - np.eye(20)).max() < 5 / (48 * 40) ** 0.5


def test_a_generator_is_called_once_a_batch_and_not_for_air():
    network = Shows()
    pred = generated(label_volume(depth=12, empty=(0, 5)), network, batch_size=4)
    assert network.sizes == [4, 4, 2] and (pred[..., [0, 5]] == 0).all()


def test_fully_correlated_noise_gives_all_slices_of_a_generator_the_same():
    labels = torch.ones(1, 1, 8, 8, 6, dtype=torch.uint8)
    shared = generated(labels, Shows(), noise_correlation=1.0)
    assert torch.equal(shared, shared[..., :1].expand_as(shared)) and shared[..., 0].std() > 1e-3
    neighbours = generated(torch.ones(1, 1, 48, 48, 2, dtype=torch.uint8), Shows(), noise_correlation=0.6)
    assert abs(np.corrcoef(neighbours[0, 0].flatten(0, 1).T)[0, 1] - 0.6) < 4 * (1 - 0.6**2) / 48


def test_settings_of_a_generator_tell_how_the_volume_was_made():
    inferer = VolumeInferer(GeneratorPass(), seed=4, noise_correlation=0.5, amp=True)
    assert inferer.settings == {"seed": 4, "noise_correlation": 0.5, "precision": "bfloat16"}


@pytest.mark.parametrize(
    ("build", "is_noisy"),
    [
        (lambda: SPADEGenerator(channels=(4, 8)), False),
        (lambda: OASISGenerator(channels=(4, 8)), True),
        (lambda: Pix2PixGenerator(channels=(4, 8, 8)), True),
        (lambda: Pix2PixGenerator(channels=(4, 8, 8), dropout=False), False),
    ],
    ids=["spade", "oasis", "pix2pix", "pix2pix without dropout"],
)
def test_every_generator_makes_the_same_volume_whatever_the_batch_size(build, is_noisy):
    torch.manual_seed(0)
    network, labels = build(), torch.cat([label_volume(depth=5), torch.ones(1, 1, 16, 16, 2)], dim=-1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.train()
    for _ in range(3):  # spectral norm and BatchNorm's statistics follow the weights
        network(torch.randint(17, (4, 1, 16, 16)))
    network.eval()
    before = torch.get_rng_state()
    expected = generated(labels, network, batch_size=1)
    assert expected.std() > 0.01
    for batch_size in (2, 3, 64):
        torch.testing.assert_close(generated(labels, network, batch_size=batch_size), expected, rtol=0, atol=2e-4)
    assert torch.equal(torch.get_rng_state(), before)
    # Another seed, and the noise of two slices with the same labels, make a difference if there is noise at all.
    assert torch.allclose(generated(labels, network, seed=1), expected, rtol=0, atol=5e-3) == (not is_noisy)
    assert torch.allclose(expected[..., -1], expected[..., -2], rtol=0, atol=5e-3) == (not is_noisy)


def test_a_generator_in_bfloat16_gives_float32_close_by():
    torch.manual_seed(0)
    network, labels = OASISGenerator(channels=(4, 8)).eval(), label_volume(depth=3)
    full, half = (generated(labels, network, amp=amp) for amp in (False, True))
    assert half.dtype == torch.float32 and 0 < (full - half).abs().max() < 0.02


# ------------------------------------------------------------------------------------------------------- the noise


def noise(correlation: float = 0.0, seed: int = 0, case: str = "a", depth: int = 40, side: int = 64) -> VolumeNoise:
    return VolumeNoise(seed, case, (1, side, side), depth, correlation)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_slices_n_apart_correlate_by_rho_to_the_n(rho):
    start = noise(rho).start[:, 0].flatten(1).double()  # 40 slices of 4,096 pixels
    for lag in (1, 2, 3, 6):
        measured = (start[lag:] * start[:-lag]).mean().item()
        # Bartlett's variance of the mean of AR(1) products, over n pixels
        inflation = (1 + rho**2) / (1 - rho**2) + 2 * lag * rho ** (2 * lag)
        tolerance = 4 * ((1 + rho ** (2 * lag)) * inflation / ((40 - lag) * 4096)) ** 0.5
        assert measured == pytest.approx(rho**lag, abs=tolerance), lag


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 1.0])
def test_every_slice_stays_standard_normal(rho):
    start = noise(rho).start.flatten(1).double()
    assert (start.mean(1).abs() < 4.5 / 64).all()  # 4,096 pixels: standard error 1/64
    assert ((start.std(1) - 1).abs() < 4.5 / (64 * 2**0.5)).all()


def test_full_correlation_shares_the_start_and_not_the_later_noise():
    volume = noise(1.0, depth=5)
    assert torch.equal(volume.start, volume.start[:1].expand_as(volume.start))
    later = volume.of([0, 1], torch.device("cpu"))().flatten(1)
    assert abs(np.corrcoef(later.numpy())[0, 1]) < 0.06


def test_correlation_leaves_the_first_slice_and_the_later_noise_as_they_were():
    device = torch.device("cpu")
    a, b = noise(0.0, depth=4), noise(0.6, depth=4)
    assert torch.equal(a.start[0], b.start[0])
    assert torch.equal(a.of([2], device)(), b.of([2], device)())


def test_a_slice_gets_its_noise_whatever_stands_beside_it():
    device = torch.device("cpu")
    together, alone, deeper = noise(depth=6), noise(depth=6), noise(depth=9)
    batch = together.of([1, 4, 5], device)
    first, second = batch(), batch()
    assert not torch.equal(first, second)
    for place, k in enumerate((1, 4, 5)):
        for other in (alone, deeper):
            single = other.of([k], device)
            assert torch.equal(single.start[0], batch.start[place])
            assert torch.equal(single()[0], first[place]) and torch.equal(single()[0], second[place])


def test_noise_is_that_of_its_seed_and_case():
    base = noise(depth=3).start
    assert torch.equal(noise(depth=3).start, base)
    others = [noise(depth=3, **other) for other in ({"seed": 1}, {"seed": -1}, {"seed": 11}, {"case": "b"})]
    stack = torch.stack([base, *(other.start for other in others)]).flatten(1).numpy()
    assert abs(np.corrcoef(stack) - np.eye(5)).max() < 0.05  # 12,288 pixels


@pytest.mark.parametrize("rho", [-0.1, 1.01, float("nan")])
def test_an_impossible_correlation_is_refused(rho):
    with pytest.raises(ValueError, match=r"noise_correlation is .*0 .*1") as caught:
        noise(rho, depth=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sampler", "steps", "options", "message"),
    [
        ("ddim", 30, {}, "30 steps have no integer stride"),
        ("ddpm", 1, {}, "choose 2 to 1000 steps"),
        ("ddim", 50, {"eta": 1.5}, "eta is 1.5: choose a value from 0"),
        ("ddim", 50, {"spacing": "time"}, "no such option .*spacing.*mend sampler_options"),
        ("dpmpp_2m", 20, {"spacing": "even"}, "choose 'logsnr' or 'time'"),
    ],
)
def test_impossible_sampling_is_refused_before_any_work(sampler, steps, options, message):
    with pytest.raises(ValueError, match=message) as error:
        DiffusionSampler(GaussianDiffusion(), sampler, steps, options)
    assert "\n" not in str(error.value)


def test_the_network_works_on_plain_tensors():
    seen = []
    network = Shows()
    network.register_forward_pre_hook(lambda _, given: seen.append([type(value) for value in given]))
    generated(MetaTensor(torch.ones(1, 1, 4, 4, 2, dtype=torch.uint8)), network)
    assert seen == [[torch.Tensor, torch.Tensor]]
