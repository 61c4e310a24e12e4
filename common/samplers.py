"""Samplers: from noise to an image, as functions of one signature.

    sampler(model, x, diffusion, steps, noise, *, callback=None, **options) -> image

Args of each sampler:
    model: `model(x_t, t)` with x_t (B, 1, H, W) and t a (B,) tensor of original timesteps, integer or (`dpmpp_2m`)
        float; returns ε and v, (B, 2, H, W). It already knows the label map.
    x: standard normal noise to start from, (B, 1, H, W), float32.
    diffusion: the full process that the model was trained with.
    steps: number of calls of the model.
    noise: `noise()` returns fresh standard normal noise like x; the caller owns the seeds, nothing random is drawn
        here. `ddpm`, and `ddim` when eta > 0, call it once per step but the last; `dpmpp_2m` is deterministic.
    callback: called without arguments after each step.
The result is an image in [-1, 1], like x. An impossible number of steps is a ValueError that says what is possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .diffusion import GaussianDiffusion, ddim_timesteps, even_timesteps

Model = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def ddpm(
    model: Model,
    x: Tensor,
    diffusion: GaussianDiffusion,
    steps: int,
    noise: Callable[[], Tensor],
    *,
    callback: Callable[[], None] | None = None,
) -> Tensor:
    """Ancestral sampling with the learned variance (DDPM algorithm 2; fewer steps: improved DDPM §4)."""
    process = diffusion.respace(even_timesteps(steps, diffusion.num_train_timesteps))
    for i, t in reversed(list(enumerate(process.timesteps.tolist()))):
        output = model(x, _times(x, t))
        mean, log_variance, _ = process.model_distribution(output, x, i, clip=True)
        x = mean + (0.5 * log_variance).exp() * noise() if i > 0 else mean
        if callback:
            callback()
    return x


@torch.no_grad()
def ddim(
    model: Model,
    x: Tensor,
    diffusion: GaussianDiffusion,
    steps: int,
    noise: Callable[[], Tensor],
    *,
    eta: float = 0.0,
    callback: Callable[[], None] | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16): deterministic for eta = 0; `steps` divides T."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: choose a value from 0 (deterministic) to 1 (as noisy as ddpm)")
    process = diffusion.respace(ddim_timesteps(steps, diffusion.num_train_timesteps))
    for i, t in reversed(list(enumerate(process.timesteps.tolist()))):
        alpha, alpha_prev = process.alphas_cumprod[i].item(), process.alphas_cumprod_prev[i].item()
        x_0 = process.predict_x0(x, _predicted_noise(model, x, t), i).clamp(-1, 1)
        epsilon = (x - math.sqrt(alpha) * x_0) / math.sqrt(1 - alpha)  # again: the clipped x_0 implies another noise
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        x = math.sqrt(alpha_prev) * x_0 + math.sqrt(1 - alpha_prev - sigma**2) * epsilon
        if sigma > 0:
            x = x + sigma * noise()
        if callback:
            callback()
    return x


@torch.no_grad()
def dpmpp_2m(
    model: Model,
    x: Tensor,
    diffusion: GaussianDiffusion,
    steps: int,
    noise: Callable[[], Tensor],
    *,
    spacing: str = "logsnr",
    callback: Callable[[], None] | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2); the last call of the model gives the image.

    Args:
        spacing: the calls lie between t = T−1 and t = 0, evenly in "logsnr" λ = log(α/σ), which is best for few steps,
            or evenly in "time". Timesteps are fractional: between two integers log ᾱ is linear in t.
    """
    times, alphas, sigmas, lambdas = _solver_grid(diffusion, steps, spacing)
    x_0 = x_0_before = None
    for i, t in enumerate(times):
        epsilon = _predicted_noise(model, x, t)
        x_0 = ((x - sigmas[i] * epsilon) / alphas[i]).clamp(-1, 1)
        if i + 1 < steps:
            step = lambdas[i + 1] - lambdas[i]
            data = x_0
            if i > 0:
                half_inverse_ratio = step / (lambdas[i] - lambdas[i - 1]) / 2
                data = x_0 + half_inverse_ratio * (x_0 - x_0_before)
            x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-step) * data
            x_0_before = x_0
        if callback:
            callback()
    return x_0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
"""The samplers by name."""


def _solver_grid(
    diffusion: GaussianDiffusion, steps: int, spacing: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """t, α, σ and λ = log(α/σ) of each call of the model, from the noisiest to the cleanest."""
    if steps < 1:
        raise ValueError(f"cannot sample in {steps} steps; choose 1 or more")
    table_times = diffusion.timesteps.numpy().astype(np.float64)
    table_log_alphas = 0.5 * diffusion.alphas_cumprod.log().numpy()
    if spacing == "logsnr":
        ends = table_log_alphas[[-1, 0]]
        ends = ends - 0.5 * np.log(-np.expm1(2 * ends))
        log_alphas = -0.5 * np.log1p(np.exp(-2 * np.linspace(*ends, steps)))
        times = np.interp(log_alphas, table_log_alphas[::-1], table_times[::-1])
    elif spacing == "time":
        times = np.linspace(table_times[-1], table_times[0], steps)
        log_alphas = np.interp(times, table_times, table_log_alphas)
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose 'logsnr' or 'time'")
    alphas, sigmas = np.exp(log_alphas), np.sqrt(-np.expm1(2 * log_alphas))
    return times.tolist(), alphas.tolist(), sigmas.tolist(), np.log(alphas / sigmas).tolist()


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device)


def _predicted_noise(model: Model, x: Tensor, t: float) -> Tensor:
    return model(x, _times(x, t))[:, :1].float()
