"""How much synthetic slices look like real ones: FID, KID and MS-SSIM as metrics of an evaluator."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.metrics import Metric
from monai.metrics import MultiScaleSSIMMetric
from torch import Tensor, nn

from ..bundle import load_checkpoint, save_checkpoint
from .fid import FeatureStatistics, frechet_distance, kernel_distance
from .planes import PLANES

logger = logging.getLogger(__name__)

Pair = tuple[Tensor, Tensor]


class FeatureDistances(Metric):
    """FID and KID between all synthetic and all real slices that an evaluator, or several under torchrun, go through.

    Leaves "FID", "KID", "n" and "n_real" (slices) in `engine.state.metrics`. With several planes it leaves these of
    each ("FID_xy", ...), and the means over the planes as "FID" and "KID". With fewer slices than features the
    covariances lack rank, so that FID depends on how many there are: it warns, and KID is the figure to look at. Of a
    single slice both are NaN.

    Args:
        extractor: turns pictures (B, 1, H, W) in [0, 1] into features (B, F): `networks.inception.Inception`, or a
            network that knows CT.
        output_transform: gives the slices of an iteration: a pair (synthetic, real), (N, 1, H, W) each in [0, 1]; with
            several planes a list of pairs (see `planes.plane_pairs`).
        planes: of `planes.PLANES`, in the order of the pairs.
        reference: file of what is known of the real slices: written at the end of a run when it isn't there; when it
            is, read instead of computing their features again.
        subsets: of KID, see `fid.kernel_distance`; 0 does without KID, and then memory doesn't grow with the slices.
        subset_size: of KID.
        seed: of KID's subsets.
        batch_size: pictures at a time.
        device: where the extractor works.

    Raises:
        ValueError: an unknown plane, or a reference of other features (at once); features that aren't (B, F); a
            reference of other slices (in the end).
    """

    def __init__(
        self,
        extractor: nn.Module,
        output_transform: Callable[[Any], Pair | list[Pair]] = lambda output: output,
        planes: Sequence[str] = ("xy",),
        reference: str | os.PathLike | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        unknown = set(planes) - PLANES.keys()
        if unknown:
            raise ValueError(f"no plane {', '.join(sorted(unknown))}: choose from {', '.join(PLANES)}")
        self.extractor = extractor.to(device).eval().requires_grad_(False)
        self.planes = tuple(planes)
        self.reference = None if reference is None else Path(reference)
        self.kid = {"subsets": subsets, "size": subset_size, "seed": seed}
        self.batch_size = batch_size
        self._facts = {"features": _name(extractor), "planes": list(planes), "kid": subsets > 0}
        self._known = self._read() if self.reference is not None and self.reference.exists() else None
        super().__init__(output_transform, device=device, skip_unrolling=True, metrics_result_mode="flatten")

    @property
    def settings(self) -> dict:
        """What a report says about how the distances were computed."""
        reference = None if self.reference is None else str(self.reference)
        return {**self._facts, "kid": self.kid, "reference": reference}

    def reset(self) -> None:
        """Forget all slices."""
        self._synthetic, self._real = (
            {plane: FeatureStatistics(keep=self._facts["kid"]) for plane in self.planes} for _ in range(2)
        )
        self._fingerprint = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, output: Pair | list[Pair]) -> None:
        """Take up the slices of an iteration; there may be none."""
        pairs = [output] if isinstance(output[0], Tensor) else output
        for plane, (synthetic, real) in zip(self.planes, pairs, strict=True):
            self._take(self._synthetic[plane], synthetic)
            if self._known is None:
                self._take(self._real[plane], real)
            self._fingerprint += _fingerprint(real)

    def compute(self) -> dict[str, float]:
        """The distances over all processes, which must all ask."""
        synthetic = {plane: statistics.over_processes() for plane, statistics in self._synthetic.items()}
        fingerprint = int(idist.all_reduce(self._fingerprint.clone()))
        if self._known is None:
            real = {plane: statistics.over_processes() for plane, statistics in self._real.items()}
            if self.reference is not None and idist.get_rank() == 0:
                self._write(real, fingerprint)
        else:
            real, of = self._known
            if of != fingerprint:
                raise ValueError(f"{self.reference} is of other real slices than this run's: delete it or name another")

        results = {plane: self._distances(synthetic[plane], real[plane]) for plane in self.planes}
        if len(self.planes) == 1:
            return results[self.planes[0]]
        distances = [name for name in results[self.planes[0]] if not name.startswith("n")]
        means = {name: sum(of[name] for of in results.values()) / len(self.planes) for name in distances}
        return means | {f"{name}_{plane}": value for plane, of in results.items() for name, value in of.items()}

    def _take(self, statistics: FeatureStatistics, slices: Tensor) -> None:
        for batch in slices.split(self.batch_size):
            if len(batch) > 0:
                statistics.update(self.extractor(batch.to(self._device)))

    def _distances(self, synthetic: FeatureStatistics, real: FeatureStatistics) -> dict[str, float]:
        n = min(synthetic.n, real.n)
        if n < len(synthetic.mean):
            logger.warning(
                "FID of %d slices with %d features each: compare it only with FIDs of as many slices, and look at KID",
                n,
                len(synthetic.mean),
            )
        results = {"FID": math.nan}
        if n > 1:
            results["FID"] = frechet_distance(synthetic.mean, synthetic.covariance, real.mean, real.covariance)
        if self._facts["kid"]:
            if n < self.kid["size"]:
                logger.info("KID of subsets of %d slices instead of %d: there are no more", n, self.kid["size"])
            results["KID"] = kernel_distance(synthetic.features, real.features, **self.kid)
        return results | {"n": synthetic.n, "n_real": real.n}

    def _read(self) -> tuple[dict[str, FeatureStatistics], int]:
        content = load_checkpoint(self.reference)
        if content.get("facts") != self._facts:
            found = content.get("facts")
            raise ValueError(f"{self.reference} holds {found}, not {self._facts}: delete it or name another reference")
        real = {plane: FeatureStatistics(self._facts["kid"]) for plane in self.planes}
        for plane, statistics in real.items():
            statistics.load_state_dict(content["real"][plane])
        return real, content["fingerprint"]

    def _write(self, real: dict[str, FeatureStatistics], fingerprint: int) -> None:
        states = {plane: statistics.state_dict() for plane, statistics in real.items()}
        save_checkpoint(self.reference, {"facts": self._facts, "fingerprint": fingerprint, "real": states})


def _name(extractor: nn.Module) -> str:
    """What tells one feature extractor from another: its class, and a hash of its weights."""
    digest = hashlib.sha256()
    for name, value in extractor.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{type(extractor).__name__} {digest.hexdigest()[:16]}"


def _fingerprint(slices: Tensor) -> Tensor:
    """A sum of hashes of the slices in 256 grey values: the same in whatever order and portions they come."""
    grey = slices.cpu().clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    hashes = [hashlib.blake2b(slice_.tobytes(), digest_size=8).digest() for slice_ in grey]
    return torch.tensor([int.from_bytes(value, "little", signed=True) for value in hashes], dtype=torch.int64).sum()


class MultiScaleSSIM(MultiScaleSSIMMetric):
    """MONAI's MS-SSIM of slices in [0, 1], with the weights of Wang et al. (2003) for each scale.

    Args:
        image_size: side of the slices in pixels.
        scales: 5 in the paper, from 176 pixels on. With fewer, the first weights are taken and scaled to a sum of 1.

    Raises:
        ValueError: slices too small for the window of 11 at the coarsest scale; says how many scales fit.
    """

    WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    WINDOW = 11

    def __init__(self, image_size: int, scales: int = len(WEIGHTS)) -> None:
        # MONAI asks for more than 10 · (scales − 1)² pixels, where the coarsest scale halves `scales − 1` times.
        smallest = [self.WINDOW * max(2**halvings, halvings**2) for halvings in range(len(self.WEIGHTS))]
        fitting = sum(side <= image_size for side in smallest)
        if not 1 <= scales <= fitting:
            remedy = f"choose 1 to {fitting} scales" if fitting else "leave it out"
            raise ValueError(f"MS-SSIM with {scales} scales doesn't fit slices of {image_size} pixels a side: {remedy}")
        weights = self.WEIGHTS[:scales]
        super().__init__(
            spatial_dims=2,
            data_range=1.0,
            kernel_size=self.WINDOW,
            weights=[weight / sum(weights) for weight in weights],
        )
