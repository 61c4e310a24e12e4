"""What a training run leaves: stopped and gone on with, it is the run that was never stopped."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from ignite.engine import Events
from tiny_run import MOMENTUM, DenoiserRun, GANRun, LeastSquares, TinyDenoiser, equal, one_line

from common.bundle import load_checkpoint, save_weights
from common.data import ShuffledStream
from common.diffusion import GaussianDiffusion, HybridLoss


@pytest.mark.parametrize("accumulation_steps, workers", [(1, 0), (3, 0), (1, 1)])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, accumulation_steps, workers):
    options = {"accumulation_steps": accumulation_steps, "interval": 6, "workers": workers}
    whole = DenoiserRun(tmp_path / "whole", 12, **options)()
    half = DenoiserRun(tmp_path / "parts", 6, **options)()
    rest = DenoiserRun(tmp_path / "parts", 12, resume=tmp_path / "parts" / "checkpoint.pt", **options)()

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


def test_a_resumed_run_takes_the_learning_rate_of_its_config(tmp_path):
    DenoiserRun(tmp_path, 2, interval=2)()
    resumed = DenoiserRun(tmp_path, 3, resume=tmp_path / "checkpoint.pt", learning_rate=5e-3, interval=3)()
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [5e-3]
    assert resumed.optimizer.state_dict()["state"][0]["step"] == 3  # all else went on


def test_a_run_killed_between_checkpoints_goes_on_from_the_last(tmp_path):
    whole = DenoiserRun(tmp_path / "whole", 9, interval=4)()
    DenoiserRun(tmp_path / "parts", 9, interval=4).killed_at(7)
    rest = DenoiserRun(tmp_path / "parts", 9, resume=tmp_path / "parts" / "checkpoint.pt", interval=4)()
    assert list(rest.losses) == [5, 6, 7, 8, 9]
    assert {i: whole.losses[i] for i in rest.losses} == rest.losses
    assert equal(whole.network.state_dict(), rest.network.state_dict())


@pytest.mark.parametrize("kind", [DenoiserRun, partial(GANRun, constant=4)])
def test_resuming_a_finished_run_changes_nothing(tmp_path, kind):
    kind(tmp_path, 4, interval=2)()
    before = load_checkpoint(tmp_path / "checkpoint.pt")
    again = kind(tmp_path, 4, resume=tmp_path / "checkpoint.pt", interval=2)()
    assert again.losses == {}
    assert equal(load_checkpoint(tmp_path / "checkpoint.pt"), before)


def test_weights_for_inference_are_the_ema_with_facts(tmp_path):
    run = DenoiserRun(tmp_path, 3)()
    content = load_checkpoint(tmp_path / "model.pt")
    assert equal(content["model"], dict(run.ema.ema_model.state_dict()))
    assert not equal(content["model"], dict(run.network.state_dict()))
    assert content["facts"] == {"bundle": "abdominal_ct_test", "iteration": 3}


def test_a_new_run_does_not_replace_another_ones_checkpoint(tmp_path):
    DenoiserRun(tmp_path, 2)()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"checkpoint\.pt is of an earlier training.* by --resume .*\.pt, or"):
        DenoiserRun(tmp_path, 3)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    DenoiserRun(tmp_path, 3, resume=tmp_path / "checkpoint.pt")()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 3


def test_marks_keep_the_weights_of_their_moment(tmp_path):
    run = DenoiserRun(tmp_path, 6, marks=(2, 5))
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
    run = DenoiserRun(tmp_path, 9, interval=3, loss=SpoiltLoss(call, what))
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
    run = DenoiserRun(tmp_path, 1000, interval=1000, loss=SpoiltLoss(2, "loss"))
    with pytest.raises(FloatingPointError) as caught:
        run()
    assert "iteration 100:" in one_line(caught.value) and "lower learning_rate" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interval_that_parts_an_accumulation_is_refused_before_work(tmp_path):
    run = DenoiserRun(tmp_path, 12, interval=5, accumulation_steps=2)
    with pytest.raises(ValueError) as caught:
        run()
    message = one_line(caught.value)
    assert "save_interval 5" in message and "accumulation_steps 2" in message
    assert run.losses == {}


def test_resuming_from_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        DenoiserRun(tmp_path, 2, resume=tmp_path / "checkpoint.pt")
    assert str(tmp_path / "checkpoint.pt") in one_line(caught.value)


def test_resuming_from_another_network_is_refused_in_one_line(tmp_path):
    DenoiserRun(tmp_path, 1)()
    with pytest.raises(ValueError) as caught:
        DenoiserRun(tmp_path, 2, resume=tmp_path / "checkpoint.pt", width=6)()
    assert str(tmp_path / "checkpoint.pt") in one_line(caught.value) and "another network" in str(caught.value)


def test_resuming_a_run_on_slices_of_another_size_is_refused(tmp_path):
    run = DenoiserRun(tmp_path / "first", 2)
    run.checkpoints.facts = {"bundle": "abdominal_ct_test", "image_size": 64}
    run()
    with pytest.raises(ValueError, match=r"is of .*'image_size': 64.*: resume with the configs .* of then$"):
        DenoiserRun(tmp_path / "second", 4, resume=tmp_path / "first" / "checkpoint.pt")()


def test_resuming_from_weights_is_refused_with_what_they_lack(tmp_path):
    save_weights(tmp_path / "model.pt", TinyDenoiser().state_dict(), {"bundle": "abdominal_ct_test"})
    with pytest.raises(ValueError) as caught:
        DenoiserRun(tmp_path, 2, resume=tmp_path / "model.pt")()
    message = one_line(caught.value)
    assert str(tmp_path / "model.pt") in message and "checkpoint.pt" in message
    assert all(name in message for name in ("network", "ema", "optimizer", "iteration"))


def test_resuming_from_a_damaged_file_is_refused_in_one_line(tmp_path):
    DenoiserRun(tmp_path, 1)()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged") as caught:
        DenoiserRun(tmp_path, 2, resume=path)()
    assert str(path) in one_line(caught.value)


# ------------------------------------------------------------------------------------------------------ with a GAN


@pytest.mark.parametrize("order", [("generator", "discriminator"), ("discriminator", "generator")])
@pytest.mark.parametrize("accumulation_steps, constant", [(1, 2), (2, 6)])
def test_a_resumed_gan_is_the_gan_that_never_stopped(tmp_path, order, accumulation_steps, constant):
    model = {"order": order, "constant": constant}
    options = model | {"accumulation_steps": accumulation_steps, "interval": 4, "marks": (4,)}
    whole = GANRun(tmp_path / "whole", 11, **options)()
    killed = GANRun(tmp_path / "parts", 11, **options).killed_at(7)
    rest = GANRun(tmp_path / "parts", 11, resume=tmp_path / "parts" / "checkpoint.pt", **options)()

    assert list(rest.losses) == list(range(5, 12)) and list(killed.losses) == list(range(1, 8))
    assert killed.losses | rest.losses == whole.losses
    for name, part in whole.state.items():
        assert equal(part.state_dict(), rest.state[name].state_dict()), name
    for name in ("checkpoint.pt", "model.pt"):
        assert equal(load_checkpoint(tmp_path / "whole" / name), load_checkpoint(tmp_path / "parts" / name)), name
    # There was something to lose: what the rates, the statistics and the vectors of the weights were at the start.
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - (11 - constant) / 21))
    fresh = GANRun(tmp_path, 11)
    for buffers in ("norm.running_var", "first.parametrizations.weight.0._u"):
        of = [dict(part.named_buffers())[buffers] for part in (fresh.network, whole.network, whole.ema.ema_model)]
        assert not any(torch.equal(*pair) for pair in itertools.combinations(of, 2)), buffers


def test_a_finished_gan_goes_on_as_one_that_never_stopped(tmp_path):
    whole = GANRun(tmp_path / "whole", 8, interval=4)()
    GANRun(tmp_path / "parts", 4, interval=4)()  # measures its statistics at iteration 4 as the other does
    rest = GANRun(tmp_path / "parts", 8, resume=tmp_path / "parts" / "checkpoint.pt", interval=4)()
    for name, part in whole.state.items():
        assert equal(part.state_dict(), rest.state[name].state_dict()), name


class SpoiltObjective(LeastSquares):
    """Gives one of the networks, in one iteration, a loss or gradients that are not finite."""

    def __init__(self, whose: str, what: str, call: int) -> None:
        self.whose, self.what, self.call, self.calls = whose, what, call, 0

    def spoil(self, terms, x):
        self.calls += 1
        if self.calls == self.call:
            terms["spoilt"] = float("nan") * x.mean() if self.what == "loss" else (x.mean() * 0).sqrt()
        return terms

    def generator_terms(self, discriminator, image, real, fake):
        terms = super().generator_terms(discriminator, image, real, fake)
        return self.spoil(terms, fake) if self.whose == "generator" else terms

    def discriminator_terms(self, discriminator, image, real, fake):
        terms = super().discriminator_terms(discriminator, image, real, fake)
        return self.spoil(terms, discriminator[-1].weight) if self.whose == "discriminator" else terms


@pytest.mark.parametrize("order", [("generator", "discriminator"), ("discriminator", "generator")])
@pytest.mark.parametrize("whose", ["generator", "discriminator"])
@pytest.mark.parametrize("what, call", [("loss", 5), ("loss", 6), ("gradient", 5), ("gradient", 6)])
def test_either_network_of_a_gan_that_explodes_ends_it(tmp_path, order, whose, what, call):
    run = GANRun(tmp_path, 9, interval=3, order=order, objective=SpoiltObjective(whose, what, call))
    with pytest.raises(FloatingPointError) as caught:
        run()
    message = one_line(caught.value)
    assert str(tmp_path / "checkpoint.pt") in message and "iteration 6:" in message and "learning_rate" in message
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    assert content["iteration"] == 3
    for network in ("network", "ema", "discriminator"):
        assert all(value.isfinite().all() for value in content[network].values())


def test_weights_are_refreshed_before_they_are_kept(tmp_path):
    run, calls = GANRun(tmp_path, 6, interval=3, marks=(2, 3)), []
    measure = run.checkpoints.refresh

    def refresh() -> None:
        measure()
        with torch.no_grad():
            run.ema.ema_model.norm.running_mean += 7
        calls.append((run.trainer.state.iteration, run.ema.ema_model.norm.running_mean.clone()))

    run.checkpoints.refresh = refresh
    run()
    assert [iteration for iteration, _ in calls] == [2, 3, 6]  # once where several files are written
    for name, (_, mean) in (("model_2.pt", calls[0]), ("model_3.pt", calls[1]), ("model.pt", calls[2])):
        assert torch.equal(load_checkpoint(tmp_path / name)["model"]["norm.running_mean"], mean)
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint.pt")["ema"]["norm.running_mean"], calls[-1][1])


def test_weights_are_refreshed_for_those_who_show_them_too(tmp_path):
    run, calls = GANRun(tmp_path, 6, interval=3, refresh_interval=2), []
    run.checkpoints.refresh = lambda: calls.append(run.trainer.state.iteration)
    run()
    assert calls == [2, 3, 4, 6]


# ------------------------------------------------------------------------------------------------------------- EMA


def test_the_ema_starts_from_the_initial_weights_and_follows_the_closed_form(tmp_path):
    run = DenoiserRun(tmp_path, 5)
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
