"""FID and KID against closed forms, SciPy, fifty digits and double sums."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch

from common.evaluation.fid import FeatureStatistics, frechet_distance, kernel_distance


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(n: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """Vectors whose sample mean and sample covariance are exactly these."""
    centred = normal(n, len(mean), seed=seed)
    centred -= centred.mean(dim=0)
    white = torch.linalg.qr(centred).Q * math.sqrt(n - 1)
    return white @ torch.linalg.cholesky(covariance).T + mean


def rotation(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def statistics(features: torch.Tensor, portions: int | list[int] = 10) -> FeatureStatistics:
    taken = FeatureStatistics()
    for part in features.split(portions):
        taken.update(part)
    return taken


def fid(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = statistics(a), statistics(b)
    return frechet_distance(x.mean, x.covariance, y.mean, y.covariance)


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("portions", [1, 7, [40, 1, 9], 50])
def test_batches_make_the_mean_and_covariance_of_all_at_once(portions):
    """Float32 features far from zero, where a sum of squares would have lost the covariance."""
    features = (1e4 + normal(50, 6, seed=0) @ normal(6, 6, seed=1)).float()
    taken = statistics(features, portions)
    assert taken.n == 50
    assert taken.mean.dtype == taken.covariance.dtype == torch.float64
    torch.testing.assert_close(taken.mean, features.double().mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(taken.covariance, torch.cov(features.double().T), rtol=1e-10, atol=1e-10)
    assert torch.equal(taken.features, features)


def test_vectors_are_kept_only_if_they_should():
    taken = FeatureStatistics(keep=False)
    taken.update(normal(5, 3, seed=0))
    assert taken.n == 5 and taken.features.numel() == 0


def test_state_comes_back():
    before, after = statistics(normal(20, 3, seed=0)), FeatureStatistics()
    after.load_state_dict(before.state_dict())
    for taken in (before, after):
        taken.update(normal(4, 3, seed=1))
    assert after.n == before.n == 24
    for name in ("mean", "covariance", "features"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def test_maps_instead_of_vectors_are_refused():
    with pytest.raises(ValueError, match=r"gives \(2, 3, 4, 4\), not \(pictures, features\): pool and flatten"):
        FeatureStatistics().update(torch.zeros(2, 3, 4, 4))


# -------------------------------------------------------------------------------------------------------------- FID


def test_fid_of_gaussians_with_common_axes_is_its_closed_form():
    """Then the roots commute: |Δμ|² + Σ (√a − √b)²."""
    axes, shift = rotation(8, seed=0), normal(8, seed=1)
    a, b = (torch.linspace(0.1, 3, 8, dtype=torch.float64), torch.linspace(4, 0.01, 8, dtype=torch.float64))
    x = samples(60, torch.zeros(8, dtype=torch.float64), axes @ a.diag() @ axes.T, seed=2)
    y = samples(75, shift, axes @ b.diag() @ axes.T, seed=3)
    expected = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert fid(x, y) == pytest.approx(expected.item(), rel=1e-10)


def test_fid_of_gaussians_with_other_axes_is_its_closed_form():
    """In two dimensions Tr (AB)^½ = √(Tr AB + 2 √det AB)."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([[2.0, 0.9], [0.9, 0.5]], [[0.3, -0.4], [-0.4, 1.7]]))
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    root_trace = math.sqrt((a @ b).trace() + 2 * math.sqrt(torch.linalg.det(a @ b)))
    expected = 5 + a.trace().item() + b.trace().item() - 2 * root_trace
    assert fid(samples(30, shift, a, seed=0), samples(40, 0 * shift, b, seed=1)) == pytest.approx(expected, rel=1e-10)


def test_fid_is_what_scipy_makes_of_the_formula():
    x = (normal(90, 20, seed=0) @ normal(20, 20, seed=1)).float()
    y = (normal(70, 20, seed=2) @ normal(20, 20, seed=3) + 0.5).float()
    a, b = (np.cov(v.double().numpy(), rowvar=False) for v in (x, y))
    means = (x.double().mean(dim=0) - y.double().mean(dim=0)).square().sum().item()
    expected = means + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert fid(x, y) == pytest.approx(expected, rel=1e-8) and expected > 10


def precise_fid(x: np.ndarray, y: np.ndarray) -> float:
    """In fifty digits and without any covariance: Tr (Σa Σb)^½ is the sum of the singular values of X Yᵀ / √(…).

    X and Y are the centred vectors, so that Σa = XᵀX / (n − 1): the eigenvalues of Σa Σb are the squares of these.
    """
    with mpmath.workdps(50):
        centred, means, traces = [], [], 0
        for v in (x, y):
            rows = mpmath.matrix(v.tolist())
            mean = [mpmath.fsum(rows[:, j]) / rows.rows for j in range(rows.cols)]
            for i, j in itertools.product(range(rows.rows), range(rows.cols)):
                rows[i, j] = (rows[i, j] - mean[j]) / mpmath.sqrt(len(v) - 1)
            centred.append(rows)
            means.append(mean)
            traces += mpmath.fsum(value**2 for value in rows)
        singular = mpmath.svd_r(centred[0] * centred[1].T, compute_uv=False)
        shift = mpmath.fsum((a - b) ** 2 for a, b in zip(*means, strict=True))
        return float(shift + traces - 2 * mpmath.fsum(singular))


@pytest.mark.parametrize(("n", "m"), [(6, 9), (9, 6), (5, 5), (8, 40), (40, 8)])
def test_fid_of_fewer_vectors_than_features_is_exact(n, m):
    x, y = (normal(k, 16, seed=k + s) @ normal(16, 16, seed=2) for s, k in ((10, n), (20, m)))
    assert fid(x, y) == pytest.approx(precise_fid(x.numpy(), y.numpy()), rel=1e-6)


def test_fid_of_features_that_never_change_is_exact():
    """Features can be dead, or copies of others."""
    x, y = normal(30, 6, seed=0), 2 * normal(30, 6, seed=1)
    widened = [torch.cat([v, v[:, :2], torch.zeros(30, 3, dtype=torch.float64)], dim=1) for v in (x, y)]
    assert fid(*widened) == pytest.approx(precise_fid(*(v.numpy() for v in widened)), rel=1e-6)


def test_fid_of_equal_sets_is_zero_and_of_constant_sets_the_distance_of_the_means():
    x = normal(20, 30, seed=0)
    assert 0 <= fid(x, x) < 1e-6
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    assert fid(zeros, zeros + 2) == pytest.approx(12, rel=1e-12)


def test_fid_without_a_covariance_is_nan():
    x = normal(20, 3, seed=0)
    assert math.isnan(fid(x, x[:1]))
    assert math.isnan(fid(x, torch.full((5, 3), math.nan)))


# -------------------------------------------------------------------------------------------------------------- KID


def double_sum(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate term by term (Bińkowski et al. 2018)."""

    def k(u: torch.Tensor, v: torch.Tensor) -> float:
        return (sum(a * b for a, b in zip(u.tolist(), v.tolist(), strict=True)) / len(u) + 1) ** 3

    within = [
        sum(k(v[i], v[j]) for i, j in itertools.permutations(range(len(v)), 2)) / (len(v) * (len(v) - 1))
        for v in (x, y)
    ]
    return sum(within) - 2 * sum(k(u, v) for u, v in itertools.product(x, y)) / (len(x) * len(y))


def test_kid_is_its_double_sum():
    x, y = normal(12, 5, seed=0), normal(12, 5, seed=1) + 0.5
    expected = double_sum(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-10) and abs(expected) > 0.1


def test_kid_is_the_mean_over_subsets():
    """Of two vectors of three there are three subsets, each as likely: nine pairs of subsets, known one by one."""
    x, y = normal(3, 2, seed=0), normal(3, 2, seed=1)
    pairs = list(itertools.combinations(range(3), 2))
    expected = [double_sum(x[list(i)], y[list(j)]) for i, j in itertools.product(pairs, pairs)]
    spread = float(np.std(expected)) / math.sqrt(4000)
    assert kernel_distance(x, y, subsets=4000, size=2) == pytest.approx(float(np.mean(expected)), abs=4 * spread)
    singles = {round(kernel_distance(x, y, subsets=1, size=2, seed=seed), 9) for seed in range(60)}
    assert singles == {round(value, 9) for value in expected}


def test_kid_of_one_distribution_is_zero_on_average_whatever_the_size():
    for n, m in ((4, 4), (6, 3)):
        values = np.array(
            [kernel_distance(normal(n, 3, seed=2 * s), normal(m, 3, seed=2 * s + 1), subsets=1) for s in range(3000)]
        )
        error = values.std() / math.sqrt(len(values))
        # A mean with each vector's similarity to itself in it would be about 5 too large.
        assert abs(values.mean()) < 3 * error and error < 0.1


def test_kid_depends_on_the_seed_and_not_on_the_order():
    x, y = normal(30, 4, seed=0), normal(25, 4, seed=1)
    shuffled = [v[torch.randperm(len(v), generator=torch.Generator().manual_seed(2))] for v in (x, y)]
    options = {"subsets": 3, "size": 10}
    assert kernel_distance(x, y, **options) == kernel_distance(*shuffled, **options)
    assert kernel_distance(x, y, **options) != kernel_distance(x, y, **options, seed=1)


def test_kid_needs_two_vectors_each():
    x = normal(5, 3, seed=0)
    assert math.isnan(kernel_distance(x, x[:1])) and math.isnan(kernel_distance(x[:0], x))
    assert math.isfinite(kernel_distance(x, x[:2]))
