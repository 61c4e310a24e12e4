"""Ignite handlers of a training run: what it shows while it runs, and what it leaves to go on from."""

from __future__ import annotations

import logging
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from .bundle import load_checkpoint, save_checkpoint, save_weights
from .data import ShuffledStream
from .inferers import VolumeInferer
from .report import colorize

PAPER_MARKS = (10_000, 50_000, 100_000, 150_000)
"""Iterations at which the paper evaluates (Table 1; 10,000 in its figure 3)."""

CHECK_INTERVAL = 100
"""Iterations between looks at whether the loss is finite."""


class Checkpoints:
    """Keep what a run needs to resume, and the weights for inference; only the first process writes.

    `checkpoint.pt` is replaced every `interval` iterations and at the end; with it a run goes on as if it had not
    stopped: network, EMA, optimiser, gradient scaler, iteration, random generators of every process, and the place in
    the stream of samples. `model.pt` holds the weights for inference of the same moment, `model_N.pt` those at a mark.

    Args:
        state: what has `state_dict` and `load_state_dict`, by name.
        weights: the network to use for inference (the EMA).
        stream: the sampler of the training data; its `start` is set on resume.
        batch_size: samples that a process takes from the stream in an iteration.
        output_dir: folder to write into.
        facts: what to say about the weights, in plain values.
        interval: iterations between checkpoints.
        marks: iterations whose weights are kept.
        resume: a `checkpoint.pt` to go on from, None to begin anew.

    A loss or weights that are no longer finite end the run with the last good checkpoint untouched and named.

    Raises:
        FileNotFoundError: no file at `resume`.
        ValueError: an `interval` that parts an accumulation of gradients (when training starts).
        FloatingPointError: a loss or weights that aren't finite (while training).
    """

    def __init__(
        self,
        state: dict[str, object],
        weights: nn.Module,
        stream: ShuffledStream,
        batch_size: int,
        output_dir: str | os.PathLike,
        facts: dict[str, str | int],
        interval: int = 5_000,
        marks: Sequence[int] = PAPER_MARKS,
        resume: str | os.PathLike | None = None,
    ) -> None:
        if resume is not None and not Path(resume).is_file():
            raise FileNotFoundError(f"no checkpoint to resume from at {resume}: name a checkpoint.pt of an earlier run")
        self.state = {name: getattr(part, "module", part) for name, part in state.items()}  # without DDP's wrapper
        self.weights = weights
        self.stream = stream
        self.batch_size = batch_size
        self.output_dir = Path(output_dir)
        self.facts = facts
        self.interval = interval
        self.marks = set(marks)
        self.resume = resume
        self._losses: float | torch.Tensor = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer; must come after the handler that updates the EMA."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._watch)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.save)
        engine.add_event_handler(Events.ITERATION_COMPLETED(lambda _, i: i in self.marks), self.save_mark)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def save(self, engine: Engine) -> None:
        """Write `checkpoint.pt` and `model.pt`."""
        self._check(engine)
        random_states = idist.all_gather(_random_state())
        if idist.get_rank() > 0:
            return
        content = {name: part.state_dict() for name, part in self.state.items()}
        content |= {"iteration": engine.state.iteration, "random": random_states.reshape(idist.get_world_size(), -1)}
        if engine.scaler is not None:
            content["scaler"] = engine.scaler.state_dict()
        save_checkpoint(self.output_dir / "checkpoint.pt", content)
        self._save_weights(engine, "model.pt")

    def save_mark(self, engine: Engine) -> None:
        """Write `model_N.pt`."""
        self._check(engine)
        if idist.get_rank() == 0:
            self._save_weights(engine, f"model_{engine.state.iteration}.pt")

    def load(self, engine: Engine) -> None:
        """Take everything up from the checkpoint to resume from."""
        content = load_checkpoint(self.resume)
        missing = (self.state.keys() | {"iteration", "random"}) - content.keys()
        if missing:
            raise ValueError(f"{self.resume} lacks {', '.join(sorted(missing))}: resume from a checkpoint.pt")
        try:
            for name, part in self.state.items():
                groups = getattr(part, "param_groups", [])
                rates = [group["lr"] for group in groups]
                part.load_state_dict(content[name])
                for group, rate in zip(part.param_groups if groups else [], rates, strict=True):
                    group["lr"] = rate  # the config's, not the checkpoint's
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.resume} is of another network or optimiser: resume with the configs and overlays of that run"
            ) from error
        if engine.scaler is not None and "scaler" in content:
            engine.scaler.load_state_dict(content["scaler"])
        engine.state.iteration = content["iteration"]
        self.stream.start = content["iteration"] * self.batch_size
        if len(content["random"]) == idist.get_world_size():
            random_state = content["random"][idist.get_rank()]
            _set_random_state(random_state)
            # and again once the loader's iterator, which draws a seed when it begins, is there
            first = Events.ITERATION_STARTED(once=content["iteration"] + 1)
            engine.add_event_handler(first, lambda _: _set_random_state(random_state))
        engine.logger.info("resumed %s at iteration %d", self.resume, content["iteration"])

    def _start(self, engine: Engine) -> None:
        if self.interval % engine.accumulation_steps:
            raise ValueError(
                f"save_interval {self.interval} is no multiple of accumulation_steps {engine.accumulation_steps}: a "
                "checkpoint can't hold half-accumulated gradients, change one of the two"
            )
        if self.resume is not None:
            self.load(engine)

    def _watch(self, engine: Engine) -> None:
        # Summed on the device and looked at now and then: looking makes the CPU wait for the GPU.
        self._losses = self._losses + engine.state.output["loss"].detach()
        if engine.state.iteration % CHECK_INTERVAL == 0:
            self._check(engine)

    def _check(self, engine: Engine) -> None:
        # A step can spoil the weights after the last loss was still finite: they are looked at as well.
        if not (math.isfinite(self._losses) and all(value.isfinite().all() for value in self.weights.parameters())):
            last = self.output_dir / "checkpoint.pt"
            remedy = f"resume from {last} with a lower learning_rate" if last.is_file() else "lower learning_rate"
            raise FloatingPointError(f"loss or weights are not finite at iteration {engine.state.iteration}: {remedy}")
        self._losses = 0.0

    def _save_weights(self, engine: Engine, name: str) -> None:
        facts = {**self.facts, "iteration": engine.state.iteration}
        save_weights(self.output_dir / name, self.weights.state_dict(), facts)


def _random_state() -> torch.Tensor:
    """The states of the generators that training draws from, in one row of bytes: PyTorch's on CPU and GPU."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


def _set_random_state(state: torch.Tensor) -> None:
    length = len(torch.get_rng_state())
    # Clones, because PyTorch reads from the start of the storage, whatever part of it a view shows, or crashes.
    torch.set_rng_state(state[:length].clone())
    if torch.cuda.is_available() and len(state) > length:
        torch.cuda.set_rng_state(state[length:].clone())


class TrainingMonitor:
    """Show a run: a status line and TensorBoard's scalars, and now and then a picture of samples.

    The status line has the iteration, the mean loss since the last line, images per second over all processes, and
    memory (peak GPU memory, or the process's own without a GPU).

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
        self._losses.append(engine.state.output["loss"].detach())  # stays on the GPU: no waiting here

    def _log(self, engine: Engine) -> None:
        iteration, state = engine.state.iteration, engine.state
        loss = torch.stack(self._losses).mean().item()
        images = len(self._losses) * self.batch_size * idist.get_world_size()
        scalars = {
            "loss": loss,
            "learning_rate": engine.optimizer.param_groups[0]["lr"],
            "images_per_second": images / (time.perf_counter() - self._since),
            "memory_gib": _memory_gib(),
        }
        for name, value in scalars.items():
            self.writer.add_scalar(f"train/{name}", value, iteration)
        self.logger.info(
            "iteration %d/%d  loss %.4f  %.1f images/s  %.1f GiB",
            *(iteration, state.max_epochs * state.epoch_length, loss),
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
        network: makes the samples (the EMA).
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
        self.network = network
        self.inferers = [inferer(seed=seed, progress=False) for seed in seeds]

    def __call__(self) -> torch.Tensor:
        """Sample and put the picture together: (3, count · H, (2 + seeds) · W) in [0, 1]."""
        device = next(self.network.parameters()).device
        labels = torch.stack([item["image"] for item in self.items], dim=-1)[None].to(device)  # (1, 1, H, W, N)
        columns = [torch.cat([item["ct"][0] for item in self.items])]
        for inferer in reversed(self.inferers):
            columns.insert(0, torch.cat(list(inferer(labels, self.network)[0, 0].movedim(-1, 0).cpu())))
        mask = torch.from_numpy(colorize(torch.cat([item["image"][0] for item in self.items]).numpy()))
        return torch.cat([mask.movedim(-1, 0) / 255, torch.cat(columns, dim=1).expand(3, -1, -1)], dim=2)
