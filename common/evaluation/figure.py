"""The paper's figure 4: label maps, what each method makes of them, and the real CT, slice beside slice.

    python -m common.evaluation.figure --masks labelsVa --real imagesVa --slices amos_0008:20,45 \\
        --output figure.png RUN NAME=RUN ...

A RUN is the output folder of an inference or evaluation (see `tables`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..body import with_body
from ..data import mask_list
from ..files import replacing
from ..geometry import Orientation
from ..labels import BACKGROUND, BODY, CLASSES
from ..loading import fill, load_volume
from ..report import colorize, fullest_slice
from ..transforms import HU_WINDOW, check_label_map, check_same_geometry
from .runs import Run, read_run

CELL = 2.0
"""Width of a picture in inches."""

MARGINS = 0.5, 1.0
"""Width of the rows' names, height of headings and legend, in inches."""

DPI = 200


class Strip(NamedTuple):
    """A row of the figure: one axial slice, as on a radiologist's screen.

    Attributes:
        case: whose.
        level: number of the slice, from 0 at the feet.
        label: (rows, columns), ids 0...16.
        cts: HU, like `label`: each method's, and last the real one.
        aspect: height of a pixel in widths.
    """

    case: str
    level: int
    label: np.ndarray
    cts: list[np.ndarray]
    aspect: float


def cut_strips(case: str, levels: Sequence[int], mask: Path, real: Path, synthetic: Sequence[Path]) -> list[Strip]:
    """Slices of one case; of a label map without the body class it is made from the real CT, as for the networks.

    Args:
        case: its name.
        levels: which slices; none: the one that shows the most organs.
        mask, real, synthetic: files of the label map, the real CT and the methods' CTs, on one grid.

    Raises:
        ValueError: a slice that isn't there, files on different grids, or no label map.
    """
    volume = load_volume(mask)
    ct = load_volume(real, volume)
    volume = fill(volume, ct)
    ids, affine = torch.from_numpy(check_label_map(volume, str(mask))), np.asarray(volume.affine)
    if not (ids == BODY).any():
        check_same_geometry(volume, ct)
        ids = with_body(ids, affine, ct.as_tensor())
    orientation = Orientation.of(affine)
    labels = orientation.apply(ids).numpy()
    levels = list(levels) or [fullest_slice(labels, axis=2)]
    absent = [level for level in levels if not 0 <= level < labels.shape[2]]
    if absent:
        raise ValueError(f"{case} has no slice {absent[0]}: choose from 0 (feet) to {labels.shape[2] - 1} (head)")
    cuts: list[list[np.ndarray]] = [[] for _ in levels]
    for made in chain((load_volume(path, volume) for path in synthetic), [ct]):  # one after the other, for memory
        check_same_geometry(volume, made)
        slices = orientation.apply(made.as_tensor())
        for cut, level in zip(cuts, levels, strict=True):
            cut.append(slices[:, :, level].numpy().copy())
    rows, columns, _ = np.linalg.norm(affine[:3, :3], axis=0)[list(orientation.order)]
    return [Strip(case, k, labels[:, :, k], cut, rows / columns) for k, cut in zip(levels, cuts, strict=True)]


def save_figure(path: str | os.PathLike, strips: Sequence[Strip], methods: Sequence[str]) -> None:
    """Write the grid of pictures: a row a strip; columns mask, methods, real; below it the colours of the organs.

    Args:
        path: file to write; its suffix chooses the format (.png, .pdf, ...).
        strips: the rows.
        methods: headings of the columns between mask and real.
    """
    headings = ["Mask", *methods, "Real"]
    heights = [CELL * strip.aspect * strip.label.shape[0] / strip.label.shape[1] for strip in strips]
    size = np.add(MARGINS, (CELL * len(headings), sum(heights)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(strips), len(headings), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, strip in zip(grid, strips, strict=True):
        axes[0].imshow(colorize(strip.label), aspect=strip.aspect, interpolation="nearest")
        axes[0].set_ylabel(f"{strip.case}\nslice {strip.level}")
        for ax, ct in zip(axes[1:], strip.cts, strict=True):
            ax.imshow(ct, cmap="gray", vmin=HU_WINDOW[0], vmax=HU_WINDOW[1], aspect=strip.aspect)
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, heading in zip(grid[0], headings, strict=True):
        ax.set_title(heading, fontsize="medium")
    present = set().union(*(np.unique(strip.label).tolist() for strip in strips)) - {BACKGROUND}
    patches = [Patch(color=np.divide(c.color, 255), label=c.name) for c in CLASSES if c.id in present]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=2 * len(headings) - 1, fontsize="small", frameon=False
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def write_figure(
    output: Path, masks: Path, real: Path, runs: Sequence[Run], slices: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Write figure 4.

    Args:
        output: picture to write.
        masks, real: folders of label maps and CTs, named as the cases are.
        runs: what each method made.
        slices: which slices of which cases, none of a case: the one with the most organs; without it that one of every
            case that all runs have.

    Raises:
        FileNotFoundError: a case that isn't in a folder or a run.
        ValueError: no case in common, and what `cut_strips` raises.
    """
    sources = [(folder, {c["case"]: Path(c["image"]) for c in mask_list(folder)}) for folder in (masks, real)]
    sources += [(run.folder, run.volumes) for run in runs]
    if slices is None:
        slices = dict.fromkeys(sorted(set.intersection(*(set(run.volumes) for run in runs))), ())
        if not slices:
            raise ValueError("the runs have no case in common: evaluate them on the same cases")
    for folder, volumes in sources:
        missing = sorted(slices.keys() - volumes.keys())
        if missing:
            raise FileNotFoundError(f"no volume of {missing[0]} in {folder}: leave the case out or add it")
    strips = []
    for case, levels in slices.items():
        label, ct, *made = (volumes[case] for _, volumes in sources)
        strips += cut_strips(case, levels, label, ct, made)
    titles = [run.method + (f"\n{run.iterations:,} iterations" if run.iterations else "") for run in runs]
    save_figure(output, strips, titles)


def _slices(arguments: Sequence[str]) -> dict[str, list[int]]:
    """`["a:1,2", "b"]` to `{"a": [1, 2], "b": []}`."""
    slices = {}
    for argument in arguments:
        case, _, levels = argument.partition(":")
        try:
            slices[case] = [int(level) for level in levels.split(",") if levels]
        except ValueError as error:
            raise ValueError(f"--slices {argument} isn't CASE:Z,Z with slice numbers Z") from error
    return slices


def main(arguments: list[str] | None = None) -> None:
    """The paper's figure 4: label maps, what each method makes of them, and the real CT."""
    parser = argparse.ArgumentParser(prog="python -m common.evaluation.figure", description=main.__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="output folder of an inference or evaluation")
    parser.add_argument("--masks", type=Path, required=True, help="folder of the label maps")
    parser.add_argument("--real", type=Path, required=True, help="folder of the real CTs")
    parser.add_argument(
        "--slices",
        action="append",
        metavar="CASE[:Z[,Z]]",
        help="slices of a case, counted from 0 at the feet (the one with the most organs); give it again for another "
        "case (all)",
    )
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    options = parser.parse_args(arguments)
    try:
        slices = None if options.slices is None else _slices(options.slices)
        runs = [read_run(run) for run in options.runs]
        write_figure(options.output, options.masks, options.real, runs, slices)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
