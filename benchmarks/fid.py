"""How long the FID takes once the features are there: ours beside MONAI's, which is SciPy's matrix square root.

Both take 3,000 real and 3,000 synthetic vectors of 2,048 features, and compute means, covariances and the distance;
ours takes them in batches of 100, as an evaluator has them. Nothing warms up.

    OMP_NUM_THREADS=1 python -m benchmarks.fid
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from monai.metrics import FIDMetric
from torch import Tensor

from common.evaluation.fid import FeatureStatistics, frechet_distance, kernel_distance

SLICES, FEATURES, BATCH = 3000, 2048, 100


def features(seed: int, shift: float) -> Tensor:
    """Vectors whose variances fall off over three orders of magnitude, in rotated axes."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0))).Q
    scales = torch.logspace(0, -1.5, FEATURES).roll(10 * seed)
    return torch.randn(SLICES, FEATURES, generator=generator) * scales @ axes + shift


def statistics(vectors: Tensor) -> FeatureStatistics:
    taken = FeatureStatistics()
    for batch in vectors.split(BATCH):
        taken.update(batch)
    return taken


def our_fid(synthetic: Tensor, real: Tensor) -> float:
    a, b = statistics(synthetic), statistics(real)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def main() -> None:
    synthetic, real = features(seed=1, shift=0.01), features(seed=2, shift=0.0)
    measures: dict[str, Callable[[Tensor, Tensor], float]] = {
        "FID, ours": our_fid,
        "FID, MONAI `FIDMetric`": lambda a, b: FIDMetric()(a, b).item(),
        "KID, ours, 100 subsets of 1,000": kernel_distance,
    }
    print(f"{SLICES} × {FEATURES} features, {torch.get_num_threads()} thread(s):\n")
    print("| | value | seconds |\n|---|---|---|")
    for name, measure in measures.items():
        begin = time.perf_counter()
        value = measure(synthetic, real)
        print(f"| {name} | {value:.6f} | {time.perf_counter() - begin:.1f} |", flush=True)


if __name__ == "__main__":
    main()
