"""The question a denoiser is trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from common.diffusion import GaussianDiffusion
from common.engines import PrepareNoisyBatch
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
