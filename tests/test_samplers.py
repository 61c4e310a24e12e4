"""Samplers against data whose samples are known exactly.

For data N(0.2, 0.1²) the best noise prediction is a straight line in x_t, so each sampler is a chain of straight lines,
and the standard deviation of its samples follows by recursion. The recursions here are written from the formulas, with
nothing of the project in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from common.diffusion import GaussianDiffusion
from common.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m

MEAN, STD = 0.2, 0.1
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
DIFFUSION = GaussianDiffusion()


def alpha_at(t: float) -> float:
    """ᾱ at a timestep that may be fractional."""
    return float(np.exp(np.interp(t, np.arange(1000), np.log(ALPHAS_CUMPROD))))


def exact_epsilon(x: torch.Tensor, t: float) -> torch.Tensor:
    alpha = alpha_at(t)
    return (x - math.sqrt(alpha) * MEAN) * math.sqrt(1 - alpha) / (alpha * STD**2 + 1 - alpha)


def exact_x0_slope(t: float) -> float:
    """Slope of E[x_0 | x_t], a straight line through the two means."""
    alpha = alpha_at(t)
    return math.sqrt(alpha) * STD**2 / (alpha * STD**2 + 1 - alpha)


def oracle(v: Callable[[float], float] = lambda t: 0.0) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The perfect denoiser of this data."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([exact_epsilon(x, t[0].item()), torch.full_like(x, v(t[0].item()))], dim=1)

    return model


class Noise:
    """A seeded source that counts its calls."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.calls = shape, 0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.randn(self.shape, generator=self.generator)


def pairs(timesteps: list[int]) -> list[tuple[int, float, float]]:
    """(t, ᾱ_t, ᾱ of the kept step below it), from the noisiest on."""
    below = [1.0, *ALPHAS_CUMPROD[timesteps[:-1]]]
    return list(zip(timesteps, ALPHAS_CUMPROD[timesteps], below, strict=True))[::-1]


def kept(steps: int) -> list[int]:
    return [round(i * 999 / (steps - 1)) for i in range(steps)]


def variance_bounds(alpha: float, alpha_prev: float) -> tuple[float, float]:
    beta = 1 - alpha / alpha_prev
    return beta * (1 - alpha_prev) / (1 - alpha), beta


def trained_v(t: float) -> float:
    """The v that minimises the training loss: Σ is the variance of x_{t−1} given x_t, x_0 being uncertain."""
    t = max(int(t), 1)
    alpha, alpha_prev = ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[t - 1]
    lower, upper = variance_bounds(alpha, alpha_prev)
    uncertainty = 1 / (1 / STD**2 + alpha / (1 - alpha))
    exact = lower + alpha_prev * upper**2 / (1 - alpha) ** 2 * uncertainty
    return 2 * math.log(exact / lower) / math.log(upper / lower) - 1


def ddpm_std(steps: int, v: Callable[[float], float]) -> float:
    variance = 1.0
    for t, alpha, alpha_prev in pairs(kept(steps)):
        lower, beta = variance_bounds(alpha, alpha_prev)
        x0_weight = math.sqrt(alpha_prev) * beta / (1 - alpha)
        slope = x0_weight * exact_x0_slope(t) + math.sqrt(alpha / alpha_prev) * (1 - alpha_prev) / (1 - alpha)
        fraction = (v(t) + 1) / 2
        variance = slope**2 * variance + (beta**fraction * lower ** (1 - fraction) if t > 0 else 0)
    return math.sqrt(variance)


def ddim_std(steps: int, eta: float) -> float:
    variance = 1.0
    for t, alpha, alpha_prev in pairs(list(range(0, 1000, 1000 // steps))):
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
        epsilon_slope = (1 - math.sqrt(alpha) * exact_x0_slope(t)) / math.sqrt(1 - alpha)
        slope = math.sqrt(alpha_prev) * exact_x0_slope(t) + math.sqrt(1 - alpha_prev - sigma**2) * epsilon_slope
        variance = slope**2 * variance + sigma**2
    return math.sqrt(variance)


def solver_std(times: list[float]) -> float:
    """DPM-Solver++(2M) at these times; the slope of each quantity in the starting noise."""
    x, x0_before, step_before = 1.0, 0.0, math.inf
    for t, t_next in pairwise(times):
        alpha, alpha_next = alpha_at(t), alpha_at(t_next)
        step = 0.5 * math.log(alpha_next / (1 - alpha_next)) - 0.5 * math.log(alpha / (1 - alpha))
        r = step_before / step
        x0 = exact_x0_slope(t) * x
        data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        x = math.sqrt((1 - alpha_next) / (1 - alpha)) * x - math.sqrt(alpha_next) * (math.exp(-step) - 1) * data
        x0_before, step_before = x0, step
    return abs(exact_x0_slope(times[-1]) * x)


def slope(sampler: Callable, steps: int, **options) -> float:
    """Standard deviation of a deterministic sampler: what it makes of two points of N(0, 1), two apart."""
    low, high = sampler(oracle(), torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), DIFFUSION, steps, Noise(2), **options)
    return (high - low).item() / 2


# known standard deviations


@pytest.mark.parametrize("v", [lambda t: -1.0, lambda t: 1.0, trained_v], ids=["smallest", "largest", "trained"])
@pytest.mark.parametrize("steps", [1000, 250, 50, 25])
def test_ddpm_samples_are_those_of_its_chain(steps, v):
    noise = Noise(1, 1, 200, 200)
    sample = ddpm(oracle(v), noise(), DIFFUSION, steps, noise)
    assert sample.std().item() == pytest.approx(ddpm_std(steps, v), rel=0.02)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.005)


@pytest.mark.parametrize(("steps", "known"), [(250, 0.089), (50, 0.068), (25, 0.052)])
def test_ddpm_with_the_smallest_variance_gives_the_known_values(steps, known):
    """Too little noise for few steps: a property of the sampler, not of this code."""
    assert ddpm_std(steps, lambda t: -1.0) == pytest.approx(known, abs=5e-4)


def test_ddpm_with_the_trained_variance_is_right_in_the_full_process():
    noise = Noise(1, 1, 200, 200)
    assert ddpm(oracle(trained_v), noise(), DIFFUSION, 1000, noise).std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("steps", [250, 50, 25])
def test_ddim_samples_are_those_of_its_chain(steps):
    assert slope(ddim, steps) == pytest.approx(ddim_std(steps, eta=0), rel=1e-3)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_samples_are_those_of_its_chain(eta):
    noise = Noise(1, 1, 200, 200)
    sample = ddim(oracle(), noise(), DIFFUSION, 50, noise, eta=eta)
    assert sample.std().item() == pytest.approx(ddim_std(50, eta), rel=0.02)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.005)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_solver_reaches_the_truth_in_few_steps(steps):
    noise = Noise(1, 1, 500, 400)
    sample = dpmpp_2m(oracle(), noise(), DIFFUSION, steps, noise)
    assert sample.std().item() == pytest.approx(STD, rel=0.02)
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.002)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_solver_on_even_times_is_its_own_recursion(steps):
    expected = solver_std(np.linspace(999, 0, steps).tolist())
    # x_0 at t = 999 is a small difference of numbers 157 times as large: float32 leaves 1e-4.
    assert slope(dpmpp_2m, steps, spacing="time") == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_solver_is_of_second_order():
    """Towards the exact flow, which scales the noise by the ratio of the data's spreads at both ends."""
    spread = [math.sqrt(alpha * STD**2 + 1 - alpha) for alpha in (alpha_at(0), alpha_at(999))]
    exact = exact_x0_slope(0) * spread[0] / spread[1]
    errors = [abs(slope(dpmpp_2m, steps) - exact) for steps in (51, 101, 201)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


# what the model and the caller see


def record(sampler: Callable, steps: int, **options) -> list[torch.Tensor]:
    times = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t)
        return oracle()(x, t)

    sampler(model, torch.zeros(3, 1, 2, 2), DIFFUSION, steps, Noise(3, 1, 2, 2), **options)
    assert all(t.shape == (3,) and (t == t[0]).all() for t in times)
    return [t[0].item() for t in times]


def test_model_is_given_original_timesteps():
    assert record(ddpm, 25) == kept(25)[::-1]
    assert record(ddim, 25) == list(range(960, -1, -40))
    assert record(dpmpp_2m, 4, spacing="time") == [999, 666, 333, 0]


def test_solver_spaces_its_calls_evenly_in_log_snr():
    times = record(dpmpp_2m, 12)
    alphas = [alpha_at(t) for t in times]
    assert (times[0], times[-1]) == (999, 0)
    np.testing.assert_allclose(np.diff([0.5 * math.log(a / (1 - a)) for a in alphas]), 9.663959 / 11, rtol=1e-4)


def test_a_shorter_training_process_is_followed():
    diffusion, times = GaussianDiffusion(100), []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t[0].item())
        return torch.zeros(1, 2, 2, 2)

    for sampler in (partial(ddpm, steps=4), partial(ddim, steps=4), partial(dpmpp_2m, steps=4, spacing="time")):
        sampler(model, torch.zeros(1, 1, 2, 2), diffusion, noise=Noise(1, 1, 2, 2))
    assert times == [99, 66, 33, 0, 75, 50, 25, 0, 99, 66, 33, 0]


@pytest.mark.parametrize(
    ("sampler", "draws"),
    [(ddpm, 4), (ddim, 0), (partial(ddim, eta=1.0), 4), (dpmpp_2m, 0)],
    ids=["ddpm", "ddim", "ddim with eta 1", "dpmpp_2m"],
)
def test_noise_is_drawn_once_between_two_steps_or_never(sampler, draws):
    noise, calls = Noise(1, 1, 4, 4), []
    sampler(oracle(), torch.zeros(1, 1, 4, 4), DIFFUSION, 5, noise, callback=lambda: calls.append(noise.calls))
    assert noise.calls == draws and calls == [min(i, draws) for i in range(1, 6)]


# a model that is not tame


def wild(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Bent and far too large, so that x_0 is clipped at many steps."""
    return torch.cat([3 * torch.sin(5 * x) - 0.5 * x + 0.001 * t[0], torch.cos(3 * x)], dim=1)


def by_hand(name: str, x: float, draws: list[float]) -> float:
    """One pixel through 5 steps of each sampler, from the formulas."""

    def x0_of(x: float, t: float) -> tuple[float, float]:
        epsilon = 3 * math.sin(5 * x) - 0.5 * x + 0.001 * t
        x_0 = (x - math.sqrt(1 - alpha_at(t)) * epsilon) / math.sqrt(alpha_at(t))
        return min(max(x_0, -1), 1), math.cos(3 * x)

    draws = iter(draws)
    if name == "ddpm":
        for t, alpha, alpha_prev in pairs(kept(5)):
            x_0, v = x0_of(x, t)
            lower, beta = variance_bounds(alpha, alpha_prev)
            x = (
                math.sqrt(alpha_prev) * beta / (1 - alpha) * x_0
                + math.sqrt(alpha / alpha_prev) * (1 - alpha_prev) / (1 - alpha) * x
            )
            if t > 0:
                x += math.sqrt(beta ** ((v + 1) / 2) * lower ** ((1 - v) / 2)) * next(draws)
        return x
    if name == "ddim":
        for t, alpha, alpha_prev in pairs(list(range(0, 1000, 200))):
            x_0, _ = x0_of(x, t)
            sigma = 0.7 * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
            epsilon = (x / math.sqrt(alpha) - x_0) / math.sqrt(1 / alpha - 1)
            x = math.sqrt(alpha_prev) * x_0 + math.sqrt(1 - alpha_prev - sigma**2) * epsilon
            x += sigma * next(draws) if t > 0 else 0
        return x
    times = [999, 749.25, 499.5, 249.75, 0]
    lambdas = [0.5 * math.log(alpha_at(t) / (1 - alpha_at(t))) for t in times]
    data = [x0_of(x, times[0])[0]]
    for i in range(1, 5):
        h, change = lambdas[i] - lambdas[i - 1], data[-1]
        if i > 1:
            change += h / (2 * (lambdas[i - 1] - lambdas[i - 2])) * (data[-1] - data[-2])
        x = math.sqrt((1 - alpha_at(times[i])) / (1 - alpha_at(times[i - 1]))) * x
        x -= math.sqrt(alpha_at(times[i])) * (math.exp(-h) - 1) * change
        data.append(x0_of(x, times[i])[0])
    return data[-1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_pixel_follows_the_formulas_where_x0_is_clipped(name):
    options = {"ddpm": {}, "ddim": {"eta": 0.7}, "dpmpp_2m": {"spacing": "time"}}[name]
    start, noise, draws = torch.linspace(-2, 2, 9).view(1, 1, 3, 3), Noise(1, 1, 3, 3), []

    def remembered() -> torch.Tensor:
        draws.append(noise())
        return draws[-1]

    sample = SAMPLERS[name](wild, start, DIFFUSION, 5, remembered, **options)
    by_pixel = torch.cat([start, *draws]).flatten(1).T.tolist()
    expected = [by_hand(name, x, pixel_draws) for x, *pixel_draws in by_pixel]
    assert sample.flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert sample.abs().max() <= 1


def test_impossible_steps_and_spacings_name_the_remedy():
    for sampler, steps, remedy in ((ddpm, 1, "2 to 1000"), (ddim, 30, "20, 25, 40"), (dpmpp_2m, 0, "1 or more")):
        with pytest.raises(ValueError, match=remedy):
            record(sampler, steps)
    with pytest.raises(ValueError, match="'logsnr' or 'time'"):
        record(dpmpp_2m, 5, spacing="karras")
