from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDPMScheduler
from scipy.integrate import quad
from scipy.stats import norm

from common.diffusion import (
    GaussianDiffusion,
    HybridLoss,
    NoisySample,
    ddim_timesteps,
    discretised_gaussian_log_likelihood,
    even_timesteps,
    gaussian_kl,
)


def alphas_cumprod(count: int = 1000) -> list[float]:
    """ᾱ in plain Python, from the definition of β."""
    product, result = 1.0, []
    for t in range(count):
        beta = (1e-4 + (0.02 - 1e-4) * t / (count - 1)) * 1000 / count
        product *= 1 - beta
        result.append(product)
    return result


def noisy_sample(diffusion: GaussianDiffusion, t: list[int], size: int = 4, seed: int = 0) -> NoisySample:
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(len(t), 1, size, size, generator=generator) * 2 - 1
    x_0[:, :, 0, :2] = torch.tensor([-1.0, 1.0])  # the open bins
    noise = torch.randn(x_0.shape, generator=generator)
    return NoisySample(x_0, noise, torch.tensor(t), diffusion.add_noise(x_0, noise, torch.tensor(t)))


# tables


@pytest.mark.parametrize("count", [1000, 400, 4000])
def test_tables_follow_from_the_definition_of_beta(count):
    diffusion = GaussianDiffusion(count)
    expected = alphas_cumprod(count)
    for t in (0, 1, 2, count // 2, count - 1):
        before = expected[t - 1] if t else 1.0
        beta = 1 - expected[t] / before
        assert diffusion.alphas_cumprod[t].item() == pytest.approx(expected[t], rel=1e-12)
        assert diffusion.alphas_cumprod_prev[t].item() == pytest.approx(before, rel=1e-12)
        assert diffusion.betas[t].item() == pytest.approx(beta, rel=1e-9)
        assert diffusion.posterior_variance[t].item() == pytest.approx(
            beta * (1 - before) / (1 - expected[t]), rel=1e-9, abs=1e-18
        )


def test_published_values():
    diffusion = GaussianDiffusion()
    assert diffusion.alphas_cumprod[999].item() == pytest.approx(4.0358e-5, rel=1e-5)
    assert diffusion.posterior_log_variance[:2].tolist() == pytest.approx([-9.81673, -9.81673], abs=1e-5)
    assert diffusion.betas[[0, 999]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-9)
    assert diffusion.timesteps.tolist() == list(range(1000)) and len(diffusion) == 1000


def test_tables_stay_in_double_precision_and_out_of_checkpoints():
    diffusion = GaussianDiffusion().half()
    sample = noisy_sample(diffusion, [3])
    diffusion.get_velocity(sample.x_0, sample.noise, sample.t)
    assert diffusion.alphas_cumprod.dtype == diffusion.betas.dtype == torch.float64
    assert diffusion.alphas_cumprod[999].item() == pytest.approx(alphas_cumprod()[999], rel=1e-12)
    assert diffusion.state_dict() == {}


@pytest.mark.parametrize("kept", [range(1000), even_timesteps(25), ddim_timesteps(50), [0, 7, 8, 999]])
def test_posterior_is_bayes_rule_over_the_composed_steps(kept):
    """q(x_s | x_t, x_0) is the product of q(x_s | x_0) and of the steps s+1…t one after the other."""
    kept = list(kept)
    process = GaussianDiffusion().respace(kept)
    x_0, x_t = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.8, dtype=torch.float64)
    full = alphas_cumprod()
    for i in sorted({1, len(kept) // 2, len(kept) - 1}):
        scale, variance, product = 1.0, 0.0, full[kept[i - 1]]
        for t in range(kept[i - 1] + 1, kept[i] + 1):  # x_t = scale · x_s + noise of this variance
            alpha = full[t] / full[t - 1]
            scale, variance = scale * math.sqrt(alpha), alpha * variance + 1 - alpha
        precision = scale**2 / variance + 1 / (1 - product)
        expected = (scale * x_t.item() / variance + math.sqrt(product) * x_0.item() / (1 - product)) / precision
        mean, log_variance = process.posterior(x_0, x_t, i)
        assert mean.item() == pytest.approx(expected, rel=1e-8)
        assert log_variance == pytest.approx(-math.log(precision), rel=1e-8)


def test_posterior_of_the_first_step_is_the_image():
    sample = noisy_sample(GaussianDiffusion(), [0, 0])
    mean, _ = GaussianDiffusion().posterior(sample.x_0, sample.x_t, sample.t)
    torch.testing.assert_close(mean, sample.x_0)


def test_int_and_tensor_indices_agree():
    process = GaussianDiffusion().respace(even_timesteps(25))
    sample = noisy_sample(process, [6, 6, 6])
    output = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    by_tensor = process.model_distribution(output, sample.x_t, sample.t, clip=True)
    for one, other in zip(by_tensor, process.model_distribution(output, sample.x_t, 6, clip=True), strict=True):
        torch.testing.assert_close(one, other)


# spacings


def test_even_timesteps_are_the_published_ones():
    assert even_timesteps(25)[:4] == [0, 42, 83, 125] and even_timesteps(25)[-2:] == [957, 999]
    assert even_timesteps(250)[:3] == [0, 4, 8] and even_timesteps(250)[-2:] == [995, 999]
    assert even_timesteps(1000) == list(range(1000))
    assert even_timesteps(3, num_train_timesteps=5) == [0, 2, 4]


def test_ddim_timesteps_have_one_stride():
    assert ddim_timesteps(25) == list(range(0, 1000, 40))
    assert ddim_timesteps(2, num_train_timesteps=10) == [0, 5]


def test_impossible_step_counts_name_the_remedy():
    with pytest.raises(
        ValueError, match=r"choose one of 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000$"
    ):
        ddim_timesteps(30)
    for n in (1, 1001):
        with pytest.raises(ValueError, match="choose 2 to 1000 steps"):
            even_timesteps(n)


@pytest.mark.parametrize("timesteps", [[], [5], [3, 2], [1, 1, 2], [-1, 4], [0, 1000]])
def test_respacing_refuses_what_is_no_sequence_of_timesteps(timesteps):
    with pytest.raises(ValueError, match="ascending integers in 0…999"):
        GaussianDiffusion().respace(timesteps)


def test_respaced_process_keeps_the_original_noise_levels():
    kept = even_timesteps(25)
    process = GaussianDiffusion().respace(kept)
    full = alphas_cumprod()
    assert process.timesteps.tolist() == kept
    assert process.alphas_cumprod.tolist() == pytest.approx([full[t] for t in kept], rel=1e-12)
    assert process.betas[3].item() == pytest.approx(1 - full[125] / full[83], rel=1e-12)
    assert process.betas[0].item() == pytest.approx(1e-4, rel=1e-9)


# noising


def test_add_noise_has_the_moments_of_the_forward_chain():
    """Twenty steps x ← √(1−β)·x + √β·z, drawn one by one, against one draw of q(x_19 | x_0)."""
    process = GaussianDiffusion().respace(range(0, 1000, 50))
    generator = torch.Generator().manual_seed(0)
    chain = torch.full((1, 1, 300, 300), 0.7)
    for beta in process.betas.tolist():
        chain = math.sqrt(1 - beta) * chain + math.sqrt(beta) * torch.randn(chain.shape, generator=generator)
    noise = torch.randn(chain.shape, generator=generator)
    x_t = process.add_noise(torch.full_like(chain, 0.7), noise, torch.tensor([len(process) - 1]))
    alpha = alphas_cumprod()[950]
    for sample in (chain, x_t):
        assert sample.mean().item() == pytest.approx(0.7 * math.sqrt(alpha), abs=0.01)
        assert sample.std().item() == pytest.approx(math.sqrt(1 - alpha), rel=0.01)


def test_add_noise_treats_each_sample_by_its_own_timestep():
    full = alphas_cumprod()
    sample = noisy_sample(GaussianDiffusion(), [0, 500, 999])
    for i, t in enumerate([0, 500, 999]):
        expected = math.sqrt(full[t]) * sample.x_0[i] + math.sqrt(1 - full[t]) * sample.noise[i]
        torch.testing.assert_close(sample.x_t[i], expected)


def test_predict_x0_undoes_add_noise():
    diffusion = GaussianDiffusion()
    sample = noisy_sample(diffusion, [0, 10, 500])
    torch.testing.assert_close(diffusion.predict_x0(sample.x_t, sample.noise, sample.t), sample.x_0)


def test_monai_agrees_on_noise_and_velocity():
    """MONAI's linear schedule is the same; its float32 product is what the tolerance is for."""
    sample = noisy_sample(GaussianDiffusion(), [1, 300, 999])
    for name in ("add_noise", "get_velocity"):
        ours = getattr(GaussianDiffusion(), name)(sample.x_0, sample.noise, sample.t)
        monais = getattr(DDPMScheduler(), name)(sample.x_0, sample.noise, sample.t)
        torch.testing.assert_close(ours, monais, atol=1e-4, rtol=0)


def test_a_monai_inferer_trains_with_it():
    sample = noisy_sample(GaussianDiffusion(), [0, 700])

    def network(x, timesteps, context):
        return torch.cat([x, timesteps.view(-1, 1, 1, 1).expand_as(x)], dim=1)

    output = DiffusionInferer(GaussianDiffusion())(sample.x_0, network, sample.noise, sample.t)
    torch.testing.assert_close(output[:, :1], sample.x_t)
    assert output[:, 1].amin(dim=(1, 2)).tolist() == [0, 700]


# what a denoiser's output means


@pytest.mark.parametrize("v", [-1.0, -0.5, 0.0, 1.0, 3.0])
def test_learned_variance_is_a_geometric_mean_of_its_bounds(v):
    full = alphas_cumprod()
    t = 400
    beta = 1 - full[t] / full[t - 1]
    posterior_variance = beta * (1 - full[t - 1]) / (1 - full[t])
    sample = noisy_sample(GaussianDiffusion(), [t])
    output = torch.cat([sample.noise, torch.full_like(sample.noise, v)], dim=1)
    _, log_variance, _ = GaussianDiffusion().model_distribution(output, sample.x_t, sample.t, clip=False)
    expected = beta ** ((v + 1) / 2) * posterior_variance ** ((1 - v) / 2)
    assert log_variance.exp().flatten().tolist() == pytest.approx([expected] * 16, rel=1e-5)


def test_true_noise_gives_the_true_posterior():
    diffusion = GaussianDiffusion()
    sample = noisy_sample(diffusion, [0, 1, 600])
    output = torch.cat([sample.noise, -torch.ones_like(sample.noise)], dim=1)
    mean, log_variance, x_0 = diffusion.model_distribution(output, sample.x_t, sample.t, clip=False)
    true_mean, true_log_variance = diffusion.posterior(sample.x_0, sample.x_t, sample.t)
    torch.testing.assert_close(x_0, sample.x_0, atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, true_mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_variance, true_log_variance.expand_as(log_variance))


def test_clipping_holds_x0_and_moves_the_mean_with_it():
    diffusion = GaussianDiffusion()
    x_t, t = torch.full((1, 1, 2, 2), 0.5), torch.tensor([300])
    output = torch.full((1, 2, 2, 2), -30.0)
    free = diffusion.model_distribution(output, x_t, t, clip=False)
    held = diffusion.model_distribution(output, x_t, t, clip=True)
    assert free[2].min() > 1 and torch.equal(held[2], torch.ones_like(x_t))
    full = alphas_cumprod()
    shift = math.sqrt(full[299]) * (1 - full[300] / full[299]) / (1 - full[300]) * (free[2] - 1)
    torch.testing.assert_close(free[0] - held[0], shift, atol=1e-6, rtol=1e-4)


# loss


def test_kl_is_the_integral_of_the_definition():
    q, p = norm(0.3, 0.5), norm(-0.2, 0.8)
    expected, _ = quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -10, 10)
    arguments = (torch.tensor(value, dtype=torch.float64) for value in (0.3, math.log(0.25), -0.2, math.log(0.64)))
    assert gaussian_kl(*arguments).item() == pytest.approx(expected, rel=1e-6)


def test_likelihood_is_the_probability_of_a_grey_value():
    greys = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, std = 0.1, 0.4
    log_probability = discretised_gaussian_log_likelihood(
        greys, torch.full_like(greys, mean), torch.full_like(greys, 2 * math.log(std))
    )
    edges = np.concatenate([[-np.inf], (greys[1:].numpy() + greys[:-1].numpy()) / 2, [np.inf]])
    exact = np.diff(norm.cdf(edges, mean, std))
    # Page's tanh approximation has an error of 3e-4 in the distribution function, and 1.3 % in its slope.
    np.testing.assert_allclose(log_probability.exp().numpy()[1:-1], exact[1:-1], rtol=0.02, atol=1e-6)
    np.testing.assert_allclose(log_probability.exp().numpy()[[0, -1]], exact[[0, -1]], atol=4e-4)
    assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_likelihood_has_a_floor():
    value = discretised_gaussian_log_likelihood(torch.tensor(0.9), torch.tensor(-0.9), torch.tensor(-9.0))
    assert value.item() == pytest.approx(math.log(1e-12), rel=1e-6)


def expected_loss(x_0: float, noise: float, t: int, epsilon: float, v: float) -> tuple[float, float]:
    """(squared error, bound in bits) of one pixel, from the formulas in plain Python."""
    full = alphas_cumprod()
    before = full[t - 1] if t else 1.0
    beta = 1 - full[t] / before
    x_t = math.sqrt(full[t]) * x_0 + math.sqrt(1 - full[t]) * noise
    c1, c2 = beta * math.sqrt(before) / (1 - full[t]), (1 - before) * math.sqrt(1 - beta) / (1 - full[t])
    mean = c1 * (x_t - math.sqrt(1 - full[t]) * epsilon) / math.sqrt(full[t]) + c2 * x_t
    at = max(t, 1)  # the variance of t = 0 is that of t = 1
    lowest = (1 - full[at] / full[at - 1]) * (1 - full[at - 1]) / (1 - full[at])
    variance = beta ** ((1 + v) / 2) * lowest ** ((1 - v) / 2)
    if t > 0:
        true_mean = c1 * x_0 + c2 * x_t
        nats = 0.5 * (math.log(variance / lowest) + (lowest + (true_mean - mean) ** 2) / variance - 1)
    else:

        def cdf(x: float) -> float:
            z = (x - mean) / math.sqrt(variance)
            return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        above = 1.0 if x_0 > 0.999 else cdf(x_0 + 1 / 255)
        below = 0.0 if x_0 < -0.999 else cdf(x_0 - 1 / 255)
        nats = -math.log(max(above - below, 1e-12))
    return (epsilon - noise) ** 2, nats / math.log(2)


def test_loss_follows_the_formulas_pixel_by_pixel():
    diffusion = GaussianDiffusion()
    steps = [0, 1, 50, 999, 0]
    target = noisy_sample(diffusion, steps)
    generator = torch.Generator().manual_seed(7)
    output = torch.cat([target.noise, torch.zeros_like(target.noise)], 1)
    output = output + 0.3 * torch.randn(output.shape, generator=generator)
    output[4, 0, 2] += 40  # far off at t = 0: the floor of the likelihood
    loss = HybridLoss(diffusion)(output, target)
    for i, t in enumerate(steps):
        pixels = [
            expected_loss(*values, t=t, epsilon=epsilon, v=v)
            for *values, epsilon, v in zip(
                target.x_0[i].flatten().tolist(), target.noise[i].flatten().tolist(), *output[i].flatten(1).tolist(),
                strict=True,
            )
        ]  # fmt: skip
        assert loss[i].item() == pytest.approx(sum(map(sum, pixels)) / len(pixels), rel=2e-3)


def test_loss_of_a_perfect_denoiser_is_zero_and_of_the_wrong_variance_known():
    diffusion, full = GaussianDiffusion(), alphas_cumprod()
    target = noisy_sample(diffusion, [1, 20, 300])
    for v in (-1.0, 1.0):
        loss = HybridLoss(diffusion)(torch.cat([target.noise, torch.full_like(target.noise, v)], 1), target)
        for i, t in enumerate([1, 20, 300]):
            ratio = (1 - full[t - 1]) / (1 - full[t])  # β̃/β
            nats = 0.0 if v < 0 else 0.5 * (ratio - 1 - math.log(ratio))
            assert loss[i].item() == pytest.approx(nats / math.log(2), abs=1e-5)


def test_the_bound_teaches_only_the_variance():
    diffusion = GaussianDiffusion()
    target = noisy_sample(diffusion, [0, 5, 800])
    output = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    HybridLoss(diffusion)(output, target).sum().backward()
    squared_error_alone = 2 * (output[:, :1] - target.noise) / 16
    torch.testing.assert_close(output.grad[:, :1], squared_error_alone.detach())

    again = output.detach().requires_grad_()
    HybridLoss(diffusion).bound(again, target).sum().backward()
    torch.testing.assert_close(output.grad[:, 1], again.grad[:, 1])
    assert output.grad[:, 1].abs().amin() > 0


def test_loss_is_in_float32_under_autocast():
    diffusion = GaussianDiffusion()
    target = noisy_sample(diffusion, [0, 500])
    output = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = HybridLoss(diffusion)(output, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, HybridLoss(diffusion)(output.float(), target))
