"""Trainings as the bundles' train.yaml build them, tiny: of a denoiser and of a GAN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.engines import SupervisedTrainer, Trainer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from common.checkpoints import Checkpoints
from common.data import ShuffledStream
from common.diffusion import GaussianDiffusion, HybridLoss
from common.engines import GANTrainer, PrepareNoisyBatch
from common.handlers import BatchNormStatistics, ConstantThenLinear, TrainingMonitor

MOMENTUM = 0.1
BATCH = 2


class Slices:
    """Seven slices; item i is known by its pixels, and the data set remembers what was taken from it."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.taken.append(int(i))
        generator = torch.Generator().manual_seed(int(i))
        image = torch.randint(1, 17, (1, 8, 8), generator=generator, dtype=torch.uint8)
        return {"image": image, "ct": torch.rand(1, 8, 8, generator=generator)}


class Run:
    """A training in `folder` up to `iterations`; what its model needs is said in `_build`, with `model`'s options."""

    def __init__(
        self,
        folder: Path,
        iterations: int,
        resume: Path | None = None,
        interval: int = 5_000,
        marks: tuple[int, ...] = (),
        accumulation_steps: int = 1,
        workers: int = 0,
        monitor: dict | None = None,
        learning_rate: float = 1e-2,
        refresh_interval: int | None = None,
        **model,
    ) -> None:
        torch.manual_seed(0 if resume is None else 99)  # a resumed run must not live on its own start
        self.dataset = Slices()
        self.learning_rate = learning_rate
        trainer, handlers, refresh = self._build(**model)
        stream = ShuffledStream(len(self.dataset), seed=5)
        self.checkpoints = Checkpoints(
            self.state,
            self.ema.ema_model,
            stream,
            BATCH,
            folder,
            {"bundle": "abdominal_ct_test"},
            interval=interval,
            marks=marks,
            resume=resume,
            refresh=refresh,
            refresh_interval=refresh_interval,
        )
        handlers.append(self.checkpoints)
        if monitor is not None:
            handlers.append(TrainingMonitor(folder / "tensorboard", BATCH, **monitor))
        self.trainer = trainer(
            device=torch.device("cpu"),
            max_epochs=1,
            epoch_length=iterations,
            train_data_loader=DataLoader(self.dataset, BATCH, sampler=stream, num_workers=workers),
            train_handlers=handlers,
            accumulation_steps=accumulation_steps,
        )
        self.losses: dict[int, float] = {}
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._remember)

    def _build(self) -> tuple[Callable[..., Trainer], list, Callable[[], None] | None]:
        """Set `network`, `ema` and `state`; return what makes the trainer, its handlers, and Checkpoints' `refresh`."""
        raise NotImplementedError

    def _remember(self, engine: Engine) -> None:
        self.losses[engine.state.iteration] = engine.state.output["loss"].item()

    def __call__(self) -> Run:
        self.trainer.run()
        return self

    def killed_at(self, iteration: int) -> Run:
        """Run until something else ends it, after this iteration."""

        @self.trainer.on(Events.ITERATION_COMPLETED(once=iteration))
        def kill(engine: Engine) -> None:
            raise KeyboardInterrupt

        try:
            return self()
        except KeyboardInterrupt:
            return self


class TinyDenoiser(nn.Module):
    """Knows x_t, t and the label map through a few weights of each kind."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, width)
        self.first = nn.Conv2d(1 + width, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.last = nn.Conv2d(width, 2, 3, padding=1)

    def encode(self, image):
        return self.embedding(image[:, 0].long()).movedim(-1, 1)

    def forward(self, x, timesteps, image=None, condition=None):
        condition = self.encode(image) if condition is None else condition
        hidden = self.first(torch.cat([x, condition], dim=1)) + self.time(timesteps[:, None] / 1000)[:, :, None, None]
        return self.last(F.silu(hidden))


class DenoiserRun(Run):
    """As abdominal_ct_conditional_ddpm."""

    def _build(self, width: int = 4, loss: nn.Module | None = None):
        diffusion = GaussianDiffusion()
        self.network = TinyDenoiser(width)
        self.ema = EMAHandler(self.network, momentum=MOMENTUM)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate)
        self.state = {"network": self.network, "ema": self.ema.ema_model, "optimizer": self.optimizer}
        trainer = partial(
            SupervisedTrainer,
            network=self.network,
            optimizer=self.optimizer,
            loss_function=loss or HybridLoss(diffusion),
            prepare_batch=PrepareNoisyBatch(diffusion),
            decollate=False,
        )
        return trainer, [self.ema], None


class TinyGenerator(nn.Module):
    """Has what the generators have: spectral norm, BatchNorm, dropout, and noise of its own or given."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(2, width, 3, padding=1))
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def noise_shape(self, height, width):
        return (1, height, width)

    def forward(self, image, noise=None):
        if noise is None:
            noise = torch.randn(image.shape, device=image.device)
        hidden = self.norm(self.first(torch.cat([image / 16, noise], dim=1)))
        return torch.tanh(self.last(self.dropout(F.relu(hidden))))


class TinyDiscriminator(nn.Sequential):
    """Has what the discriminators have: spectral norm and BatchNorm."""

    def __init__(self, width: int = 4) -> None:
        first = spectral_norm(nn.Conv2d(2, width, 4, stride=2, padding=1))
        super().__init__(first, nn.BatchNorm2d(width), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3))


class LeastSquares:
    """An objective with two terms on each side, drawing random numbers as LabelMix does."""

    def generator_terms(self, discriminator, image, real, fake):
        logits = discriminator(torch.cat([image / 16, fake], dim=1))
        return {"adversarial": (logits - 1).square().mean(), "l1": 10 * (fake - real).abs().mean()}

    def discriminator_terms(self, discriminator, image, real, fake):
        real = real + 0.1 * torch.randn_like(real)
        slices = torch.cat([fake, real])
        of_fake, of_real = discriminator(torch.cat([image.repeat(2, 1, 1, 1) / 16, slices], dim=1)).chunk(2)
        return {"fake": of_fake.square().mean(), "real": (of_real - 1).square().mean()}


class GANRun(Run):
    """As abdominal_ct_oasis, with the learning rates of abdominal_ct_pix2pix."""

    def _build(
        self,
        order: tuple[str, str] = ("generator", "discriminator"),
        objective: object | None = None,
        constant: int = 2,
        decay: int = 20,
    ):
        self.network, self.discriminator = TinyGenerator(), TinyDiscriminator()
        self.ema = EMAHandler(self.network, momentum=MOMENTUM, handle_buffers="update")
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=4 * self.learning_rate)
        self.state = {
            "network": self.network,
            "ema": self.ema.ema_model,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }
        trainer = partial(
            GANTrainer,
            network=self.network,
            discriminator=self.discriminator,
            optimizer=self.optimizer,
            discriminator_optimizer=self.discriminator_optimizer,
            objective=objective or LeastSquares(),
            order=order,
        )
        rates = ConstantThenLinear([self.optimizer, self.discriminator_optimizer], constant, decay)
        return trainer, [self.ema, rates], BatchNormStatistics(self.ema.ema_model, Slices(), BATCH)


def equal(a, b) -> bool:
    """Equality of state dicts to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def one_line(error: BaseException) -> str:
    """What an error says, which must be one line."""
    assert "\n" not in str(error)
    return str(error)
