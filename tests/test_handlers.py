"""What a training run shows while it runs, how fast it learns, and the BatchNorm statistics of its weights."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import DenoiserRun, Slices, TinyDenoiser

from common.diffusion import GaussianDiffusion
from common.handlers import SampleGrid, TrainingMonitor
from common.inferers import DiffusionSampler, VolumeInferer
from common.labels import CLASSES

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


def test_a_resumed_run_adds_to_the_curves_of_the_first(tmp_path):
    monitor = {"interval": 2}
    DenoiserRun(tmp_path, 4, interval=4, monitor=monitor)()
    first = scalars(tmp_path / "tensorboard", "loss")
    rest = DenoiserRun(tmp_path, 8, resume=tmp_path / "checkpoint.pt", interval=4, monitor=monitor)()
    whole = scalars(tmp_path / "tensorboard", "loss")
    assert list(whole) == [2, 4, 6, 8]
    assert {step: whole[step] for step in first} == first
    assert whole[6] == pytest.approx((rest.losses[5] + rest.losses[6]) / 2)


def test_what_came_after_the_checkpoint_is_taken_off_the_curves(tmp_path):
    monitor = {"interval": 1}
    DenoiserRun(tmp_path, 9, interval=3, monitor=monitor).killed_at(5)
    DenoiserRun(tmp_path, 6, resume=tmp_path / "checkpoint.pt", interval=3, monitor=monitor)()
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
    plain = DenoiserRun(tmp_path / "plain", 4)()
    pictured = DenoiserRun(tmp_path / "pictured", 4, monitor={"picture": sample_grid(), "picture_interval": 2})()
    assert plain.losses == pictured.losses
