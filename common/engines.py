"""What MONAI's engines lack: how a batch becomes the question that a denoiser is trained on."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import PrepareBatch

from .diffusion import GaussianDiffusion, NoisySample


class PrepareNoisyBatch(PrepareBatch):
    """Move a batch to the device and noise its CT: `prepare_batch` of MONAI's `SupervisedTrainer`.

    With `SimpleInferer` the trainer then calls `network(x_t, t, image)` and `loss_function(output, NoisySample)`.
    t is uniform over the process (Nichol & Dhariwal 2021: importance sampling is for the pure L_vlb only).

    Args:
        diffusion: the process that adds the noise.
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion

    def __call__(
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, NoisySample, tuple[torch.Tensor, torch.Tensor], dict]:
        """`image` (B, 1, H, W) ids and `ct` (B, 1, H, W) in [0, 1] to x_t, target, (t, image) and no keywords."""
        image = batchdata["image"].to(device=device, non_blocking=non_blocking, **kwargs)
        x_0 = batchdata["ct"].to(device=device, non_blocking=non_blocking, **kwargs) * 2 - 1
        t = torch.randint(len(self.diffusion), (len(x_0),), device=x_0.device)
        noise = torch.randn_like(x_0)
        x_t = self.diffusion.add_noise(x_0, noise, t)
        return x_t, NoisySample(x_0, noise, t, x_t), (t, image), {}
