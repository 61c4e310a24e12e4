"""From a label volume to a CT volume, slice by slice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from tqdm import tqdm

from .diffusion import GaussianDiffusion
from .labels import BACKGROUND
from .samplers import SAMPLERS
from .transforms import NO_CONDITION


class VolumeNoise:
    """Standard normal noise for the slices of a volume, each slice from a generator of its own.

    The generators run on the CPU and are seeded from (seed, case, slice), so that a slice gets the same noise whatever
    the batch size, the device and the other slices are.

    Args:
        seed: the user's seed.
        case: what names the volume.
        shape: of a slice's noise.
        depth: number of slices.
        correlation: ρ in [0, 1] between the starting noise of neighbouring slices. Along the volume it is a first-order
            autoregressive process, z_k = ρ z_{k-1} + √(1-ρ²) ε_k: slices n apart correlate by ρⁿ, and every slice
            stays standard normal. 1 gives all slices the same starting noise.
    """

    def __init__(self, seed: int, case: str, shape: Sequence[int], depth: int, correlation: float = 0.0) -> None:
        if not 0 <= correlation <= 1:
            raise ValueError(f"noise_correlation is {correlation}: choose a value from 0 (independent) to 1 (shared)")
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(_derived_seed(seed, case, k)) for k in range(depth)]
        self.start = torch.stack([self._draw(k) for k in range(depth)])
        for k in range(1, depth if correlation else 0):
            self.start[k] = correlation * self.start[k - 1] + math.sqrt(1 - correlation**2) * self.start[k]

    def of(self, slices: Sequence[int], device: torch.device) -> SliceNoise:
        """Noise for a batch of these slices."""
        return SliceNoise(
            self.start[slices].to(device), lambda: torch.stack([self._draw(k) for k in slices]).to(device)
        )

    def _draw(self, k: int) -> Tensor:
        return torch.randn(self.shape, generator=self.generators[k])


class SliceNoise:
    """Noise of a batch of B slices: `start` to begin with, and fresh noise at every call, both (B, *shape)."""

    def __init__(self, start: Tensor, draw: Callable[[], Tensor]) -> None:
        self.start = start
        self._draw = draw

    def __call__(self) -> Tensor:
        return self._draw()


class DiffusionSampler:
    """A denoiser as a generator of slices: the label map is encoded once and reused in every step.

    Args:
        diffusion: the process that the denoiser was trained with.
        sampler: "ddpm", "ddim" or "dpmpp_2m" (see `samplers`).
        steps: calls of the network.
        options: further options of the sampler, `{"eta": 1.0}` of ddim or `{"spacing": "time"}` of dpmpp_2m.
        guidance_scale: s of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598). Above 1 the network, which
            has to be trained with `condition_dropout`, is also asked without a label map, in the same call on twice as
            many slices, and ε = ε₀ + s·(ε_c − ε₀); v is that of the label map. 1 is no guidance.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        sampler: str = "dpmpp_2m",
        steps: int = 20,
        options: dict | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if not 1 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale is {guidance_scale}: choose 1 (no guidance) or more, such as 1.5")
        self.diffusion = diffusion
        self.sampler = SAMPLERS[sampler]
        self.steps = steps
        self.options = options or {}
        self.guidance_scale = guidance_scale
        self._rehearse()

    def _rehearse(self) -> None:
        """Sample a single pixel, so that impossible steps and options are found before any work."""
        pixel, output = torch.zeros(1, 1, 1, 1), torch.zeros(1, 2, 1, 1)
        try:
            self.sampler(lambda x, t: output, pixel, self.diffusion, self.steps, pixel.clone, **self.options)
        except TypeError as error:
            raise ValueError(f"{self.sampler.__name__} has no such option ({error}): mend sampler_options") from error

    def noise_shape(self, network: nn.Module, size: Sequence[int]) -> tuple[int, ...]:
        """What noise a slice of these rows and columns takes: as much as it has pixels."""
        return (1, *size)

    @property
    def settings(self) -> dict:
        """What a report says about how a slice was made."""
        return {
            "sampler": self.sampler.__name__,
            "sampling_steps": self.steps,
            "sampler_options": self.options,
            "guidance_scale": self.guidance_scale,
            "diffusion_steps": self.diffusion.num_train_timesteps,
        }

    def __call__(self, network: nn.Module, image: Tensor, noise: SliceNoise, callback: Callable[[], None]) -> Tensor:
        """Label maps (B, 1, H, W) to CT slices (B, 1, H, W) in [0, 1]; `callback` is called after each step."""
        guided = self.guidance_scale > 1
        condition = network.encode(torch.cat([image, torch.full_like(image, NO_CONDITION)]) if guided else image)

        def model(x: Tensor, t: Tensor) -> Tensor:
            if not guided:
                return network(x, t, condition=condition)
            given, null = network(x.repeat(2, 1, 1, 1), t.repeat(2), condition=condition).float().chunk(2)
            (noise, v), null_noise = given.chunk(2, dim=1), null[:, :1]
            return torch.cat([null_noise + self.guidance_scale * (noise - null_noise), v], dim=1)

        x = self.sampler(model, noise.start, self.diffusion, self.steps, noise, callback=callback, **self.options)
        return (x.float() + 1) / 2


class GeneratorPass:
    """A GAN's generator as a generator of slices: one call of the network makes them.

    Args:
        settings: what a report says about how a slice was made, besides what it says of every volume.
    """

    steps = 1

    def __init__(self, settings: dict | None = None) -> None:
        self.settings = settings or {}

    def noise_shape(self, network: nn.Module, size: Sequence[int]) -> tuple[int, ...]:
        """What noise a slice of these rows and columns takes: the network knows."""
        return network.noise_shape(*size)

    def __call__(self, network: nn.Module, image: Tensor, noise: SliceNoise, callback: Callable[[], None]) -> Tensor:
        """Label maps (B, 1, H, W) to CT slices (B, 1, H, W) in [0, 1]."""
        fake = network(image, noise.start)
        callback()
        return (fake.float() + 1) / 2


class VolumeInferer(Inferer):
    """Turn a label volume on the network grid into a CT volume, in batches of axial slices.

    Slices without a body are air and cost nothing. The noise is seeded from the label volume itself: the same mask and
    seed give the same CT, whatever the file is called, up to the rounding of another batch size or device.

    Args:
        generate: what makes the slices, `generate(network, image, noise, callback)`: a `DiffusionSampler` or a
            `GeneratorPass`.
        batch_size: slices at a time.
        seed: of the noise.
        noise_correlation: between the starting noise of neighbouring slices, see `VolumeNoise`.
        amp: run the network in bfloat16.
        progress: show a bar with the time left.
    """

    def __init__(
        self,
        generate: DiffusionSampler | GeneratorPass,
        batch_size: int = 16,
        seed: int = 0,
        noise_correlation: float = 0.0,
        amp: bool = False,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: choose 1 or more slices at a time")
        self.generate = generate
        self.batch_size = batch_size
        self.seed = seed
        self.noise_correlation = noise_correlation
        self.amp = amp
        self.progress = progress

    @property
    def settings(self) -> dict:
        """What a report says about how a volume was made."""
        return {
            **self.generate.settings,
            "seed": self.seed,
            "noise_correlation": self.noise_correlation,
            "precision": "bfloat16" if self.amp else "float32",
        }

    @torch.no_grad()
    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Label volume (1, 1, H, W, D) of ids to CT (1, 1, H, W, D) float32 in [0, 1]; 0 is air.

        Raises:
            ValueError: more than one volume or channel at once.
        """
        if inputs.ndim != 5 or inputs.shape[:2] != (1, 1):
            raise ValueError(f"give one label volume (1, 1, H, W, D) at a time, not {tuple(inputs.shape)}")
        # Without MONAI's meta data, which would cost milliseconds in every step.
        labels = convert_to_tensor(inputs, track_meta=False)[0].movedim(-1, 0).to(torch.uint8)  # (D, 1, H, W)
        occupied = (labels != BACKGROUND).flatten(1).any(dim=1).nonzero().flatten().tolist()
        case = hashlib.sha256(labels.cpu().contiguous().numpy().tobytes()).hexdigest()
        shape = self.generate.noise_shape(network, labels.shape[2:])
        noise = VolumeNoise(self.seed, case, shape, len(labels), self.noise_correlation)

        batches = [occupied[i : i + self.batch_size] for i in range(0, len(occupied), self.batch_size)]
        pred = torch.zeros_like(inputs, dtype=torch.float32)
        calls = len(batches) * self.generate.steps
        with (
            tqdm(total=calls, desc="sampling", unit="step", disable=not self.progress) as bar,
            torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=self.amp),
        ):
            for batch in batches:
                slices = self.generate(network, labels[batch], noise.of(batch, labels.device), bar.update)
                pred[0, 0, :, :, batch] = slices[:, 0].movedim(0, -1).clamp(0, 1)
        return pred


def _derived_seed(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
