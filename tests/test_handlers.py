"""What a training run shows while it runs, how fast it learns, and the BatchNorm statistics of its weights."""

from __future__ import annotations

import copy
import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import BATCH, DenoiserRun, GANRun, Slices, TinyDenoiser, TinyGenerator, equal
from torch import nn

from common.bundle import load_checkpoint
from common.diffusion import GaussianDiffusion
from common.handlers import BatchNormStatistics, ConstantThenLinear, SampleGrid, TrainingMonitor
from common.inferers import DiffusionSampler, GeneratorPass, VolumeInferer
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


def test_tensorboard_holds_the_mean_of_each_term_of_the_loss(tmp_path):
    def step(engine, _):
        i = torch.tensor(float(engine.state.iteration))
        return {"loss": 3 * i, "terms": {"generator/l1": 2 * i, "discriminator/fake": i}}

    engine = Engine(step)
    engine.optimizer = SimpleNamespace(param_groups=[{"lr": 2e-4}])
    TrainingMonitor(tmp_path, batch_size=8, interval=4).attach(engine)
    engine.run(range(8), max_epochs=1)
    assert scalars(tmp_path, "loss") == {4: 7.5, 8: 19.5}
    assert scalars(tmp_path, "generator/l1") == {4: 5.0, 8: 13.0}
    assert scalars(tmp_path, "discriminator/fake") == {4: 2.5, 8: 6.5}


def test_tensorboard_holds_the_terms_of_a_gan(tmp_path):
    run = GANRun(tmp_path, 2, monitor={"interval": 1})()
    names = ("generator/adversarial", "generator/l1", "discriminator/fake", "discriminator/real")
    terms = [scalars(tmp_path / "tensorboard", name) for name in names]
    assert {i: sum(term[i] for term in terms) for i in (1, 2)} == pytest.approx(run.losses, rel=1e-6)


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


def test_a_generator_in_training_makes_its_picture_as_in_inference_and_trains_on():
    torch.manual_seed(0)
    network = TinyGenerator()
    for _ in range(20):  # BatchNorm's statistics become those of some data
        network(torch.randint(1, 17, (4, 1, 8, 8)))
    before = copy.deepcopy(network.state_dict())
    in_inference = copy.deepcopy(network).eval()
    assert network.training and network.norm.training and network.dropout.training
    inferer = partial(VolumeInferer, generate=GeneratorPass())
    state = torch.get_rng_state()
    picture = SampleGrid(Slices(), network, inferer, count=3, seeds=(0, 1))()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(picture, SampleGrid(Slices(), in_inference, inferer, count=3, seeds=(0, 1))())
    assert not torch.equal(picture[:, :, 8:16], picture[:, :, 16:24])
    assert all(module.training for module in network.modules()) and equal(network.state_dict(), before)


def test_pictures_in_between_change_nothing_of_a_gans_training(tmp_path):
    plain = GANRun(tmp_path / "plain", 4)()
    pictured = GANRun(tmp_path / "pictured", 4)
    grid = SampleGrid(Slices(), pictured.network, partial(VolumeInferer, generate=GeneratorPass()))
    TrainingMonitor(tmp_path / "tensorboard", BATCH, picture=grid, picture_interval=1).attach(pictured.trainer)
    assert pictured().losses == plain.losses
    assert equal(pictured.network.state_dict(), plain.network.state_dict())


# ---------------------------------------------------------------------------------------------- ConstantThenLinear


def optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


@pytest.mark.parametrize("constant, decay", [(3, 4), (0, 5), (4, 0)])
def test_each_iteration_has_pix2pixs_share_of_its_rate(constant, decay):
    one, two = optimizer(1e-3), optimizer(4e-3, 2e-2)
    seen = []
    engine = Engine(lambda *_: seen.append([group["lr"] for o in (one, two) for group in o.param_groups]))
    ConstantThenLinear([one, two], constant, decay).attach(engine)
    engine.run(range(constant + decay), max_epochs=1)
    # e, pix2pix's counter, is zero-based
    expected = [1 - max(0, e + 1 - constant) / (decay + 1) for e in range(constant + decay)]
    np.testing.assert_allclose(seen, np.outer(expected, [1e-3, 4e-3, 2e-2]), rtol=1e-12)
    assert seen[:constant] == [[1e-3, 4e-3, 2e-2]] * constant and min(map(min, seen)) > 0


def test_rates_decay_from_where_a_loaded_optimiser_has_got_to():
    loaded = optimizer(1e-3, 2e-3)
    engine = Engine(lambda *_: None)
    ConstantThenLinear([loaded], constant=2, decay=4).attach(engine)
    loaded.load_state_dict(optimizer(5.0, 5.0).state_dict())  # gives it other groups
    engine.run(range(5), max_epochs=1)
    assert [group["lr"] for group in loaded.param_groups] == pytest.approx([0.4e-3, 0.8e-3])


# --------------------------------------------------------------------------------------------- BatchNormStatistics


class Watched(nn.Module):
    """Normalises what is known of a label map, and remembers it: values, and values with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.noisy = nn.BatchNorm2d(2, momentum=0.1), nn.BatchNorm2d(2, momentum=0.3)
        self.images: list[torch.Tensor] = []
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, image):
        x = torch.cat([image / 16, (image / 16) ** 2], dim=1)
        noisy = x + torch.randn(x.shape)
        self.images.append(image)
        self.inputs.append((x, noisy))
        self.output = self.plain(x) + self.noisy(noisy)
        return self.output


def assert_statistics_are_those_of(norm: nn.BatchNorm2d, inputs: list[torch.Tensor]) -> None:
    batches = [x.movedim(1, 0).flatten(1).double().numpy() for x in inputs]  # (channels, values) each
    np.testing.assert_allclose(norm.running_mean, np.mean([x.mean(1) for x in batches], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, np.mean([x.var(1, ddof=1) for x in batches], axis=0), rtol=1e-5)


def items_of(images: list[torch.Tensor]) -> list[list[int]]:
    """Which of the data set's items each batch is made of."""
    known = [Slices()[i]["image"] for i in range(7)]
    return [[next(i for i in range(7) if torch.equal(known[i], slice_)) for slice_ in batch] for batch in images]


@pytest.mark.parametrize(
    ("batch_size", "batches", "sizes", "items"),
    [
        (2, 50, [2, 2, 2], None),  # six of seven: the last batch isn't full
        (2, 2, [2, 2], [0, 2, 4, 6]),  # spread over the data
        (7, 50, [7], [0, 1, 2, 3, 4, 5, 6]),
        (10, 50, [7], [0, 1, 2, 3, 4, 5, 6]),  # there isn't more
        (1, 50, [1] * 7, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_statistics_are_the_mean_over_batches(batch_size, batches, sizes, items):
    network = Watched()
    network(torch.full((4, 1, 8, 8), 16)), network.images.clear(), network.inputs.clear()  # to be forgotten
    BatchNormStatistics(network, Slices(), batch_size, batches)()
    taken = items_of(network.images)
    assert [len(batch) for batch in taken] == sizes
    everything = [i for batch in taken for i in batch]
    assert len(set(everything)) == len(everything) and (items is None or sorted(everything) == items)
    assert everything != sorted(everything)
    plain, noisy = zip(*network.inputs, strict=True)
    assert_statistics_are_those_of(network.plain, plain)
    assert_statistics_are_those_of(network.noisy, noisy)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_modes_momenta_and_random_states_as_they_were(training):
    torch.manual_seed(0)
    network = Watched().train(training)
    measure = BatchNormStatistics(network, Slices(), 2)
    state = torch.get_rng_state()
    measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == [training] * 3
    assert (network.plain.momentum, network.noisy.momentum) == (0.1, 0.3)
    assert all(value.grad is None for value in network.parameters())
    assert not network.output.requires_grad
    first = copy.deepcopy(network.state_dict())
    torch.manual_seed(77)  # the same again, whatever the moment
    measure()
    assert equal(network.state_dict(), first)


def test_a_network_without_batchnorm_is_left_alone():
    network = TinyDenoiser().eval()
    before = copy.deepcopy(network.state_dict())
    BatchNormStatistics(network, Slices(), 2)()
    assert equal(network.state_dict(), before) and not network.training


def test_weights_for_inference_come_with_the_statistics_of_the_ema(tmp_path):
    run, inputs = GANRun(tmp_path, 4), []
    run.ema.ema_model.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    run()  # keeps weights once, at the end
    assert [len(x) for x in inputs] == [2, 2, 2]
    kept = TinyGenerator()
    kept.load_state_dict(load_checkpoint(tmp_path / "model.pt")["model"])
    assert_statistics_are_those_of(kept.norm, inputs)
    assert not torch.allclose(kept.norm.running_var, run.network.norm.running_var, rtol=1e-2)


def test_measuring_leaves_the_network_that_the_ema_follows_alone(tmp_path):
    run = GANRun(tmp_path, 3)()
    before = copy.deepcopy(run.network.state_dict())
    run.ema.ema_model.norm.num_batches_tracked = run.network.norm.num_batches_tracked  # as Ignite leaves it
    run.checkpoints.refresh()
    assert equal(dict(before), dict(run.network.state_dict()))


def test_pictures_of_an_ema_show_the_weights_as_they_are_kept(tmp_path):
    shown = []

    def picture() -> torch.Tensor:
        shown.append(copy.deepcopy(run.ema.ema_model.state_dict()))
        return torch.zeros(3, 4, 4)

    run, kept = GANRun(tmp_path, 3, interval=2, monitor={"picture": picture, "picture_interval": 2}), {}
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2),
        lambda _: kept.update(load_checkpoint(tmp_path / "model.pt")["model"]),
    )
    run()
    assert len(shown) == 1 and equal(dict(shown[0]), kept)
    # As averages, spectral norm's vectors would be shorter.
    for name in ("_u", "_v"):
        assert kept[f"first.parametrizations.weight.0.{name}"].norm().item() == pytest.approx(1, abs=1e-6)
