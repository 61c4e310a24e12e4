"""Learned correspondence: whether a segmenter finds in a synthetic CT the organs of its label map (§4 of the paper)."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events

from ..distributed import gather
from ..files import replacing
from ..labels import CLASSES
from .segmenter import Segmenter

COMPARED = tuple(range(1, 15))
"""The ids compared by default: 15, prostate/uterus, has no counterpart in TotalSegmentator, which knows no uterus."""


def organ_dice(label_map: np.ndarray, segmentation: np.ndarray, organs: Sequence[int] = COMPARED) -> dict[str, float]:
    """Volume Dice of each organ by name, 2 |A and B| / (|A| + |B|).

    An organ that the label map lacks has NaN, whatever the segmenter found; one that it has and the segmenter didn't
    find has 0.

    Args:
        label_map, segmentation: volumes of AMOS22's ids, of one shape.
        organs: the ids to compare: those that the segmenter knows.

    Raises:
        ValueError: different shapes.
    """
    if label_map.shape != segmentation.shape:
        raise ValueError(
            f"the segmentation has shape {segmentation.shape}, its label map {label_map.shape}: a segmenter must "
            "answer on the CT's grid"
        )
    labelled, found, common = (
        np.bincount(ids.ravel(), minlength=len(CLASSES)).tolist()
        for ids in (label_map, segmentation, label_map[label_map == segmentation])
    )
    return {CLASSES[i].name: 2 * common[i] / (labelled[i] + found[i]) if labelled[i] else math.nan for i in organs}


def mean_dice(cases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean Dice of each organ over the volumes that have it, by name; an organ that none has is left out."""
    dice = {name: [case[name] for case in cases if not math.isnan(case[name])] for name in (cases[0] if cases else ())}
    return {name: sum(values) / len(values) for name, values in dice.items() if values}


class OrganDice:
    """Segment each synthetic CT as it is done and compare the organs with its label map's.

    Reads from the engine's decollated batch `label_map`, the label map on its own grid, and from its output `pred`, the
    CT in HU on that grid. Writes `organ_dice.csv` with a row a case, empty where the label map lacks the organ, and
    leaves `dice_spleen`, `dice_right_kidney` and so on, and their mean, `dice_mean`, in the engine's metrics. Under
    torchrun the first process writes, in the end the cases of all.

    Args:
        segmenter: finds the organs; see `segmenter.Segmenter`.
        output_dir: folder to write into.
        organs: the ids to compare: those that the segmenter knows.
    """

    def __init__(self, segmenter: Segmenter, output_dir: str | os.PathLike, organs: Sequence[int] = COMPARED) -> None:
        self.segmenter = segmenter
        self.output_dir = Path(output_dir)
        self.organs = organs

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._compare)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.cases: dict[str, dict[str, float]] = {}

    def _compare(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            label_map, hu = (np.asarray(v[0].cpu()) for v in (item["label_map"], output["pred"]))
            segmentation = self.segmenter(hu, np.asarray(item["label_map"].affine.cpu()))
            self.cases[item["case"]] = organ_dice(label_map, segmentation, self.organs)
            self._write(self.cases)

    def _write(self, cases: Mapping[str, Mapping[str, float]]) -> None:
        if idist.get_rank() > 0:
            return
        names = [CLASSES[i].name for i in self.organs]
        rows = [
            [case, *("" if math.isnan(dice[n]) else f"{dice[n]:.4f}" for n in names)]
            for case, dice in sorted(cases.items())
        ]
        with replacing(self.output_dir / "organ_dice.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([["case", *names], *rows])

    def _finish(self, engine: Engine) -> None:
        cases = dict(gather(list(self.cases.items())))
        self._write(cases)
        means = mean_dice(list(cases.values()))
        engine.state.metrics |= {f"dice_{name.replace(' ', '_')}": value for name, value in means.items()}
        if means:
            engine.state.metrics["dice_mean"] = sum(means.values()) / len(means)
