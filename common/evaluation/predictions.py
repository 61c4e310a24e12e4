"""CT volumes that were made earlier, by this software or another, to be evaluated instead of sampling new ones."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor, nn


def with_predictions(
    cases: Sequence[dict[str, str]], folder: str | os.PathLike | None, output_dir: str | os.PathLike
) -> list[dict[str, str]]:
    """Add the synthetic CT of each case, `CASE_ct.nii.gz` or the series `CASE_ct/` in the folder, under the key `made`.

    Without a folder they stay as they are.

    Raises:
        FileNotFoundError: a case has none.
        ValueError: a case has both, or the folder is `output_dir`, where the report on the volumes would replace the
            one on their making.
    """
    if folder is None:
        return list(cases)
    if Path(folder).resolve() == Path(output_dir).resolve():
        raise ValueError(f"predictions_dir and output_dir are both {folder}: name another output_dir")
    made = []
    for case in cases:
        series, volume = (Path(folder) / f"{case['case']}{suffix}" for suffix in ("_ct", "_ct.nii.gz"))
        if series.is_dir() and volume.is_file():
            raise ValueError(f"{series} and {volume.name} are the same case: keep one of them")
        made.append({**case, "made": str(series if series.is_dir() else volume)})
    missing = [Path(case["made"]).name for case in made if not Path(case["made"]).exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{folder} lacks {shown}: make them with configs/inference.yaml, or evaluate without predictions_dir"
        )
    return made


def prepare_case(
    batchdata: dict[str, Tensor], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, None, tuple, dict[str, Tensor | None]]:
    """Label map to the device, and the volume made earlier for `MadeOrSampled`: `prepare_batch` of an evaluator."""
    image = batchdata["image"].to(device=device, non_blocking=non_blocking, **kwargs)
    return image, None, (), {"made": batchdata.get("made")}


class MadeOrSampled(Inferer):
    """Give the volume that was made earlier where there is one; call an inferer where there is none.

    Args:
        inferer: makes volumes from label maps; None where all are there.
    """

    def __init__(self, inferer: Inferer | None) -> None:
        super().__init__()
        self.inferer = inferer

    def __call__(
        self, inputs: Tensor, network: nn.Module | None, *args: Any, made: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Label volume (1, 1, H, W, D) to CT in [0, 1], alike."""
        return self.inferer(inputs, network) if made is None else made.to(inputs.device)


class TakeMaded(MapTransform):
    """Replace a CT that went over the network's grid by the original it came from, where there is one, int16.

    Args:
        keys: the CT.
        made_key: the original, in HU on the label map's grid.
    """

    def __init__(self, keys: KeysCollection, made_key: str, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.made_key = made_key

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        if self.made_key not in data:
            return dict(data)
        made = data[self.made_key].round().to(torch.int16)
        return dict(data) | dict.fromkeys(self.key_iterator(data), made)
