"""How well each sampler does in a given number of steps, where the answer is known: `python -m benchmarks.samplers`.

The data is N(0.2, 0.1²), pixel by pixel, for which the exact noise prediction is a straight line. What a sampler makes
of it should have mean 0.2 and standard deviation 0.1. Prints a Markdown table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from common.diffusion import GaussianDiffusion
from common.samplers import ddim, ddpm, dpmpp_2m

MEAN, STD = 0.2, 0.1
STEPS = (1000, 250, 50, 25, 20, 10)
PIXELS = (1, 1, 512, 512)

diffusion = GaussianDiffusion()
log_alphas_cumprod = diffusion.alphas_cumprod.log().numpy()


def oracle(x: Tensor, t: Tensor, v: Callable[[float], float]) -> Tensor:
    """The noise that x holds on average, exactly, and v."""
    time = float(t[0])
    alpha = float(np.exp(np.interp(time, np.arange(1000), log_alphas_cumprod)))
    noise = (x - alpha**0.5 * MEAN) * (1 - alpha) ** 0.5 / (alpha * STD**2 + 1 - alpha)
    return torch.cat([noise, torch.full_like(x, v(time))], dim=1)


def trained_v(time: float) -> float:
    """The v that minimises the training loss: Σ is then the exact variance of x_{t−1} given x_t."""
    t = max(int(time), 1)
    alpha = diffusion.alphas_cumprod[t].item()
    remaining = STD**2 * (1 - alpha) / (alpha * STD**2 + 1 - alpha)  # variance of x_0 given x_t
    lower, upper = diffusion.posterior_variance[t].item(), diffusion.betas[t].item()
    exact = lower + diffusion.posterior_mean_coef1[t].item() ** 2 * remaining
    return 2 * float(np.log(exact / lower) / np.log(upper / lower)) - 1


def monai_sampler(scheduler_class: type, steps: int) -> Tensor:
    scheduler = scheduler_class(num_train_timesteps=1000, schedule="linear_beta", beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(steps)
    x = torch.randn(PIXELS)
    for t in scheduler.timesteps:
        noise = oracle(x, t[None], lambda time: 0.0)[:, :1]
        x, _ = scheduler.step(noise, int(t), x)
    return x


def our_sampler(sampler: Callable, v: Callable[[float], float], steps: int) -> Tensor:
    return sampler(partial(oracle, v=v), torch.randn(PIXELS), diffusion, steps, partial(torch.randn, PIXELS))


SAMPLERS = {
    "`ddpm`, variance as learned": partial(our_sampler, ddpm, trained_v),
    "`ddpm`, variance β̃ (v = −1)": partial(our_sampler, ddpm, lambda time: -1.0),
    "`ddpm`, variance β (v = 1)": partial(our_sampler, ddpm, lambda time: 1.0),
    "MONAI `DDPMScheduler`, variance β̃": partial(monai_sampler, DDPMScheduler),
    "`ddim`": partial(our_sampler, ddim, lambda time: 0.0),
    "MONAI `DDIMScheduler`": partial(monai_sampler, DDIMScheduler),
    "`dpmpp_2m`, evenly in log-SNR": partial(our_sampler, dpmpp_2m, lambda time: 0.0),
    "`dpmpp_2m`, evenly in time": partial(our_sampler, partial(dpmpp_2m, spacing="time"), lambda time: 0.0),
}


def main() -> None:
    print(f"Standard deviation (mean) of the samples; the truth is {STD} ({MEAN}).\n")
    print("| sampler | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |")
    print("|---|" + "---|" * len(STEPS))
    for name, sample in SAMPLERS.items():
        torch.manual_seed(0)
        cells = [f"{x.std():.3f} ({x.mean():.2f})" for x in map(sample, STEPS)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
