"""The GANs' terms against closed forms, and LabelMix's mask against the binomial distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common import losses


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def label_maps(seed: int = 0) -> torch.Tensor:
    """2 x 6 x 6 pixels of some classes, of which 3 and 16 are in one sample only, and 1 and 9 in none."""
    image = torch.randint(0, 9, (2, 1, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    image[image == 1] = 0
    image[1][image[1] == 3] = 0
    image[1, 0, :2] = 16
    return image


def test_hinge_of_a_discriminator():
    logits = [tensor(-3.0, -0.5, 0.25, 2.0), tensor(0.5, 1.5)]
    fake = ((0 + 0.5 + 1.25 + 3) / 4 + (1.5 + 2.5) / 2) / 2
    real = ((4 + 1.5 + 0.75 + 0) / 4 + (0.5 + 0) / 2) / 2
    assert losses.hinge(logits, is_real=False).item() == pytest.approx(fake)
    assert losses.hinge(logits, is_real=True).item() == pytest.approx(real)


@pytest.mark.parametrize(("is_real", "slopes"), [(False, (0, 1, 1, 1)), (True, (-1, -1, -1, 0))])
def test_hinge_leaves_alone_what_is_told_apart(is_real, slopes):
    logits = tensor(-3.0, -0.5, 0.25, 2.0)
    losses.hinge([logits, tensor(0.0)], is_real).backward()
    assert logits.grad.tolist() == [slope / 4 / 2 for slope in slopes]  # four elements, two scales


def test_hinge_of_a_generator_has_no_hinge():
    logits = [tensor(-3.0, 5.0, 1.0, 1.0), tensor(-2.0)]
    loss = losses.hinge_generator(logits)
    assert loss.item() == pytest.approx((-1 + 2) / 2)
    loss.backward()
    assert logits[0].grad.tolist() == [-1 / 8] * 4 and logits[1].grad.tolist() == [-1 / 2]


def features(seed: int) -> list[list[torch.Tensor]]:
    """Two scales: two and three layers of features of any shapes, then the logits."""
    shapes = [[(2, 3, 4, 4), (2, 5, 2, 2), (2, 1, 3, 3)], [(2, 3, 2, 2), (2, 2, 2, 2), (2, 4, 1, 1), (2, 1, 1, 1)]]
    return [[random(*shape, seed=seed).requires_grad_() for shape in scale] for scale in shapes]


def test_feature_matching():
    fake, real = features(0), features(1)
    scales = [
        [(f - r).abs().mean().item() for f, r in zip(*pair, strict=True)] for pair in zip(fake, real, strict=True)
    ]
    expected = (sum(scales[0][:2]) + sum(scales[1][:3])) / 2
    loss = losses.feature_matching(fake, real)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    for scale in fake:
        assert all(layer.grad.any() for layer in scale[:-1]) and scale[-1].grad is None
    assert all(layer.grad is None for scale in real for layer in scale)


def test_perceptual():
    """With maps that are known: each is the picture's sum over channels, times its number."""
    fake, real = random(2, 1, 4, 4).requires_grad_(), random(2, 1, 4, 4, seed=1).requires_grad_()
    seen = []

    def maps(x: torch.Tensor) -> list[torch.Tensor]:
        seen.append(x.detach())
        return [number * x.sum(1) for number in (1, 2, 3, 4, 5)]

    loss = losses.perceptual(maps, fake, real)
    weights = 1 / 32 + 2 / 16 + 3 / 8 + 4 / 4 + 5
    assert loss.item() == pytest.approx(weights * 3 * (fake - real).abs().mean().item())
    loss.backward()
    assert fake.grad.abs().max() > 0 and real.grad is None
    for picture, ct in zip(seen, (real, fake), strict=True):  # as it is, in three channels
        assert picture.shape == (2, 3, 4, 4) and all(torch.equal(picture[:, [i]], ct) for i in range(3))


def test_class_weights_are_the_closed_form():
    image = label_maps()
    pixels = image.flatten().tolist()
    present = set(pixels)
    assert not present & {1, 9} and {0, 3, 16} <= present
    expected = [len(pixels) / (len(present) * pixels.count(c)) if c in present else 0.0 for c in range(17)]
    weights = losses.class_weights(image)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    # the same share for each class, and one for each pixel on average
    assert weights[image.long()].sum().item() == pytest.approx(len(pixels), rel=1e-6)


def test_a_single_class_weighs_one():
    weights = losses.class_weights(torch.full((2, 1, 4, 4), 5, dtype=torch.uint8))
    assert weights.tolist() == [0.0] * 5 + [1.0] + [0.0] * 11


def test_segmenting_the_real_slice():
    image, logits = label_maps(), random(2, 18, 6, 6)
    weights = losses.class_weights(image)
    total = 0.0
    for b, i, j in np.ndindex(2, 6, 6):
        x, c = logits[b, :, i, j].double().numpy(), int(image[b, 0, i, j])
        total -= weights[c].item() * (x[c + 1] - math.log(np.exp(x).sum()))
    assert losses.segment_real(logits, image).item() == pytest.approx(total / (2 * 6 * 6), rel=1e-5)


def test_segmenting_the_fake_slice():
    logits = random(2, 18, 6, 6)
    x = logits.double().numpy()
    expected = np.mean(np.log(np.exp(x).sum(1)) - x[:, 0])  # no class weights: every pixel counts the same
    assert losses.segment_fake(logits).item() == pytest.approx(expected, rel=1e-5)


def test_perfect_segmentation_costs_nothing():
    image = label_maps()
    logits = 50.0 * torch.stack([image[:, 0] == c - 1 for c in range(18)], dim=1)
    assert losses.segment_real(logits, image).item() == pytest.approx(0, abs=1e-6)
    assert losses.segment_fake(logits).item() == pytest.approx(50, rel=1e-6)
    logits = 50.0 * (torch.arange(18) == 0).float().view(1, 18, 1, 1).expand(2, -1, 6, 6)
    assert losses.segment_fake(logits).item() == pytest.approx(0, abs=1e-6)
    assert losses.segment_real(logits, image).item() == pytest.approx(50, rel=1e-6)


def test_label_mix_is_constant_in_each_class_of_a_sample():
    torch.manual_seed(0)
    image = label_maps()
    for _ in range(20):
        mask = losses.label_mix(image)
        assert mask.shape == image.shape and mask.dtype == torch.bool
        for sample, ids in zip(mask, image, strict=True):
            assert all(sample[ids == c].unique().numel() == 1 for c in ids.unique())


def test_label_mix_draws_every_class_of_every_sample_independently():
    """20,000 masks of two samples with all 17 classes: 34 fair coins, none of which knows of another."""
    torch.manual_seed(0)
    count = 20_000
    image = torch.arange(17, dtype=torch.uint8).view(1, 1, 1, 17).repeat(2 * count, 1, 1, 1)
    coins = losses.label_mix(image).view(count, 34).double().numpy()
    # standard error of a mean is 1 / (2 √n), of a correlation 1 / √n; 34 and 561 of them stay within 4 and 4.5
    assert abs(coins.mean(0) - 0.5).max() < 4 / (2 * math.sqrt(count))
    correlations = np.corrcoef(coins.T)[np.triu_indices(34, k=1)]
    assert abs(correlations).max() < 4.5 / math.sqrt(count)
    assert correlations.std() == pytest.approx(1 / math.sqrt(count), rel=0.15)


def test_label_mix_consistency():
    mixed, fake, real = (random(2, 18, 6, 6, seed=seed).requires_grad_() for seed in range(3))
    from_real = random(2, 1, 6, 6, seed=3) > 0
    loss = losses.label_mix_consistency(mixed, fake, real, from_real)
    weight = from_real.float()
    difference = (mixed - weight * real - (1 - weight) * fake).detach()
    assert loss.item() == pytest.approx(difference.square().mean().item(), rel=1e-6)
    loss.backward()
    slope = 2 * difference / difference.numel()
    torch.testing.assert_close(mixed.grad, slope)
    torch.testing.assert_close(real.grad, -slope * weight)
    torch.testing.assert_close(fake.grad, -slope * (1 - weight))


def test_cross_entropy():
    logits = tensor(-2.0, 0.0, 3.0)
    probabilities = [1 / (1 + math.exp(-x)) for x in (-2.0, 0.0, 3.0)]
    real, fake = losses.binary_cross_entropy(logits, is_real=True), losses.binary_cross_entropy(logits, is_real=False)
    assert real.item() == pytest.approx(-np.mean(np.log(probabilities)))
    assert fake.item() == pytest.approx(-np.mean(np.log(1 - np.array(probabilities))))


TERMS = {
    "hinge": lambda logits, image: losses.hinge([logits, logits], is_real=False),
    "hinge_generator": lambda logits, image: losses.hinge_generator([logits, logits]),
    "feature_matching": lambda logits, image: losses.feature_matching([[logits, logits]], [[-logits, logits]]),
    "perceptual": lambda logits, image: losses.perceptual(lambda x: [x] * 5, logits[:, :1], -logits[:, :1]),
    "segment_real": losses.segment_real,
    "segment_fake": lambda logits, image: losses.segment_fake(logits),
    "consistency": lambda logits, image: losses.label_mix_consistency(logits, -logits, 2 * logits, image > 3),
    "cross_entropy": lambda logits, image: losses.binary_cross_entropy(logits, is_real=True),
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", TERMS)
def test_half_precision_logits_are_reduced_in_float32(name, autocast):
    """A mean of 20,000 values in bfloat16 would be good to two digits."""
    image = torch.randint(0, 17, (2, 1, 24, 24), generator=torch.Generator().manual_seed(1))
    logits = (3 + random(2, 18, 24, 24)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = TERMS[name](logits, image)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(TERMS[name](logits.float(), image).item(), rel=1e-5)
