"""The question a denoiser is trained on, and the steps of a GAN with one weight each, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Events
from scipy.stats import chisquare, kstest
from torch import nn

from common.diffusion import GaussianDiffusion
from common.engines import GANTrainer, PrepareNoisyBatch, prepare_slices
from common.transforms import NO_CONDITION

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
PREPARE = PrepareNoisyBatch(GaussianDiffusion())


def batch(size: int, side: int = 8) -> dict[str, torch.Tensor]:
    ct = torch.linspace(0, 1, size * side * side).view(size, 1, side, side)
    return {"image": torch.arange(size * side * side).view_as(ct).remainder(17).to(torch.uint8), "ct": ct}


def test_x_t_is_what_the_target_says():
    torch.manual_seed(0)
    data = batch(64)
    x_t, target, (t, image), keywords = PREPARE(data, torch.device("cpu"))
    alpha = ALPHAS_CUMPROD[target.t.numpy()][:, None, None, None]
    expected = np.sqrt(alpha) * target.x_0.double().numpy() + np.sqrt(1 - alpha) * target.noise.double().numpy()
    np.testing.assert_allclose(x_t.numpy(), expected, atol=1e-6)
    assert x_t is target.x_t and t is target.t and keywords == {}
    assert torch.equal(image, data["image"]) and image.dtype == torch.uint8


def test_conditions_are_dropped_whole_and_as_often_as_asked():
    torch.manual_seed(0)
    prepare, data = PrepareNoisyBatch(GaussianDiffusion(), condition_dropout=0.2), batch(20_000, side=2)
    before = data["image"].clone()
    _, _, (_, image), _ = prepare(data)
    dropped = (image == NO_CONDITION).all(dim=(1, 2, 3))
    assert abs(dropped.float().mean().item() - 0.2) < 4 * (0.2 * 0.8 / 20_000) ** 0.5
    assert torch.equal(image[~dropped], before[~dropped]) and torch.equal(data["image"], before)
    assert image.dtype == torch.uint8
    neighbours = dropped[1:] & dropped[:-1]  # each sample for itself
    assert abs(neighbours.float().mean().item() - 0.04) < 6 * (0.04 * 0.96 / 20_000) ** 0.5


def test_dropping_conditions_follows_the_seed_and_leaves_the_question_as_it_was():
    def prepared(condition_dropout: float) -> tuple:
        torch.manual_seed(3)
        _, target, (_, image), _ = PrepareNoisyBatch(GaussianDiffusion(), condition_dropout)(batch(64))
        return target, image

    (target, image), (again, same_image), (plain, kept) = prepared(0.5), prepared(0.5), prepared(0.0)
    assert torch.equal(image, same_image) and not torch.equal(image, kept)
    for sample in (again, plain):
        assert all(torch.equal(a, b) for a, b in zip(target, sample, strict=True))


def test_without_dropout_only_time_and_noise_are_random():
    data = batch(8)
    torch.manual_seed(5)
    PrepareNoisyBatch(GaussianDiffusion(), condition_dropout=0.0)(data)
    after = torch.rand(4)
    torch.manual_seed(5)
    torch.randint(1000, (8,)), torch.randn(data["ct"].shape)
    assert torch.equal(after, torch.rand(4))


@pytest.mark.parametrize("condition_dropout", [-0.1, 1.0, float("nan")])
def test_impossible_dropout_is_refused(condition_dropout):
    with pytest.raises(ValueError, match=r"condition_dropout is .* choose 0 .* below 1"):
        PrepareNoisyBatch(GaussianDiffusion(), condition_dropout)


def test_x_0_is_the_ct_in_network_space():
    data = batch(2)
    _, target, _, _ = PREPARE(data)
    assert target.x_0.min() == -1 and target.x_0.max() == 1
    torch.testing.assert_close((target.x_0 + 1) / 2, data["ct"], rtol=0, atol=1e-7)


def test_timesteps_are_uniform_over_the_whole_process():
    torch.manual_seed(0)
    _, target, _, _ = PREPARE(batch(50_000, side=1))
    counts = np.bincount(target.t.numpy(), minlength=1000)
    assert len(counts) == 1000 and counts[0] > 0 and counts[-1] > 0
    assert chisquare(counts).pvalue > 0.01


def test_noise_is_standard_normal_and_fresh():
    torch.manual_seed(0)
    noises = [PREPARE(batch(16, side=32))[1].noise for _ in range(2)]
    assert kstest(noises[0].numpy().ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(noises[0].numpy().ravel(), noises[1].numpy().ravel())[0, 1]) < 0.03
    slices = noises[0].flatten(1).numpy()
    assert abs(np.corrcoef(slices) - np.eye(16)).max() < 0.15  # 1024 pixels a slice


def test_a_respaced_process_is_asked_within_its_own_steps():
    torch.manual_seed(0)
    process = GaussianDiffusion().respace([0, 500, 999])
    x_t, target, _, _ = PrepareNoisyBatch(process)(batch(300, side=2))
    assert target.t.unique().tolist() == [0, 1, 2]
    alpha = torch.tensor(ALPHAS_CUMPROD[[0, 500, 999]])[target.t].view(-1, 1, 1, 1)
    expected = alpha.sqrt() * target.x_0 + (1 - alpha).sqrt() * target.noise
    torch.testing.assert_close(x_t.double(), expected, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------------- the GAN

GENERATOR_FIRST, DISCRIMINATOR_FIRST = ("generator", "discriminator"), ("discriminator", "generator")
ORDERS = pytest.mark.parametrize("order", [GENERATOR_FIRST, DISCRIMINATOR_FIRST], ids=lambda order: order[0])
W, A, RATE, DISCRIMINATOR_RATE = 0.7, -0.4, 0.3, 0.2


class Scale(nn.Module):
    """A network with one weight: a generator makes w · id / 16 of a label map, a discriminator a · x of a slice."""

    def __init__(self, weight: float, unit: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.unit, self.calls = unit, 0

    def forward(self, x):
        self.calls += 1
        return self.weight * (x.double() / self.unit)


class Squares:
    """Terms whose gradients are quickly worked out; remembers the slices that each step saw."""

    def __init__(self) -> None:
        self.fakes: list[tuple[str, torch.Tensor]] = []

    def generator_terms(self, discriminator, image, real, fake):
        assert fake.requires_grad and not any(p.requires_grad for p in discriminator.parameters())
        self.fakes.append(("generator", fake.detach().clone()))
        return {"adversarial": (discriminator(fake) - 1).square().mean(), "l2": (fake - real).square().mean()}

    def discriminator_terms(self, discriminator, image, real, fake):
        assert not fake.requires_grad and all(p.requires_grad for p in discriminator.parameters())
        self.fakes.append(("discriminator", fake.clone()))
        return {"fake": discriminator(fake).square().mean(), "real": (discriminator(real) - 1).square().mean()}


def generator_gradient(w: float, a: float, m: np.ndarray, r: np.ndarray) -> float:
    """d/dw of mean (a w m - 1)² + mean (w m - r)²."""
    return float(np.mean(2 * (a * w * m - 1) * a * m + 2 * (w * m - r) * m))


def discriminator_gradient(w: float, a: float, m: np.ndarray, r: np.ndarray) -> float:
    """d/da of mean (a w m)² + mean (a r - 1)²."""
    return float(np.mean(2 * a * (w * m) ** 2 + 2 * (a * r - 1) * r))


def batches(count: int, size: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    image = torch.randint(17, (count * size, 1, 3, 5), generator=generator, dtype=torch.uint8)
    ct = torch.rand(image.shape, generator=generator, dtype=torch.float64)
    return [{"image": image[k : k + size], "ct": ct[k : k + size]} for k in range(0, count * size, size)]


def by_hand(order, data, accumulation_steps: int = 1, epoch_length: int | None = None) -> tuple[float, float]:
    """The two weights after these batches, with the gradients above and plain gradient descent."""
    value = {"generator": W, "discriminator": A}
    rate = {"generator": RATE, "discriminator": DISCRIMINATOR_RATE}
    gradient = {"generator": generator_gradient, "discriminator": discriminator_gradient}
    collected = {"generator": 0.0, "discriminator": 0.0}
    epoch_length = epoch_length or len(data)
    for index, item in enumerate(data):
        m, r = item["image"].double().numpy() / 16, 2 * item["ct"].numpy() - 1
        place = index % epoch_length + 1
        for name in order:
            collected[name] += gradient[name](value["generator"], value["discriminator"], m, r) / accumulation_steps
            if place % accumulation_steps == 0 or place == epoch_length:
                value[name] -= rate[name] * collected[name]
                collected[name] = 0.0
    return value["generator"], value["discriminator"]


def gan(data, order=GENERATOR_FIRST, generator=None, discriminator=None, **options) -> GANTrainer:
    network, discriminator = generator or Scale(W, 16), discriminator or Scale(A)
    options = {
        "max_epochs": 1,
        "epoch_length": len(data),
        "optimizer": torch.optim.SGD(network.parameters(), lr=RATE),
        "discriminator_optimizer": torch.optim.SGD(discriminator.parameters(), lr=DISCRIMINATOR_RATE),
        "objective": Squares(),
    } | options
    return GANTrainer(
        device=torch.device("cpu"),
        train_data_loader=data,
        network=network,
        discriminator=discriminator,
        order=order,
        **options,
    )


def weights(trainer: GANTrainer) -> tuple[float, float]:
    return trainer.network.weight.item(), trainer.discriminator.weight.item()


def test_slices_come_with_their_label_maps_in_network_space():
    image, real = prepare_slices(batch(2), torch.device("cpu"))
    assert torch.equal(image, batch(2)["image"]) and image.dtype == torch.uint8
    torch.testing.assert_close(real, 2 * batch(2)["ct"] - 1, rtol=0, atol=0)


@ORDERS
def test_each_network_steps_once_and_the_second_meets_the_first_as_it_has_become(order):
    data = batches(3)
    trainer = gan(data, order)
    trainer.run()
    assert weights(trainer) == pytest.approx(by_hand(order, data), rel=1e-12)
    assert by_hand(GENERATOR_FIRST, data) != pytest.approx(by_hand(DISCRIMINATOR_FIRST, data), rel=1e-3)
    assert [name for name, _ in trainer.objective.fakes] == list(order) * 3
    # The generator's slices are made anew once it has stepped, and else shared.
    assert trainer.network.calls == (6 if order == GENERATOR_FIRST else 3)
    assert trainer.discriminator.calls == 9


class Noisy(Scale):
    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape)


@ORDERS
def test_slices_are_shared_or_fresh_with_their_noise(order):
    torch.manual_seed(0)
    trainer = gan(batches(2), order, generator=Noisy(W, 16))
    trainer.run()
    fakes = [fake for _, fake in trainer.objective.fakes]
    for first, second in (fakes[:2], fakes[2:]):
        assert torch.equal(first, second) == (order == DISCRIMINATOR_FIRST)


@ORDERS
def test_a_step_leaves_no_gradient_in_the_other_network(order):
    trainer, steps = gan(batches(2), order), []
    networks = {"generator": trainer.network, "discriminator": trainer.discriminator}
    optimizers = {"generator": trainer.optimizer, "discriminator": trainer.discriminator_optimizer}
    for name, other in (GENERATOR_FIRST, DISCRIMINATOR_FIRST):

        def look(*_, name=name, other=other):
            steps.append((name, networks[name].weight.grad is not None, networks[other].weight.grad))

        optimizers[name].register_step_pre_hook(look)
    trainer.run()
    assert steps == [(name, True, None) for name in (*order, *order)]
    assert all(network.weight.requires_grad and network.weight.grad is None for network in networks.values())


@ORDERS
def test_gradients_accumulate_to_the_mean_of_the_large_batch(order):
    small, (large,) = batches(3, size=2), batches(1, size=6)
    accumulated, at_once = gan(small, order, accumulation_steps=3), gan([large], order)
    accumulated.run(), at_once.run()
    assert weights(accumulated) == pytest.approx(by_hand(order, small, accumulation_steps=3), rel=1e-12)
    first, second = (0, 1) if order == GENERATOR_FIRST else (1, 0)
    assert weights(accumulated)[first] == pytest.approx(weights(at_once)[first], rel=1e-12)
    # The second has met the first as it was in two of three iterations.
    assert weights(accumulated)[second] != pytest.approx(weights(at_once)[second], rel=1e-3)


@ORDERS
@pytest.mark.parametrize("max_epochs, epoch_length", [(1, 5), (2, 5), (1, 2)])
def test_what_is_accumulated_at_the_end_of_an_epoch_is_a_step(order, max_epochs, epoch_length):
    data = batches(epoch_length)
    trainer, steps = gan(data, order, max_epochs=max_epochs, accumulation_steps=3), []
    trainer.optimizer.register_step_pre_hook(lambda *_: steps.append(trainer.state.iteration))
    trainer.run()
    expected = by_hand(order, data * max_epochs, accumulation_steps=3, epoch_length=epoch_length)
    assert weights(trainer) == pytest.approx(expected, rel=1e-12)
    assert steps == {(1, 5): [3, 5], (2, 5): [3, 5, 8, 10], (1, 2): [2]}[max_epochs, epoch_length]


@ORDERS
def test_the_output_has_each_term_and_their_sum(order):
    data = batches(1)
    trainer = gan(data, order)
    trainer.run()
    output, m, r = trainer.state.output, data[0]["image"].numpy() / 16, 2 * data[0]["ct"].numpy() - 1
    after = by_hand(order, data)  # the second to step has met the first as it is now
    w, a = (after[0], A) if order == GENERATOR_FIRST else (W, after[1])
    expected = {
        "generator/adversarial": np.mean((a * W * m - 1) ** 2),
        "generator/l2": np.mean((W * m - r) ** 2),
        "discriminator/fake": np.mean((A * w * m) ** 2),
        "discriminator/real": np.mean((A * r - 1) ** 2),
    }
    assert {name: value.item() for name, value in output["terms"].items()} == pytest.approx(expected, rel=1e-12)
    assert output["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-12)
    assert not any(value.requires_grad for value in (output["loss"], *output["terms"].values()))
    assert torch.equal(output["image"], data[0]["image"])
    np.testing.assert_allclose(output["label"].numpy(), r, rtol=1e-15)


class Probe(nn.Module):
    """A convolution that remembers in what precision it worked, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.forwards: set[tuple] = set()
        self.backwards: set[bool] = set()

    def forward(self, x):
        x = self.conv(x.float())
        self.forwards.add((x.dtype, torch.is_autocast_enabled("cpu")))
        if x.requires_grad:
            x.register_hook(lambda gradient: self.backwards.add(torch.is_autocast_enabled("cpu")))
        return x


class ProbedSquares(Squares):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple] = set()

    def generator_terms(self, discriminator, image, real, fake):
        self.seen.add((fake.dtype, torch.is_autocast_enabled("cpu")))
        return super().generator_terms(discriminator, image, real, fake)

    def discriminator_terms(self, discriminator, image, real, fake):
        self.seen.add((fake.dtype, torch.is_autocast_enabled("cpu")))
        return super().discriminator_terms(discriminator, image, real, fake)


@ORDERS
@pytest.mark.parametrize("amp, dtype", [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16)])
def test_networks_and_losses_run_in_the_precision_asked_for(order, amp, dtype):
    torch.manual_seed(0)
    data = [{"image": item["image"], "ct": item["ct"].float()} for item in batches(2)]
    generator, discriminator = Probe(), Probe()
    before = [value.clone() for network in (generator, discriminator) for value in network.parameters()]
    options = {"objective": ProbedSquares(), "amp": amp, "amp_kwargs": {"dtype": dtype}}
    trainer = gan(data, order, generator, discriminator, **options)
    trainer.run()
    expected = {(dtype, True)} if amp else {(torch.float32, False)}
    assert generator.forwards == discriminator.forwards == trainer.objective.seen == expected
    assert generator.backwards == discriminator.backwards == {False}
    assert trainer.scaler is None  # bfloat16 has float32's range
    after = [value for network in (generator, discriminator) for value in network.parameters()]
    assert all(value.dtype == torch.float32 for value in after)
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


@ORDERS
def test_both_networks_train_in_training_mode(order):
    trainer = gan(batches(3), order)
    modes = []
    for network in (trainer.network, trainer.discriminator):
        network.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    @trainer.on(Events.ITERATION_COMPLETED)
    def as_a_picture_might_leave_them(engine):
        trainer.network.eval(), trainer.discriminator.eval()

    trainer.run()
    assert all(modes) and len(modes) >= 12


class Replica(nn.Module):
    """Wraps a network as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        return self.module(x)


@ORDERS
def test_the_generators_step_passes_by_the_discriminators_replica(order):
    data = batches(3)
    trainer = gan(data, order, discriminator=Replica(Scale(A)))
    trainer.run()
    assert trainer.discriminator.calls == 6 and trainer.discriminator.module.calls == 9
    found = trainer.network.weight.item(), trainer.discriminator.module.weight.item()
    assert found == pytest.approx(by_hand(order, data), rel=1e-12)


def test_compilation_is_of_both_networks(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    gan(batches(1))
    assert compiled == []
    trainer = gan(batches(1), compile=True)
    assert compiled == [trainer.network, trainer.discriminator]


@pytest.mark.parametrize("order", [("generator",), ("generator", "generator"), ("critic", "generator"), "generator"])
def test_another_order_is_refused(order):
    with pytest.raises(ValueError, match=r"order is .*: name generator and discriminator once each"):
        gan(batches(1), order)


@pytest.mark.parametrize("accumulation_steps", [0, -1])
def test_accumulating_nothing_is_refused(accumulation_steps):
    with pytest.raises(ValueError, match=f"accumulation_steps is {accumulation_steps}: choose 1 .* or more"):
        gan(batches(1), accumulation_steps=accumulation_steps)
