"""The paper's Tables 1 and 2, ours beside the paper's figures:

    python -m common.evaluation.tables RUN NAME=RUN ... --output tables/

A RUN is the output folder of an evaluation. What made its volumes and how long it was trained is known from the
weights; a NAME goes before it where it isn't, or where two runs would have the same name.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import markup
from ..data import AMOS_TEST_IDS
from ..files import replacing
from .paper import COLUMNS, IMAGE_SIZE, TABLE_1, TABLE_2, TABLE_2_ITERATIONS, TEST_CASES, TEST_SLICES
from .runs import Run, read_run

Cell = str | int | float | None

FIXED_TEST = {f"amos_{number:04d}" for number in AMOS_TEST_IDS}

NOTES = (
    f"paper: Zhuang et al. 2023, arXiv 2312.06453, {TEST_CASES} volumes of AMOS22's validation set that it doesn't "
    "name. ours: measured by this software, on the cases and slices that the row says. Size: pixels along a side of "
    "the slices that were measured.",
    "FID, PSNR and SSIM: axial slices; ours without those that have no body. Organs: Dice in % between the label map "
    "and a segmentation of the synthetic volume, mean over the volumes that have the organ. –: not measured, not "
    "stated, or in no volume. Dice of our runs: mean over the organs. The paper segmented with TotalSegmentator v1.",
    "Volumes read from files, which have no weights in the list of our runs, were resized once more than sampled ones.",
    "The paper trained Pix2Pix, OASIS and SPADE for 300 epochs, of a batch size that it doesn't state.",
    "The paper contradicts itself: the edge-guided DDPM's spleen is 93.9 in its Table 2 and 93.5 in its Table 1, "
    "after the same 150,000 iterations.",
)


class Table(NamedTuple):
    """A table before it is Markdown, CSV or HTML.

    Attributes:
        name: of the CSV file, without suffix.
        title: above the table.
        columns: heading and format specification of each column.
        rows: their cells; None is shown as an en dash.
    """

    name: str
    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]

    def shown(self) -> list[list[str]]:
        """The cells as a reader sees them."""
        formats = [form for _, form in self.columns]
        return [
            [markup.UNKNOWN if cell is None else format(cell, form) for cell, form in zip(row, formats, strict=True)]
            for row in self.rows
        ]


FACTS = (("Iter.", ","), ("Method", ""), ("Source", ""), ("Size", ""), ("Cases", ""), ("Slices", ","))
MEASURED = tuple((column.heading, f".{column.decimals}f") for column in COLUMNS)


def paper_tables(runs: Sequence[Run]) -> list[Table]:
    """Table 1, Table 2 and the list of runs.

    Raises:
        FileNotFoundError: nothing was measured in a run.
        ValueError: two runs of one method with as many iterations.
    """
    ours: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        if not run.metrics:
            raise FileNotFoundError(f"no metrics.json of the run in {run.folder}: evaluate with configs/evaluate.yaml")
        other = ours.setdefault((run.method, run.iterations), run)
        if other is not run:
            raise ValueError(
                f"{other.folder} and {run.folder} are both {run.method} of {_count(run.iterations)} iterations: give "
                f"one another name, NAME={run.folder}"
            )
    columns = (*FACTS, *MEASURED)
    title = "FID, PSNR, SSIM and Dice"
    return [
        Table("table_1", f"Table 1: {title} by training iterations", columns, _table_1(ours)),
        Table("table_2", f"Table 2: {title} by method, ours after the most iterations", columns, _table_2(ours)),
        _run_table(runs),
    ]


def notes(runs: Sequence[Run]) -> list[str]:
    """What stands below the tables: `NOTES`, and which of the runs can't be compared with the paper's figures."""
    others = [run for run in runs if run.slices.keys() != FIXED_TEST or run.image_size not in (None, IMAGE_SIZE)]
    if not others:
        return list(NOTES)
    named = "; ".join(f"{run.method}, {_count(run.iterations)} iterations" for run in others)
    return [
        *NOTES,
        f"Not comparable with the paper, because it isn't this project's {len(FIXED_TEST)} test cases at "
        f"{IMAGE_SIZE}×{IMAGE_SIZE}: {named}.",
    ]


def _table_1(ours: dict[tuple[str, int | None], Run]) -> list[list[Cell]]:
    ddpms = list(TABLE_1[150_000])
    setups = {(iterations, method) for iterations in TABLE_1 for method in ddpms}
    setups |= {(iterations, method) for method, iterations in ours if method in ddpms and iterations is not None}
    rows = []
    for iterations, method in sorted(setups, key=lambda setup: (setup[0], ddpms.index(setup[1]))):
        if iterations in TABLE_1:
            rows.append(_of_paper(iterations, method, TABLE_1[iterations][method]))
        if (method, iterations) in ours:
            rows.append(_of_run(ours[method, iterations]))
    return rows


def _table_2(ours: dict[tuple[str, int | None], Run]) -> list[list[Cell]]:
    longest = {run.method: run for run in sorted(ours.values(), key=lambda run: run.iterations or 0)}
    rows = []
    for method in dict.fromkeys((*TABLE_2, *longest)):
        if method in TABLE_2:
            rows.append(_of_paper(TABLE_2_ITERATIONS.get(method), method, TABLE_2[method]))
        if method in longest:
            rows.append(_of_run(longest[method]))
    return rows


def _of_paper(iterations: int | None, method: str, values: Iterable[float]) -> list[Cell]:
    return [iterations, method, "paper", IMAGE_SIZE, TEST_CASES, TEST_SLICES, *values]


def _of_run(run: Run) -> list[Cell]:
    values = (_measured(run, column.metric, column.factor) for column in COLUMNS)
    return [run.iterations, run.method, "ours", run.image_size, len(run.slices), sum(run.slices.values()), *values]


def _run_table(runs: Sequence[Run]) -> Table:
    """What the paper's columns leave out: KID, which few slices don't bias, and how volumes were made and measured."""
    rows = [
        [
            *(run.iterations, run.method, run.image_size, len(run.slices), sum(run.slices.values())),
            *(_measured(run, name) for name in ("KID", "MS-SSIM")),
            _measured(run, "dice_mean", 100),
            *(_listed(run.segmenter), _listed(run.settings), run.weights and run.weights[:12]),
        ]
        for run in runs
    ]
    columns = [column for column in FACTS if column[0] != "Source"]
    columns += [("KID↓", ".4f"), ("MS-SSIM↑", ".3f"), ("Dice↑", ".1f")]
    columns += [("Segmenter", ""), ("Sampling", ""), ("Weights, SHA-256", "")]
    return Table("runs", "Our runs", columns, rows)


def _listed(settings: dict) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value not in ({}, None)) or None


def _measured(run: Run, name: str, factor: int = 1) -> float | None:
    """A metric, of the axial slices where there are several planes; None where it is missing or not a number."""
    value = run.metrics.get(f"{name}_xy", run.metrics.get(name))
    return None if value is None else factor * value


def _count(iterations: int | None) -> str:
    return "an unknown number of" if iterations is None else f"{iterations:,}"


def to_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """All tables and the notes as one Markdown text."""
    parts = []
    for table in tables:
        headings = [heading for heading, _ in table.columns]
        lines = [headings, ["---"] * len(headings), *table.shown()]
        escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
        text = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
        parts.append(f"## {table.title}\n\n{text}\n")
    return "\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


def to_html(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """All tables and the notes as one HTML page that needs nothing else."""
    sections = []
    for table in tables:
        headings = [heading for heading, _ in table.columns]
        rows = [dict(zip(headings, cells, strict=True)) for cells in table.shown()]
        sections.append(markup.section(table.title, "", markup.table(rows)))
    title, subtitle = "Semantic synthesis of abdominal CT", "The paper's figures, and ours beside them"
    return markup.page(title, subtitle, *sections, markup.section("Notes", "", markup.bullets(notes)))


def write_tables(runs: Sequence[Run], output: str | os.PathLike) -> None:
    """Write `tables.md`, `tables.html`, and each table as CSV in full precision, an empty cell where nothing is known.

    Raises:
        FileNotFoundError: nothing was measured in a run.
        ValueError: two runs of one method with as many iterations.
    """
    output = Path(output)
    tables, below = paper_tables(runs), notes(runs)
    for name, text in (("tables.md", to_markdown(tables, below)), ("tables.html", to_html(tables, below))):
        with replacing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for table in tables:
        headings = [heading.rstrip("↓↑") for heading, _ in table.columns]
        path = output / f"{table.name}.csv"
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([headings, *table.rows])


def main(arguments: list[str] | None = None) -> None:
    """The paper's Tables 1 and 2 with our runs beside them, as Markdown, HTML and CSV."""
    parser = argparse.ArgumentParser(prog="python -m common.evaluation.tables", description=main.__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="output folder of an evaluation")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    options = parser.parse_args(arguments)
    try:
        write_tables([read_run(run) for run in options.runs], options.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
