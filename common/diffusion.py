"""The Gaussian diffusion process: its tables, its posterior, and the hybrid loss that a denoiser learns from.

DDPM is Ho et al. 2020 (arXiv 2006.11239), improved DDPM is Nichol & Dhariwal 2021 (arXiv 2102.09672). Everything here
lives in network space: images are (B, 1, H, W) in [-1, 1], and a denoiser's output is (B, 2, H, W): the noise ε and v,
which places the variance of a reverse step between its two bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from monai.networks.schedulers import Scheduler
from torch import Tensor, nn

HALF_BIN = 1 / 255
"""Half the distance between two grey values of an 8-bit image scaled to [-1, 1]."""


def even_timesteps(n: int, num_train_timesteps: int = 1000) -> list[int]:
    """`n` timesteps spread evenly from the first to the last, both included (improved DDPM §4).

    Raises:
        ValueError: `n` is not in 2…`num_train_timesteps`.
    """
    if not 2 <= n <= num_train_timesteps:
        raise ValueError(f"cannot keep {n} of {num_train_timesteps} timesteps; choose 2 to {num_train_timesteps} steps")
    return [round(i * (num_train_timesteps - 1) / (n - 1)) for i in range(n)]


def ddim_timesteps(n: int, num_train_timesteps: int = 1000) -> list[int]:
    """`n` timesteps with an integer stride, from 0 (Song et al. 2021, arXiv 2010.02502, appendix D).

    Raises:
        ValueError: `n` is not a divisor (above 1) of `num_train_timesteps`; the message names the divisors.
    """
    divisors = [d for d in range(2, num_train_timesteps + 1) if num_train_timesteps % d == 0]
    if n not in divisors:
        choices = ", ".join(map(str, divisors))
        raise ValueError(
            f"{n} steps have no integer stride in {num_train_timesteps} timesteps; choose one of {choices}"
        )
    return list(range(0, num_train_timesteps, num_train_timesteps // n))


class GaussianDiffusion(Scheduler):
    """The process q that turns an image into noise, and its reverse with a learned range of variances.

    A MONAI `Scheduler`, so that MONAI's `DiffusionInferer` can train a plain `DiffusionModelUNet` with it. Its tables
    are float64 and on the CPU; what a tensor looks up in them is float32. An `index` counts the steps of this process:
    either a (B,) integer tensor, which looks up (B, 1, 1, 1) tensors, or an int for the whole batch, which looks up
    Python floats. The time a network is given is `timesteps[index]`; the two are equal in the full process.

    Args:
        num_train_timesteps: T, the number of steps of the full process. β is linear from 1e-4 to 0.02 for T = 1000
            (DDPM §4); for another T both ends are scaled by 1000/T, which keeps the noise at the last step.
        timesteps: the original timesteps that this process keeps, ascending; all of them when None. The steps between
            two kept ones are taken as one: β_i = 1 − ᾱ_i/ᾱ_{i−1} (improved DDPM §4).

    Raises:
        ValueError: `timesteps` are not two or more ascending integers in 0…T−1.
    """

    def __init__(self, num_train_timesteps: int = 1000, timesteps: Sequence[int] | None = None) -> None:
        super().__init__(num_train_timesteps)  # its tables are float32: all are replaced here
        self._float_tables: dict[tuple[str, torch.device], Tensor] = {}
        scale = 1000 / num_train_timesteps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_train_timesteps, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        kept = list(range(num_train_timesteps) if timesteps is None else timesteps)
        if len(kept) < 2 or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= num_train_timesteps:
            raise ValueError(
                f"timesteps must be two or more ascending integers in 0…{num_train_timesteps - 1}, got {kept}"
            )

        self.timesteps = torch.tensor(kept)
        self.alphas_cumprod = alphas_cumprod[self.timesteps]
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.alphas = self.alphas_cumprod / self.alphas_cumprod_prev
        self.betas = 1 - self.alphas

        # q(x_{t−1} | x_t, x_0), DDPM eq. 7
        signal, noise, noise_prev = self.alphas_cumprod, 1 - self.alphas_cumprod, 1 - self.alphas_cumprod_prev
        self.posterior_mean_coef1 = self.betas * self.alphas_cumprod_prev.sqrt() / noise
        self.posterior_mean_coef2 = noise_prev * self.alphas.sqrt() / noise
        self.posterior_variance = self.betas * noise_prev / noise
        # The first variance is 0; its logarithm is taken from the second.
        self.posterior_log_variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()
        self.log_betas = self.betas.log()

        self.sqrt_alphas_cumprod = signal.sqrt()
        self.sqrt_one_minus_alphas_cumprod = noise.sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / signal).sqrt()
        self.sqrt_recip_alphas_cumprod_minus_one = (noise / signal).sqrt()

    def __len__(self) -> int:
        """Number of steps of this process."""
        return len(self.timesteps)

    def respace(self, timesteps: Sequence[int]) -> GaussianDiffusion:
        """The process that keeps only these original timesteps of the full one (ascending; see the class)."""
        return GaussianDiffusion(self.num_train_timesteps, timesteps)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x_t of q(x_t | x_0) with the given standard normal noise (DDPM eq. 4).

        Args:
            original_samples: x_0, (B, 1, H, W).
            noise: like x_0.
            timesteps: indices of this process, (B,).
        """
        signal = self._at("sqrt_alphas_cumprod", timesteps)
        return signal * original_samples + self._at("sqrt_one_minus_alphas_cumprod", timesteps) * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·ε − √(1−ᾱ)·x_0 (Salimans & Ho 2022, arXiv 2202.00512); MONAI's own would make `alphas_cumprod` float32."""
        signal = self._at("sqrt_alphas_cumprod", timesteps)
        return signal * noise - self._at("sqrt_one_minus_alphas_cumprod", timesteps) * sample

    def predict_x0(self, x_t: Tensor, noise: Tensor, index: Tensor | int) -> Tensor:
        """The x_0 that x_t comes from if `noise` is what was added: x_t/√ᾱ − ε·√(1/ᾱ − 1), not clipped."""
        scale = self._at("sqrt_recip_alphas_cumprod", index)
        return scale * x_t - self._at("sqrt_recip_alphas_cumprod_minus_one", index) * noise

    def posterior(self, x_0: Tensor, x_t: Tensor, index: Tensor | int) -> tuple[Tensor, Tensor | float]:
        """Mean (B, 1, H, W) and log variance of q(x_{t−1} | x_t, x_0) (DDPM eq. 6 and 7)."""
        mean = self._at("posterior_mean_coef1", index) * x_0 + self._at("posterior_mean_coef2", index) * x_t
        return mean, self._at("posterior_log_variance", index)

    def model_distribution(
        self, output: Tensor, x_t: Tensor, index: Tensor | int, clip: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_{t−1} | x_t) as a denoiser's output says, in float32.

        Args:
            output: ε and v, (B, 2, H, W). v = −1 means the variance β̃, v = 1 means β, and between and beyond them the
                logarithm is linear in v (improved DDPM eq. 15).
            x_t: (B, 1, H, W).
            index: step of this process.
            clip: hold the predicted x_0, and thus the mean, to [-1, 1]: right in sampling, wrong in the loss.

        Returns:
            mean, log variance, predicted x_0, each (B, 1, H, W).
        """
        noise, v = output.float().chunk(2, dim=1)
        x_0 = self.predict_x0(x_t, noise, index)
        if clip:
            x_0 = x_0.clamp(-1, 1)
        mean, lowest = self.posterior(x_0, x_t, index)
        fraction = (v + 1) / 2
        return mean, fraction * self._at("log_betas", index) + (1 - fraction) * lowest, x_0

    def _at(self, table: str, index: Tensor | int) -> Tensor | float:
        if isinstance(index, int):
            return getattr(self, table)[index].item()
        # Copied to a device once: a copy makes the CPU wait for the GPU.
        if (table, index.device) not in self._float_tables:
            self._float_tables[table, index.device] = getattr(self, table).float().to(index.device)
        return self._float_tables[table, index.device][index].view(-1, 1, 1, 1)


class NoisySample(NamedTuple):
    """An image on its way to noise: what a denoiser was asked about.

    Attributes:
        x_0: the image in [-1, 1], (B, 1, H, W).
        noise: the standard normal noise that was added, like x_0.
        t: step of the process, (B,) integers.
        x_t: the noisy image, like x_0.
    """

    x_0: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor


class HybridLoss(nn.Module):
    """L_simple + L_vlb of improved DDPM (eq. 16): the noise is learned by the first, the variance by the second alone.

    The paper's λ = 0.001 belongs to a whole variational bound of T ≈ 1000 terms; with one term at a time, drawn
    uniformly, the weight is 1. Computed in float32 also under autocast.
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.diffusion = diffusion

    def forward(self, output: Tensor, target: NoisySample) -> Tensor:
        """Loss of each sample, (B,), from a denoiser's output ε and v, (B, 2, H, W)."""
        noise, v = output.float().chunk(2, dim=1)
        simple = (noise - target.noise.float()).square().flatten(1).mean(dim=1)
        return simple + self.bound(torch.cat([noise.detach(), v], dim=1), target)

    def bound(self, output: Tensor, target: NoisySample) -> Tensor:
        """One term of the variational bound in bits per pixel, (B,): L_{t−1}, or L_0 where t is 0 (DDPM eq. 5)."""
        x_0, x_t = target.x_0.float(), target.x_t.float()
        true_mean, true_log_variance = self.diffusion.posterior(x_0, x_t, target.t)
        mean, log_variance, _ = self.diffusion.model_distribution(output, x_t, target.t, clip=False)
        divergence = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        surprise = -discretised_gaussian_log_likelihood(x_0, mean, log_variance)
        is_first = (target.t == 0).view(-1, 1, 1, 1)
        return torch.where(is_first, surprise, divergence).flatten(1).mean(dim=1) / math.log(2)


def gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q‖p) of two normal distributions in nats, element by element."""
    difference = log_variance_q - log_variance_p
    return 0.5 * (difference.exp() - 1 - difference + (mean_q - mean_p).square() * (-log_variance_p).exp())


def discretised_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability in nats that a normal variable falls into the grey value bin of x (DDPM eq. 13).

    A bin reaches `HALF_BIN` to both sides; those of the first and last grey value (x beyond ±0.999) are open outwards.
    Probabilities are held above 1e-12.
    """
    precision = (-0.5 * log_variance).exp()
    above = _normal_cdf((x + HALF_BIN - mean) * precision)
    below = _normal_cdf((x - HALF_BIN - mean) * precision)
    above = torch.where(x > 0.999, torch.ones_like(above), above)
    below = torch.where(x < -0.999, torch.zeros_like(below), below)
    return (above - below).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function (Page 1977), within 3e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
