"""Results of long computations in files named by what they came from: a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor, nn

from ..bundle import load_checkpoint, save_checkpoint
from ..files import sha256
from ..inferers import DiffusionSampler, GeneratorPass, VolumeInferer
from .segmenter import Segmenter

FORMAT = 2
"""Version of what is kept; raise it whenever the same label map, weights and settings would give another volume."""


class KeptVolumes(VolumeInferer):
    """A `VolumeInferer` that samples a volume once: made again of the same label map, network and settings, it is read.

    Args:
        generate: and the further options, as for `VolumeInferer`.
        folder: where volumes are kept, float32; it can be deleted at any time. Several processes may share it.
        checkpoint: the weights' file.
    """

    def __init__(
        self,
        generate: DiffusionSampler | GeneratorPass,
        *,
        folder: str | os.PathLike,
        checkpoint: str | os.PathLike,
        **options: Any,
    ) -> None:
        super().__init__(generate, **options)
        self.folder = Path(folder)
        self.weights = sha256(checkpoint)

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Label volume (1, 1, H, W, D) of ids to CT (1, 1, H, W, D) float32 in [0, 1]."""
        origin = {"format": FORMAT, "weights": self.weights, "network": _options(network), **self.settings}
        sample = partial(super().__call__, inputs, network)
        pred = _kept(self.folder, [inputs.cpu().numpy()], origin, sample)
        return convert_to_dst_type(pred, inputs, dtype=pred.dtype)[0]


class KeptSegmentations:
    """A segmenter that segments a CT once.

    Args:
        segmenter: finds the organs; its `settings` tell it from others.
        folder: where the segmentations are kept; it can be deleted at any time.
    """

    def __init__(self, segmenter: Segmenter, folder: str | os.PathLike) -> None:
        self.segmenter = segmenter
        self.folder = Path(folder)

    def __call__(self, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Segment a CT in HU (X, Y, Z)."""
        return _kept(self.folder, [hu, affine], self.segmenter.settings, lambda: self.segmenter(hu, affine)).numpy()


def _options(network: nn.Module) -> list[str]:
    """What networks of the same weights may differ in: the plain values in their modules, such as a number of heads."""
    plain = bool | int | float | str | tuple | range
    return [f"{name}: {type(module).__name__}" for name, module in network.named_modules()] + [
        f"{name}.{key} = {value}"
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain)
    ]


def _kept(folder: Path, arrays: list[np.ndarray], origin: dict, compute: Callable[[], np.ndarray | Tensor]) -> Tensor:
    """What `compute` gives, from the file that these arrays and plain values name, or into it."""
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    path = folder / f"{digest.hexdigest()[:32]}.pt"
    if path.is_file():
        return load_checkpoint(path)["result"]
    result = convert_to_tensor(compute(), track_meta=False).cpu()
    save_checkpoint(path, {"result": result})
    return result
