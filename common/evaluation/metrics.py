"""How near synthetic slices come to the real ones of the same mask, and the tables of it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from math import isnan
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.metrics import PSNRMetric

from ..distributed import gather
from ..files import replacing
from ..markup import number
from .planes import plane_pairs

MAX_PSNR = 100.0


class CappedPSNR(PSNRMetric):
    """MONAI's `PSNRMetric` held to at most 100 dB, where identical images would give infinity and spoil the mean."""

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super()._compute_metric(y_pred, y).clamp(max=MAX_PSNR)


def axial_slices(output: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Synthetic and real axial slices with a body, (N, 1, H, W) each: `output_transform` of a metric handler.

    Args:
        output: decollated, see `planes.plane_pairs`.
    """
    return plane_pairs(output, ("xy",))[0]


class MetricTable:
    """Write a run's metrics: `metrics.json`, all of them; `metrics.csv`, a row a case; `metrics.md`, with the means.

    Takes from the engine what it has in `state.metrics`, and every metric that leaves one value a slice in
    `state.metric_details`: these get a column. Under torchrun the first process writes for all.

    Args:
        output_dir: folder to write into.
        settings: how the metrics were computed, in plain values; those that are None were not.
    """

    def __init__(self, output_dir: str | os.PathLike, settings: Mapping[str, object] | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.settings = {name: value for name, value in (settings or {}).items() if value is not None}

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator; must come after the handlers that leave metrics."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self._counts: list[tuple[str, int]] = []

    def _count(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self._counts.append((item["case"], len(axial_slices([output])[0])))

    def _write(self, engine: Engine) -> None:
        counts = gather(self._counts)  # in the order in which MONAI gathers the slices' values
        if idist.get_rank() > 0:
            return
        of_slices = {name: values.flatten() for name, values in engine.state.metric_details.items()}
        of_cases = {name: values.split([count for _, count in counts]) for name, values in of_slices.items()}
        cases = [
            {"case": case, "slices": count, **{name: of_cases[name][i].mean().item() for name in of_cases}}
            for i, (case, count) in enumerate(counts)
        ]
        cases.sort(key=lambda case: case["case"])
        # JSON has no word for what isn't a number, such as the Dice of an organ that no case has.
        metrics = {name: None if isnan(value) else float(value) for name, value in engine.state.metrics.items()}
        content = {"metrics": metrics, "settings": self.settings, "cases": cases}
        with replacing(self.output_dir / "metrics.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")

        header = ["case", "slices", *of_slices]
        rows = [[case["case"], case["slices"], *(f"{case[name]:.4f}" for name in of_slices)] for case in cases]
        with replacing(self.output_dir / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        total = sum(case["slices"] for case in cases)
        rows.append(["**all slices**", total, *(f"{values.mean():.4f}" for values in of_slices.values())])
        others = [(name, value) for name, value in metrics.items() if name not in of_slices]
        lines = [header, ["---"] * len(header), *rows]
        text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
        text += "".join(f"\n{name.replace('_', ' ')}: {number(value)}\n" for name, value in others)
        text += "".join(f"\n{name}: {value}\n" for name, value in self.settings.items())
        with replacing(self.output_dir / "metrics.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
