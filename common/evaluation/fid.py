"""How far two sets of pictures are apart, by the features that a network gives them: FID and KID."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ignite.distributed as idist
import torch
from monai.utils import evenly_divisible_all_gather
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of feature vectors that come batch by batch: exact, in float64.

    Args:
        keep: keep the vectors as well, in float32, as KID needs them.

    Attributes:
        n: vectors so far.
        mean: (F,).
        scatter: (F, F), the sum of (x − mean)(x − mean)ᵀ.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._begin(width=0)

    @property
    def covariance(self) -> Tensor:
        """(F, F), unbiased; NaN of a single vector."""
        return self.scatter / (self.n - 1)

    @property
    def features(self) -> Tensor:
        """The vectors that were kept, (n, F) float32."""
        return torch.cat(self._kept)

    def update(self, features: Tensor) -> None:
        """Take up vectors (B, F) from any device, by the formula for two sets of Chan, Golub & LeVeque (1983).

        Raises:
            ValueError: not (B, F).
        """
        if features.ndim != 2:
            raise ValueError(f"the extractor gives {tuple(features.shape)}, not (pictures, features): pool and flatten")
        features = features.detach().cpu()
        if self.n == 0:
            self._begin(features.shape[1])
        batch = features.double()
        mean = batch.mean(dim=0)
        deviations, shift = batch - mean, mean - self.mean
        total = self.n + len(batch)
        self.scatter.addmm_(deviations.T, deviations).addr_(shift, shift, alpha=self.n * len(batch) / total)
        self.mean += shift * (len(batch) / total)
        self.n = total
        if self.keep:
            self._kept.append(features.float())

    def over_processes(self) -> FeatureStatistics:
        """The statistics of the vectors of all processes, which must all ask, those without any vector too."""
        width = int(idist.all_reduce(len(self.mean), op="MAX"))
        if self.n == 0:
            self._begin(width)
        total = FeatureStatistics(self.keep)
        total.n = int(idist.all_reduce(self.n))
        total.mean = idist.all_reduce(self.mean * self.n) / total.n
        shift = self.mean - total.mean
        total.scatter = idist.all_reduce(torch.addr(self.scatter, shift, shift, alpha=self.n))
        total._kept = [evenly_divisible_all_gather(self.features)]
        return total

    def state_dict(self) -> dict[str, int | Tensor]:
        """Plain values and tensors, for `load_state_dict`."""
        return {"n": self.n, "mean": self.mean, "scatter": self.scatter, "features": self.features}

    def load_state_dict(self, state: Mapping[str, int | Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.n, self.mean, self.scatter = state["n"], state["mean"], state["scatter"]
        self._kept = [state["features"]]

    def _begin(self, width: int) -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        self._kept = [torch.zeros(0, width)]


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """FID: the squared Fréchet distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    |μa − μb|² + Tr(Σa + Σb − 2 (Σa Σb)^½), where the trace of the root is the sum of the square roots of the
    eigenvalues of Σa Σb. These are the eigenvalues of Σa^½ Σb Σa^½ too, which is symmetric and positive. Covariances of
    fewer vectors than features lack rank: Σa^½ is taken on the space that Σa spans, and nothing needs to be added to
    the diagonal.

    Args:
        mean_a, mean_b: (F,) float64.
        covariance_a, covariance_b: (F, F) float64.

    Returns:
        The distance; NaN when something isn't finite, as the covariance of a single vector.
    """
    if not (covariance_a.isfinite().all() and covariance_b.isfinite().all()):
        return math.nan
    root = _root(covariance_a)
    eigenvalues = torch.linalg.eigvalsh(root.T @ covariance_b @ root)
    traces = covariance_a.trace() + covariance_b.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + traces
    return distance.clamp(min=0).item()  # rounding gives equal sets something like -1e-13


def _root(covariance: Tensor) -> Tensor:
    """(F, rank) with root rootᵀ = covariance, rank as numerically seen (as `torch.linalg.matrix_rank` does)."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    present = eigenvalues > eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return vectors[:, present] * eigenvalues[present].sqrt()


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """KID: the squared maximum mean discrepancy of two sets of features (Bińkowski et al. 2018, arXiv 1801.01401).

    The kernel is (x·y / F + 1)³ and the estimate unbiased: of sets from one distribution it is 0 on average, whatever
    their size, and so it may be negative. It is the mean over random subsets, which depend on the seed and on what the
    features are, not on the order in which they came.

    Args:
        a: (N, F).
        b: (M, F).
        subsets: number of pairs of subsets.
        size: vectors in a subset, at most N and M. Where both sets are no larger there is only one pair to take.
        seed: of the subsets.

    Returns:
        The distance (often reported times 1,000); NaN of fewer than two vectors.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        return math.nan
    if size == len(a) == len(b):
        subsets = 1
    a, b = (v[v.double().sum(dim=1).argsort()].double() for v in (a, b))
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        x, y = (v[torch.randperm(len(v), generator=generator)[:size]] for v in (a, b))
        total += _within(_kernel(x, x)) + _within(_kernel(y, y)) - 2 * _kernel(x, y).mean().item()
    return total / subsets


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(kernel: Tensor) -> float:
    """Mean over the pairs of different vectors."""
    n = len(kernel)
    return ((kernel.sum() - kernel.trace()) / (n * (n - 1))).item()
