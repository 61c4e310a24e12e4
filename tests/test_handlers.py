"""A training run, stopped and gone on with, against one that was never stopped; and what it shows meanwhile."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.engines import SupervisedTrainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from common.bundle import load_checkpoint, save_weights
from common.data import ShuffledStream
from common.diffusion import GaussianDiffusion, HybridLoss
from common.engines import PrepareNoisyBatch
from common.handlers import Checkpoints, SampleGrid, TrainingMonitor
from common.inferers import DiffusionSampler, VolumeInferer
from common.labels import CLASSES

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
        return self.last(torch.nn.functional.silu(hidden))


class Run:
    """A training as the bundles' train.yaml builds it, tiny."""

    def __init__(
        self,
        folder: Path,
        iterations: int,
        resume: Path | None = None,
        width: int = 4,
        accumulation_steps: int = 1,
        workers: int = 0,
        loss: nn.Module | None = None,
        monitor: dict | None = None,
        learning_rate: float = 1e-2,
        **checkpoints,
    ) -> None:
        torch.manual_seed(0 if resume is None else 99)  # a resumed run must not live on its own start
        diffusion = GaussianDiffusion()
        self.dataset = Slices()
        self.network = TinyDenoiser(width)
        self.ema = EMAHandler(self.network, momentum=MOMENTUM)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=learning_rate)
        stream = ShuffledStream(len(self.dataset), seed=5)
        handlers = [self.ema]
        if monitor is not None:
            handlers.append(TrainingMonitor(folder / "tensorboard", BATCH, **monitor))
        self.checkpoints = Checkpoints(
            {"network": self.network, "ema": self.ema.ema_model, "optimizer": self.optimizer},
            self.ema.ema_model,
            stream,
            BATCH,
            folder,
            {"bundle": "abdominal_ct_test"},
            resume=resume,
            **checkpoints,
        )
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            epoch_length=iterations,
            train_data_loader=DataLoader(self.dataset, BATCH, sampler=stream, num_workers=workers),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=loss or HybridLoss(diffusion),
            prepare_batch=PrepareNoisyBatch(diffusion),
            train_handlers=[*handlers, self.checkpoints],
            decollate=False,
            accumulation_steps=accumulation_steps,
        )
        self.losses: dict[int, float] = {}
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._remember)

    def _remember(self, engine: Engine) -> None:
        self.losses[engine.state.iteration] = engine.state.output["loss"].item()

    def __call__(self) -> Run:
        self.trainer.run()
        return self


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
    assert "\n" not in str(error)
    return str(error)


# ----------------------------------------------------------------------------------------------------- Checkpoints


@pytest.mark.parametrize("accumulation_steps, workers", [(1, 0), (3, 0), (1, 1)])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, accumulation_steps, workers):
    options = {"accumulation_steps": accumulation_steps, "interval": 6, "workers": workers}
    whole = Run(tmp_path / "whole", 12, **options)()
    half = Run(tmp_path / "parts", 6, **options)()
    rest = Run(tmp_path / "parts", 12, resume=tmp_path / "parts" / "checkpoint.pt", **options)()

    assert list(rest.losses) == list(range(7, 13))
    assert half.losses | rest.losses == whole.losses
    assert equal(whole.network.state_dict(), rest.network.state_dict())
    assert equal(whole.ema.ema_model.state_dict(), rest.ema.ema_model.state_dict())
    assert equal(whole.optimizer.state_dict(), rest.optimizer.state_dict())
    for name in ("checkpoint.pt", "model.pt"):
        assert equal(load_checkpoint(tmp_path / "whole" / name), load_checkpoint(tmp_path / "parts" / name)), name
    if workers == 0:  # the loader takes no batch in advance
        assert half.dataset.taken + rest.dataset.taken == whole.dataset.taken
        assert rest.dataset.taken == [i for i, _ in zip(ShuffledStream(7, seed=5, start=12), range(12), strict=False)]


def test_a_run_killed_between_checkpoints_goes_on_from_the_last(tmp_path):
    whole = Run(tmp_path / "whole", 9, interval=4)()
    killed = Run(tmp_path / "parts", 9, interval=4)

    @killed.trainer.on(Events.ITERATION_COMPLETED(once=7))
    def kill(engine):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    rest = Run(tmp_path / "parts", 9, resume=tmp_path / "parts" / "checkpoint.pt", interval=4)()
    assert list(rest.losses) == [5, 6, 7, 8, 9]
    assert {i: whole.losses[i] for i in rest.losses} == rest.losses
    assert equal(whole.network.state_dict(), rest.network.state_dict())


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    Run(tmp_path, 4, interval=2)()
    before = load_checkpoint(tmp_path / "checkpoint.pt")
    again = Run(tmp_path, 4, resume=tmp_path / "checkpoint.pt", interval=2)()
    assert again.losses == {}
    assert equal(load_checkpoint(tmp_path / "checkpoint.pt"), before)


def test_weights_for_inference_are_the_ema_with_facts(tmp_path):
    run = Run(tmp_path, 3)()
    content = load_checkpoint(tmp_path / "model.pt")
    assert equal(content["model"], dict(run.ema.ema_model.state_dict()))
    assert not equal(content["model"], dict(run.network.state_dict()))
    assert content["facts"] == {"bundle": "abdominal_ct_test", "iteration": 3}


def test_marks_keep_the_weights_of_their_moment(tmp_path):
    run = Run(tmp_path, 6, marks=(2, 5))
    moments = {}
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: moments.update(
            {engine.state.iteration: {n: v.clone() for n, v in run.ema.ema_model.state_dict().items()}}
        ),
    )
    run()
    assert sorted(p.name for p in tmp_path.glob("model_*.pt")) == ["model_2.pt", "model_5.pt"]
    for mark in (2, 5):
        content = load_checkpoint(tmp_path / f"model_{mark}.pt")
        assert equal(content["model"], moments[mark]) and content["facts"]["iteration"] == mark
    assert equal(load_checkpoint(tmp_path / "model.pt")["model"], moments[6])


class SpoiltLoss(HybridLoss):
    """Gives a loss, or gradients, that are not finite in one call."""

    def __init__(self, call: int, what: str) -> None:
        super().__init__(GaussianDiffusion())
        self.calls, self.call, self.what = 0, call, what

    def forward(self, output, target):
        self.calls += 1
        loss = super().forward(output, target)
        if self.calls != self.call:
            return loss
        if self.what == "loss":
            return loss * float("nan")
        return loss + (output.flatten(1).sum(1) * 0).sqrt()  # 0, with an infinite slope times 0


@pytest.mark.parametrize("what, call", [("loss", 5), ("loss", 6), ("loss", 7), ("gradient", 5), ("gradient", 6)])
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path, what, call):
    run = Run(tmp_path, 9, interval=3, loss=SpoiltLoss(call, what))
    good = {}
    for moment in (3, 6):
        run.trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=moment),
            lambda engine: good.update({n: (tmp_path / n).read_bytes() for n in ("checkpoint.pt", "model.pt")}),
        )
    with pytest.raises(FloatingPointError) as caught:
        run()
    message = one_line(caught.value)
    assert str(tmp_path / "checkpoint.pt") in message and "learning_rate" in message
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == (6 if call > 6 else 3)
    for name, content in good.items():
        assert (tmp_path / name).read_bytes() == content
    for value in load_checkpoint(tmp_path / "checkpoint.pt")["network"].values():
        assert value.isfinite().all()


def test_a_loss_that_is_not_finite_is_seen_long_before_the_checkpoint(tmp_path):
    run = Run(tmp_path, 1000, interval=1000, loss=SpoiltLoss(2, "loss"))
    with pytest.raises(FloatingPointError) as caught:
        run()
    assert "iteration 100:" in one_line(caught.value) and "lower learning_rate" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interval_that_parts_an_accumulation_is_refused_before_work(tmp_path):
    run = Run(tmp_path, 12, interval=5, accumulation_steps=2)
    with pytest.raises(ValueError) as caught:
        run()
    message = one_line(caught.value)
    assert "save_interval 5" in message and "accumulation_steps 2" in message
    assert run.losses == {}


def test_resuming_from_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Run(tmp_path, 2, resume=tmp_path / "checkpoint.pt")
    assert str(tmp_path / "checkpoint.pt") in one_line(caught.value)


def test_resuming_from_another_network_is_refused_in_one_line(tmp_path):
    Run(tmp_path, 1)()
    with pytest.raises(ValueError) as caught:
        Run(tmp_path, 2, resume=tmp_path / "checkpoint.pt", width=6)()
    assert str(tmp_path / "checkpoint.pt") in one_line(caught.value) and "another network" in str(caught.value)


def test_resuming_from_weights_is_refused_with_what_they_lack(tmp_path):
    save_weights(tmp_path / "model.pt", TinyDenoiser().state_dict(), {"bundle": "abdominal_ct_test"})
    with pytest.raises(ValueError) as caught:
        Run(tmp_path, 2, resume=tmp_path / "model.pt")()
    message = one_line(caught.value)
    assert str(tmp_path / "model.pt") in message and "checkpoint.pt" in message
    assert all(name in message for name in ("network", "ema", "optimizer", "iteration"))


def test_resuming_from_a_damaged_file_is_refused_in_one_line(tmp_path):
    Run(tmp_path, 1)()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged") as caught:
        Run(tmp_path, 2, resume=path)()
    assert str(path) in one_line(caught.value)


# ------------------------------------------------------------------------------------------------------------- EMA


def test_the_ema_starts_from_the_initial_weights_and_follows_the_closed_form(tmp_path):
    run = Run(tmp_path, 5)
    states = [{n: v.clone().double() for n, v in run.network.state_dict().items()}]
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda _: states.append({n: v.clone().double() for n, v in run.network.state_dict().items()}),
    )
    run()
    keep = 1 - MOMENTUM
    for name, value in run.ema.ema_model.state_dict().items():
        # θ̄_n = (1−m)ⁿ θ_0 + Σ_i m (1−m)ⁿ⁻ⁱ θ_i
        expected = keep**5 * states[0][name] + sum(MOMENTUM * keep ** (5 - i) * states[i][name] for i in range(1, 6))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------- TrainingMonitor


def fake_training(log_dir: Path, iterations: int, **options) -> None:
    """An engine whose loss is its iteration."""
    engine = Engine(lambda engine, _: {"loss": torch.tensor(float(engine.state.iteration))})
    engine.optimizer = SimpleNamespace(param_groups=[{"lr": 2e-4}])
    TrainingMonitor(log_dir, batch_size=8, **options).attach(engine)
    engine.run(range(iterations), max_epochs=1)


def scalars(log_dir: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(log_dir)).Reload()
    return {event.step: event.value for event in events.Scalars(f"train/{name}")}


def test_tensorboard_holds_the_mean_loss_of_each_interval(tmp_path):
    fake_training(tmp_path, 11, interval=4)
    assert scalars(tmp_path, "loss") == {4: 2.5, 8: 6.5}  # means of 1…4 and 5…8
    assert scalars(tmp_path, "learning_rate") == pytest.approx({4: 2e-4, 8: 2e-4})
    assert all(value > 0 for value in scalars(tmp_path, "images_per_second").values())
    assert all(0.05 < value < 64 for value in scalars(tmp_path, "memory_gib").values())


def test_the_status_line_says_what_tensorboard_says(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fake_training(tmp_path, 8, interval=4)
    lines = [r.getMessage() for r in caplog.records if r.name == "common.handlers"]
    assert len(lines) == 2
    pattern = r"iteration (\d+)/8  loss (\d+\.\d{4})  (\d+\.\d) images/s  (\d+\.\d) GiB"
    found = [re.fullmatch(pattern, line).groups() for line in lines]
    assert [(i, loss) for i, loss, *_ in found] == [("4", "2.5000"), ("8", "6.5000")]
    speeds = scalars(tmp_path, "images_per_second")
    assert [float(speed) for _, _, speed, _ in found] == pytest.approx([speeds[4], speeds[8]], abs=0.1)


def test_images_per_second_count_the_batches_and_not_the_pictures(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("common.handlers.time.perf_counter", lambda: clock.now)

    def picture() -> torch.Tensor:
        clock.now += 1000.0
        return torch.full((3, 4, 4), 0.5)

    def step(engine, _):
        clock.now += 0.5
        return {"loss": torch.tensor(1.0)}

    engine = Engine(step)
    engine.optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    TrainingMonitor(tmp_path, batch_size=8, interval=4, picture=picture, picture_interval=2).attach(engine)
    engine.run(range(8), max_epochs=1)
    assert scalars(tmp_path, "images_per_second") == {4: 16.0, 8: 16.0}  # 8 images in half a second
    events = EventAccumulator(str(tmp_path)).Reload()
    (tag,) = events.Tags()["images"]
    assert [event.step for event in events.Images(tag)] == [2, 4, 6, 8]
    assert (events.Images(tag)[0].width, events.Images(tag)[0].height) == (4, 4)


def test_a_resumed_run_takes_the_learning_rate_of_its_config(tmp_path):
    Run(tmp_path, 2, interval=2)()
    resumed = Run(tmp_path, 3, resume=tmp_path / "checkpoint.pt", learning_rate=5e-3, interval=3)()
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [5e-3]
    assert resumed.optimizer.state_dict()["state"][0]["step"] == 3  # all else went on


def test_a_resumed_run_adds_to_the_curves_of_the_first(tmp_path):
    monitor = {"interval": 2}
    Run(tmp_path, 4, interval=4, monitor=monitor)()
    first = scalars(tmp_path / "tensorboard", "loss")
    rest = Run(tmp_path, 8, resume=tmp_path / "checkpoint.pt", interval=4, monitor=monitor)()
    whole = scalars(tmp_path / "tensorboard", "loss")
    assert list(whole) == [2, 4, 6, 8]
    assert {step: whole[step] for step in first} == first
    assert whole[6] == pytest.approx((rest.losses[5] + rest.losses[6]) / 2)


def test_what_came_after_the_checkpoint_is_taken_off_the_curves(tmp_path):
    monitor = {"interval": 1}
    killed = Run(tmp_path, 9, interval=3, monitor=monitor)

    @killed.trainer.on(Events.ITERATION_COMPLETED(once=5))
    def kill(engine):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    Run(tmp_path, 6, resume=tmp_path / "checkpoint.pt", interval=3, monitor=monitor)()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")][-3:] == [4, 5, 6]
    assert len({event.step for event in events.Scalars("train/loss")}) == len(events.Scalars("train/loss"))


# ------------------------------------------------------------------------------------------------------ SampleGrid


def sample_grid(**options) -> SampleGrid:
    torch.manual_seed(0)
    inferer = partial(VolumeInferer, generate=DiffusionSampler(GaussianDiffusion(), steps=3))
    return SampleGrid(Slices(), TinyDenoiser().eval(), inferer, **options)


def test_the_picture_shows_mask_samples_and_real(tmp_path):
    grid = sample_grid(count=3, seeds=(0, 1))
    picture = grid()
    assert picture.shape == (3, 3 * 8, 4 * 8) and picture.min() >= 0 and picture.max() <= 1
    # items 1½, 3, 4½ of 0…6, rounded to even: 2, 3, 4
    items = [Slices()[i] for i in (2, 3, 4)]
    for row, item in enumerate(items):
        band = picture[:, 8 * row : 8 * row + 8]
        colors = np.array([CLASSES[i].color for i in item["image"].ravel().tolist()]).reshape(8, 8, 3)
        np.testing.assert_allclose(band[:, :, :8].movedim(0, -1).numpy() * 255, colors, atol=1e-4)
        assert torch.equal(band[:, :, 24:], item["ct"].expand(3, -1, -1))
    volume = torch.stack([item["image"] for item in items], dim=-1)[None]
    for column, seed in ((1, 0), (2, 1)):
        generate = DiffusionSampler(GaussianDiffusion(), steps=3)
        pred = VolumeInferer(generate, seed=seed, progress=False)(volume, grid.network)[0, 0]
        expected = torch.cat([pred[:, :, k] for k in range(3)])
        torch.testing.assert_close(picture[0, :, 8 * column : 8 * column + 8], expected, rtol=0, atol=1e-6)


def test_pictures_of_the_same_weights_are_the_same_and_cost_no_randomness():
    grid = sample_grid()
    before = torch.get_rng_state()
    first = grid()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(grid(), first)
    with torch.no_grad():
        grid.network.last.bias += 0.5
    samples = slice(8, 24)
    assert not torch.equal(grid()[:, :, samples], first[:, :, samples])


def test_pictures_in_between_change_nothing_of_the_training(tmp_path):
    plain = Run(tmp_path / "plain", 4)()
    pictured = Run(tmp_path / "pictured", 4, monitor={"picture": sample_grid(), "picture_interval": 2})()
    assert plain.losses == pictured.losses
