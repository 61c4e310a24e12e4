"""What a training run leaves to go on from, and its weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from .bundle import load_checkpoint, save_checkpoint, save_weights
from .data import ShuffledStream

PAPER_MARKS = (10_000, 50_000, 100_000, 150_000)
"""Iterations at which the paper evaluates (Table 1; 10,000 in its figure 3)."""

CHECK_INTERVAL = 100
"""Iterations between looks at whether the loss is finite."""


class Checkpoints:
    """Keep what a run needs to resume, and the weights for inference; only the first process writes.

    `checkpoint.pt` is replaced every `interval` iterations and at the end; with it a run goes on as if it had not
    stopped: networks, EMA, optimisers, gradient scaler, iteration, random generators of every process, and the place
    in the stream of samples. `model.pt` holds the weights for inference of the same moment, `model_N.pt` those at a
    mark.

    Args:
        state: what has `state_dict` and `load_state_dict`, by name.
        weights: the network to use for inference: the EMA, where there is one.
        stream: the sampler of the training data; its `start` is set on resume.
        batch_size: samples that a process takes from the stream in an iteration.
        output_dir: folder to write into.
        facts: what to say about the weights, in plain values.
        interval: iterations between checkpoints.
        marks: iterations whose weights are kept.
        resume: a `checkpoint.pt` to go on from, None to begin anew.
        refresh: called, in every process, before weights are kept: BatchNorm's statistics of an EMA, say.
        refresh_interval: iterations after which it is called as well, for who shows the weights in between.

    A loss or weights that are no longer finite end the run with the last good checkpoint untouched and named.

    Raises:
        FileNotFoundError: no file at `resume`.
        FileExistsError: a new run in a folder that holds another's checkpoint.
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
        refresh: Callable[[], None] | None = None,
        refresh_interval: int | None = None,
    ) -> None:
        if resume is not None and not Path(resume).is_file():
            raise FileNotFoundError(f"no checkpoint to resume from at {resume}: name a checkpoint.pt of an earlier run")
        last = Path(output_dir) / "checkpoint.pt"
        if resume is None and last.is_file():
            raise FileExistsError(
                f"{last} is of an earlier training, which this one would replace: go on with it by --resume {last}, or "
                "name another --output_dir"
            )
        # without DDP's wrapper
        self.state = {name: getattr(part, "module", part) for name, part in state.items()}
        self.weights = getattr(weights, "module", weights)
        self.networks = [self.weights, *(part for part in self.state.values() if isinstance(part, nn.Module))]
        self.stream = stream
        self.batch_size = batch_size
        self.output_dir = Path(output_dir)
        self.facts = facts
        self.interval = interval
        self.marks = set(marks)
        self.resume = resume
        self.refresh = refresh
        self.refresh_interval = refresh_interval
        self._losses: float | torch.Tensor = 0.0
        self._refreshed = 0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer; must come between the handler that updates the EMA and those that show it.

        What they show at `refresh_interval` is then what would be kept: `refresh` has been called.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._watch)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.save)
        engine.add_event_handler(Events.ITERATION_COMPLETED(lambda _, i: i in self.marks), self.save_mark)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        if self.refresh_interval is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.refresh_interval), self._prepare)

    def save(self, engine: Engine) -> None:
        """Write `checkpoint.pt` and `model.pt`."""
        self._prepare(engine)
        random_states = idist.all_gather(_random_state())
        if idist.get_rank() > 0:
            return
        content = {name: part.state_dict() for name, part in self.state.items()}
        content |= {"facts": self.facts, "iteration": engine.state.iteration}
        content["random"] = random_states.reshape(idist.get_world_size(), -1)
        if engine.scaler is not None:
            content["scaler"] = engine.scaler.state_dict()
        save_checkpoint(self.output_dir / "checkpoint.pt", content)
        self._save_weights(engine, "model.pt")

    def save_mark(self, engine: Engine) -> None:
        """Write `model_N.pt`."""
        self._prepare(engine)
        if idist.get_rank() == 0:
            self._save_weights(engine, f"model_{engine.state.iteration}.pt")

    def load(self, engine: Engine) -> None:
        """Take everything up from the checkpoint to resume from."""
        content = load_checkpoint(self.resume)
        origin = content.get("facts", self.facts)
        if origin != self.facts:
            raise ValueError(
                f"{self.resume} is of {origin}, this run of {self.facts}: resume with the configs and options of then"
            )
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
        engine.state.iteration = self._refreshed = content["iteration"]
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

    def _finish(self, engine: Engine) -> None:
        self.save(engine)
        if idist.get_rank() == 0:
            iteration = engine.state.iteration
            engine.logger.info("iteration %d: model.pt and checkpoint.pt in %s", iteration, self.output_dir)

    def _watch(self, engine: Engine) -> None:
        # Summed on the device and looked at now and then: looking makes the CPU wait for the GPU.
        self._losses = self._losses + engine.state.output["loss"].detach()
        if engine.state.iteration % CHECK_INTERVAL == 0:
            self._check(engine)

    def _prepare(self, engine: Engine) -> None:
        self._check(engine)
        # Once an iteration: what is kept at a mark, or at the end, is then the same as in the checkpoint beside it.
        if self.refresh is not None and self._refreshed != engine.state.iteration:
            self.refresh()
            self._refreshed = engine.state.iteration

    def _check(self, engine: Engine) -> None:
        # A step can spoil the weights after the last loss was still finite: they are looked at as well.
        weights = torch.stack([value.isfinite().all() for part in self.networks for value in part.parameters()])
        if not (math.isfinite(self._losses) and weights.all()):
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
