"""How near synthetic slices come to the real ones of the same mask, and the tables of it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from monai.metrics import PSNRMetric

from .files import replacing
from .labels import BACKGROUND

MAX_PSNR = 100.0


class CappedPSNR(PSNRMetric):
    """MONAI's `PSNRMetric` held to at most 100 dB, where identical images would give infinity and spoil the mean."""

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super()._compute_metric(y_pred, y).clamp(max=MAX_PSNR)


def axial_slices(output: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Synthetic and real axial slices with a body, (N, 1, H, W) each: `output_transform` of a metric handler.

    Args:
        output: decollated, with `pred_slices`, `ct_slices` and `mask_slices` on the network grid, (1, H, W, D).
    """
    pairs = [torch.stack((_stack(item, "pred_slices"), _stack(item, "ct_slices"))) for item in output]
    occupied = [_occupied(item) for item in output]
    pred, ct = torch.cat([pair[:, keep] for pair, keep in zip(pairs, occupied, strict=True)], dim=1)
    return pred, ct


def _stack(item: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    return torch.as_tensor(item[key]).movedim(-1, 0).float().cpu()


def _occupied(item: dict[str, torch.Tensor]) -> torch.Tensor:
    return (_stack(item, "mask_slices") != BACKGROUND).flatten(1).any(dim=1)


class MetricTable:
    """Write a run's metrics as `metrics.csv`, a row a case, and `metrics.md`, with the mean over all slices.

    Takes from the engine every metric that leaves one value a slice in `engine.state.metric_details`.

    Args:
        output_dir: folder to write into.
    """

    def __init__(self, output_dir: str | os.PathLike) -> None:
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self._cases: list[str] = []
        self._counts: list[int] = []

    def _count(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self._cases.append(item["case"])
            self._counts.append(int(_occupied(output).sum()))

    def _write(self, engine: Engine) -> None:
        details = {name: values.flatten() for name, values in engine.state.metric_details.items()}
        per_case = {name: values.split(self._counts) for name, values in details.items()}
        header = ["case", "slices", *details]
        rows = [
            [case, count, *(f"{per_case[name][i].mean():.4f}" for name in details)]
            for i, (case, count) in enumerate(zip(self._cases, self._counts, strict=True))
        ]
        with replacing(self.output_dir / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        rows.append(["**all slices**", sum(self._counts), *(f"{values.mean():.4f}" for values in details.values())])
        lines = [header, ["---"] * len(header), *rows]
        with replacing(self.output_dir / "metrics.md") as temporary:
            temporary.write_text("".join(f"| {' | '.join(map(str, line))} |\n" for line in lines), encoding="utf-8")
