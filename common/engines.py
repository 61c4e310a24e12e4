"""What MONAI's engines lack: the question that a denoiser is trained on, and the two steps of a GAN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from monai.engines import PrepareBatch, Trainer
from monai.engines.workflow import Workflow
from monai.inferers import Inferer, SimpleInferer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn

from .diffusion import GaussianDiffusion, NoisySample
from .transforms import NO_CONDITION


def prepare_slices(
    batchdata: dict[str, Tensor], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Move `image` (B, 1, H, W) ids and `ct` (B, 1, H, W) in [0, 1] to the device, the CT into network space."""
    image, ct = (batchdata[key].to(device=device, non_blocking=non_blocking, **kwargs) for key in ("image", "ct"))
    return image, ct * 2 - 1


class PrepareNoisyBatch(PrepareBatch):
    """Move a batch to the device and noise its CT: `prepare_batch` of MONAI's `SupervisedTrainer`.

    With `SimpleInferer` the trainer then calls `network(x_t, t, image)` and `loss_function(output, NoisySample)`.
    t is uniform over the process (Nichol & Dhariwal 2021: importance sampling is for the pure L_vlb only).

    Args:
        diffusion: the process that adds the noise.
        condition_dropout: probability that a slice's whole label map becomes `NO_CONDITION`. A network fine-tuned with
            0.2 (SDM, Wang et al. 2022, arXiv 2207.00050) learns what classifier-free guidance asks of it.

    Raises:
        ValueError: `condition_dropout` is not in [0, 1).
    """

    def __init__(self, diffusion: GaussianDiffusion, condition_dropout: float = 0.0) -> None:
        if not 0 <= condition_dropout < 1:
            raise ValueError(f"condition_dropout is {condition_dropout}: choose 0 (never) or a probability below 1")
        self.diffusion = diffusion
        self.condition_dropout = condition_dropout

    def __call__(
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, NoisySample, tuple[torch.Tensor, torch.Tensor], dict]:
        """`image` (B, 1, H, W) ids and `ct` (B, 1, H, W) in [0, 1] to x_t, target, (t, image) and no keywords."""
        image, x_0 = prepare_slices(batchdata, device, non_blocking, **kwargs)
        t = torch.randint(len(self.diffusion), (len(x_0),), device=x_0.device)
        noise = torch.randn_like(x_0)
        x_t = self.diffusion.add_noise(x_0, noise, t)
        if self.condition_dropout:
            dropped = torch.rand(len(image), device=image.device) < self.condition_dropout
            image = image.masked_fill(dropped.view(-1, 1, 1, 1), NO_CONDITION)
        return x_t, NoisySample(x_0, noise, t, x_t), (t, image), {}


class Objective(Protocol):
    """What a GAN's two networks are trained for: the terms of each loss by name, weighted, to be summed.

    `image` are label maps (B, 1, H, W), `real` and `fake` slices in [-1, 1], alike.
    """

    def generator_terms(self, discriminator: nn.Module, image: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The generator's loss; gradients come to it through `fake`."""

    def discriminator_terms(
        self, discriminator: nn.Module, image: Tensor, real: Tensor, fake: Tensor
    ) -> dict[str, Tensor]:
        """The discriminator's loss; `fake` is a constant."""


class GANTrainer(Trainer):
    """Train a generator and a discriminator in turns: `SupervisedTrainer`'s sibling, which takes the same arguments.

    The discriminator's step never sees an outdated fake: when the generator goes first, its slices are made anew
    after its step (SPADE, OASIS); when it goes second, both steps share them (pix2pix).

    Args:
        device: where the networks are.
        max_epochs: epochs to run.
        epoch_length: iterations of an epoch.
        train_data_loader: batches with `image` and `ct`.
        network: the generator, `network(image)` gives slices (B, 1, H, W) in [-1, 1].
        discriminator: what the objective asks about slices.
        optimizer: the generator's.
        discriminator_optimizer: the discriminator's.
        objective: the two losses.
        order: "generator" and "discriminator", the one to step first first.
        prepare_batch: makes label maps and slices of a batch.
        inferer: how the generator is called.
        train_handlers: handlers to attach.
        amp: run the networks in lower precision.
        amp_kwargs: for `torch.autocast`. There is no gradient scaler: bfloat16, which needs none, is the type to use.
        compile: compile both networks.
        accumulation_steps: iterations whose gradients make one step. Of these the network that steps second meets
            the other as it was before the step in all but the last.

    After an iteration `state.output` has the sum of both losses as `loss`, and every term by its name in `terms`.
    MONAI's events within an iteration (`IterationEvents`) aren't fired: there is no one forward or loss.

    Raises:
        ValueError: another `order`, or no `accumulation_steps`.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        epoch_length: int,
        train_data_loader: Iterable,
        network: nn.Module,
        discriminator: nn.Module,
        optimizer: torch.optim.Optimizer,
        discriminator_optimizer: torch.optim.Optimizer,
        objective: Objective,
        order: Sequence[str] = ("generator", "discriminator"),
        prepare_batch: Callable = prepare_slices,
        inferer: Inferer | None = None,
        train_handlers: Sequence | None = None,
        amp: bool = False,
        amp_kwargs: dict | None = None,
        compile: bool = False,
        accumulation_steps: int = 1,
    ) -> None:
        if sorted(order) != ["discriminator", "generator"]:
            raise ValueError(f"order is {order}: name generator and discriminator once each")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps is {accumulation_steps}: choose 1 (a step each iteration) or more")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            prepare_batch=prepare_batch,
            non_blocking=True,
            handlers=train_handlers,
            amp=amp,
            amp_kwargs=amp_kwargs,
            decollate=False,
        )
        self.network = network
        self.discriminator = discriminator
        self.optimizer = optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.objective = objective
        self.inferer = inferer or SimpleInferer()
        self.generator_first = order[0] == "generator"
        self.accumulation_steps = accumulation_steps
        if compile:
            for part in (network, discriminator):
                getattr(part, "module", part).compile()  # what the generator's step calls too

    def run(self) -> None:
        """Train."""
        Workflow.run(self)  # MONAI's Trainer would make a gradient scaler

    def _iteration(self, engine: GANTrainer, batchdata: dict[str, Tensor]) -> dict:
        image, real = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        self.network.train()
        self.discriminator.train()
        fake = self._generate(image)
        if self.generator_first:
            terms = self._step_generator(image, real, fake)
            with torch.no_grad():
                fake = self._generate(image)
            terms |= self._step_discriminator(image, real, fake)
        else:
            terms = self._step_discriminator(image, real, fake.detach())
            terms |= self._step_generator(image, real, fake)
        return {Keys.IMAGE: image, Keys.LABEL: real, Keys.LOSS: torch.stack([*terms.values()]).sum(), "terms": terms}

    def _generate(self, image: Tensor) -> Tensor:
        with self._precision():
            return self.inferer(image, self.network)

    def _step_generator(self, image: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        # It only passes gradients on: its own aren't needed, nor to be averaged over processes.
        critic = getattr(self.discriminator, "module", self.discriminator).requires_grad_(False)
        with self._precision():
            terms = self.objective.generator_terms(critic, image, real, fake)
        critic.requires_grad_(True)
        return self._update(self.optimizer, "generator", terms)

    def _step_discriminator(self, image: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        with self._precision():
            terms = self.objective.discriminator_terms(self.discriminator, image, real, fake)
        return self._update(self.discriminator_optimizer, "discriminator", terms)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.state.device.type, enabled=self.amp, **self.amp_kwargs)

    def _update(self, optimizer: torch.optim.Optimizer, name: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Backward, and a step where an accumulation ends; returns the terms as constants under their full names."""
        (torch.stack([*terms.values()]).sum() / self.accumulation_steps).backward()
        iteration = (self.state.iteration - 1) % self.state.epoch_length + 1  # of this epoch
        if iteration % self.accumulation_steps == 0 or iteration == self.state.epoch_length:
            optimizer.step()
            optimizer.zero_grad()
        return {f"{name}/{term}": value.detach() for term, value in terms.items()}
