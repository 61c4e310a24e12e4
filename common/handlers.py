"""Ignite handlers of a training run: what it shows while it runs, and how fast it learns."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable, Sequence

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import eval_mode
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from .inferers import VolumeInferer
from .report import colorize


class TrainingMonitor:
    """Show a run: a status line and TensorBoard's scalars, and now and then a picture of samples.

    The status line has the iteration, the mean loss since the last line, images per second over all processes, and
    memory (peak GPU memory, or the process's own without a GPU). TensorBoard also has the terms of the loss, where the
    engine's output has `terms`.

    Args:
        log_dir: TensorBoard's folder.
        batch_size: samples that a process takes in an iteration.
        interval: iterations between status lines.
        picture: makes the picture, (3, H, W) in [0, 1]; see `SampleGrid`.
        picture_interval: iterations between pictures.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike,
        batch_size: int,
        interval: int = 100,
        picture: Callable[[], torch.Tensor] | None = None,
        picture_interval: int = 5_000,
    ) -> None:
        self.log_dir = log_dir
        self.batch_size = batch_size
        self.interval = interval
        self.picture = picture
        self.picture_interval = picture_interval
        self.logger = logging.getLogger(__name__)

    def attach(self, engine: Engine) -> None:
        """Register with a trainer; in a distributed run the first process alone shows anything."""
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED(once=1), self._start)  # when a checkpoint to resume is loaded
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add_loss)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self._log)
        if self.picture is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.picture_interval), self._draw)

    def _start(self, engine: Engine) -> None:
        self.writer = SummaryWriter(self.log_dir, purge_step=engine.state.iteration + 1)
        engine.add_event_handler(Events.COMPLETED, lambda _: self.writer.close())
        self._reset()

    def _reset(self) -> None:
        self._losses, self._since = [], time.perf_counter()

    def _add_loss(self, engine: Engine) -> None:
        output = engine.state.output
        # stays on the GPU: no waiting here
        self._losses.append({"loss": output["loss"].detach(), **output.get("terms", {})})

    def _log(self, engine: Engine) -> None:
        iteration, state = engine.state.iteration, engine.state
        names = self._losses[0]
        losses = {name: torch.stack([values[name] for values in self._losses]).mean().item() for name in names}
        images = len(self._losses) * self.batch_size * idist.get_world_size()
        scalars = {
            **losses,
            "learning_rate": engine.optimizer.param_groups[0]["lr"],
            "images_per_second": images / (time.perf_counter() - self._since),
            "memory_gib": _memory_gib(),
        }
        for name, value in scalars.items():
            self.writer.add_scalar(f"train/{name}", value, iteration)
        self.logger.info(
            "iteration %d/%d  loss %.4f  %.1f images/s  %.1f GiB",
            *(iteration, state.max_epochs * state.epoch_length, losses["loss"]),
            *(scalars["images_per_second"], scalars["memory_gib"]),
        )
        self._reset()

    def _draw(self, engine: Engine) -> None:
        start = time.perf_counter()
        self.writer.add_image("mask | samples | real", self.picture(), engine.state.iteration)
        self._since += time.perf_counter() - start  # sampling isn't training


def _memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class SampleGrid:
    """A picture of what a network makes of slices from a data set: mask | one sample a seed | real, a row a slice.

    The seeds are fixed, so that pictures of one run differ by the weights alone. Random states stay as they were.

    Args:
        dataset: items with `image` and `ct`.
        network: makes the samples: the EMA, where there is one.
        inferer: makes the `VolumeInferer` of a seed: `inferer(seed=0, progress=False)`.
        count: number of slices, spread over the data set.
        seeds: one column of samples each.
    """

    def __init__(
        self,
        dataset: Dataset,
        network: nn.Module,
        inferer: Callable[..., VolumeInferer],
        count: int = 6,
        seeds: Sequence[int] = (0, 1),
    ) -> None:
        self.items = [dataset[i] for i in np.linspace(0, len(dataset) - 1, count + 2).round().astype(int)[1:-1]]
        self.network = getattr(network, "module", network)  # without DDP's wrapper
        self.inferers = [inferer(seed=seed, progress=False) for seed in seeds]

    def __call__(self) -> torch.Tensor:
        """Sample and put the picture together: (3, count · H, (2 + seeds) · W) in [0, 1]."""
        device = next(self.network.parameters()).device
        labels = torch.stack([item["image"] for item in self.items], dim=-1)[None].to(device)  # (1, 1, H, W, N)
        columns = [torch.cat([item["ct"][0] for item in self.items])]
        with eval_mode(self.network):
            for inferer in reversed(self.inferers):
                columns.insert(0, torch.cat(list(inferer(labels, self.network)[0, 0].movedim(-1, 0).cpu())))
        mask = torch.from_numpy(colorize(torch.cat([item["image"][0] for item in self.items]).numpy()))
        return torch.cat([mask.movedim(-1, 0) / 255, torch.cat(columns, dim=1).expand(3, -1, -1)], dim=2)


class ConstantThenLinear:
    """Hold learning rates constant, then lower them linearly to zero: pix2pix's policy, by iterations.

    Iteration i of the decay's n has 1 − i/(n+1) of the optimiser's rate. It follows from the iteration alone, so that a
    resumed run needs no state of it.

    Args:
        optimizers: whose rates to set; those they begin with are the constant ones.
        constant: iterations before the decay.
        decay: iterations of the decay.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], constant: int, decay: int) -> None:
        self.rates = [(optimizer, [group["lr"] for group in optimizer.param_groups]) for optimizer in optimizers]
        self.constant = constant
        self.decay = decay

    def multiplier(self, iteration: int) -> float:
        """Share of the rate that an iteration (1, 2, ...) gets."""
        return 1 - max(0, iteration - self.constant) / (self.decay + 1)

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._set)

    def _set(self, engine: Engine) -> None:
        for optimizer, rates in self.rates:  # whose groups are others once a state is loaded
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.multiplier(engine.state.iteration)


class BatchNormStatistics:
    """Measure the BatchNorm statistics of an EMA: running averages of another network's belong to none of its weights.

    They become the mean over batches of slices spread over the training data. Random states stay as they were. Spectral
    norm's vectors are brought in line with the weights as well, because that is what it does in a forward in training
    mode: as averages they are shorter than 1, and the weights come out several times too large.

    Args:
        network: a generator, `network(image)`.
        dataset: items with `image`.
        batch_size: slices of a batch; one that isn't full is left out, unless it is the only one.
        batches: at most so many.
    """

    def __init__(self, network: nn.Module, dataset: Dataset, batch_size: int, batches: int = 50) -> None:
        self.network = network
        self.dataset = dataset
        self.batch_size = batch_size
        self.count = min(batches * batch_size, len(dataset))

    def __call__(self) -> None:
        """Measure, and leave the network in the mode it was in."""
        device = next(self.network.parameters()).device
        indices = np.linspace(0, len(self.dataset) - 1, self.count).round().astype(int)
        generator = torch.Generator().manual_seed(0)
        indices = indices[torch.randperm(self.count, generator=generator).numpy()]  # a batch isn't one patient's
        full = self.count // self.batch_size * self.batch_size
        batches = (
            torch.stack([self.dataset[i]["image"] for i in indices[k : k + self.batch_size]])
            for k in range(0, full or self.count, self.batch_size)
        )
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # Ignite's EMA shares this counter with the network that it follows.
                module.num_batches_tracked = module.num_batches_tracked.clone()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            update_bn(batches, self.network, device)
