"""`report.html`: a run's report as one file for a browser, with its pictures in it and nothing to fetch.

`python -m common.html_report OUTPUT_DIR` builds it again from `report.json` and what an evaluation left beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .faithfulness import SPREADS
from .files import replacing
from .labels import CLASSES, LabelClass
from .markup import UNKNOWN, cards, columns, definitions, folded, histogram, number, page, picture, section, table
from .records import read_dice, read_metrics, read_report

COLORS = {c.name: "rgb({}, {}, {})".format(*c.color) for c in CLASSES}

CLASSES_TEXT = (
    "HU over all voxels of a class. Deviation is the mean distance of an organ's voxels from its expected range; edge "
    "alignment is 1 where the CT is steeper at all of the mask's boundaries than inside the organs, 0 where boundaries "
    "don't show. Both and Dice are means over the cases that have the organ."
)
HISTOGRAMS_TEXT = (
    "Voxels of a class by HU, over all cases. Filled: synthetic; line: real, where it is known; grey: the organ's "
    "expected range. The outermost bins hold what lies beyond."
)

Dice = Mapping[str, Mapping[str, float]]
"""Dice by case and organ."""


def write_html(output_dir: str | os.PathLike) -> Path:
    """Write `report.html` beside the `report.json` of a run, and give its path.

    Raises:
        FileNotFoundError: no `report.json` there.
        ValueError: a damaged one, or one of a version that reported less.
    """
    folder = Path(output_dir)
    report = read_report(folder)
    metrics = read_metrics(folder) or {"metrics": {}, "cases": []}
    with replacing(folder / "report.html") as temporary:
        text = _page(folder, report, metrics, read_dice(folder))
        # File names may hold bytes that are no UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    return folder / "report.html"


def _page(folder: Path, report: dict, metrics: dict, dice: Dice) -> str:
    cases, weights = report["cases"], report["weights"]
    name = "volumes made earlier" if weights is None else weights.get("bundle", Path(weights["file"]).name)
    # Each organ's Dice stands in the table of classes.
    shown = {k: v for k, v in metrics["metrics"].items() if not k.startswith("dice_") or k == "dice_mean"}
    summary = [cards({_words(k): number(v) for k, v in shown.items()})] if shown else []
    return page(
        name,
        f"Synthetic CT: a run of {len(cases)} {'case' if len(cases) == 1 else 'cases'}",
        section("Summary", "", *summary, table(_faithfulness_rows(cases))),
        section("Run", "", columns(*_facts(report))),
        section("Classes", CLASSES_TEXT, table(_class_rows(cases, dice), COLORS)),
        section("HU", HISTOGRAMS_TEXT, columns(*_histograms(cases, report["hu_bins"]))),
        section("Cases", "", table(_case_rows(cases, metrics["cases"], dice))),
        *(_case_section(folder, case, dice) for case in cases),
    )


def _facts(report: dict) -> Iterator[str]:
    cases = report["cases"]
    seconds = sum(case["seconds"] for case in cases)
    run = {"started": report["started"].replace("T", " "), "device": report["device"], "seconds": f"{seconds:.2f}"}
    parts = {"This run": run, "Weights": report["weights"], "Settings": report["settings"]}
    for title, facts in (parts | {"Versions": report["versions"]}).items():
        if facts is not None:
            yield definitions(title, {_words(k): v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()})


def _faithfulness_rows(cases: Sequence[dict]) -> list[dict[str, str]]:
    """Means over the cases of how well CTs obey their label maps."""
    synthetic = [case["faithfulness"] for case in cases]
    real = [measured.get("real", {}) for measured in synthetic]
    measures = (
        ("hu_deviation", "deviation from the organs' expected HU", 1),
        ("edge_alignment", "edge alignment", 3),
        ("z_change", "change between slices, HU", 1),
        ("z_change_ratio", "change between slices, synthetic over real", 3),
    )
    rows = [
        {"mean over cases": words, "synthetic": _mean(synthetic, key, digits), "real": _mean(real, key, digits)}
        for key, words, digits in measures
    ]
    return [row for row in rows if row["synthetic"] != UNKNOWN]


def _class_rows(cases: Sequence[dict], dice: Dice) -> list[dict[str, str]]:
    """What is known about each class over some cases."""
    rows = []
    for c in CLASSES[1:]:
        having = [case for case in cases if c.name in case["hu"]]
        if not having:
            continue
        voxels = [case["label_histogram"][c.name] for case in having]
        mean, std = _pooled(voxels, [case["hu"][c.name] for case in having])
        expected = _expected(c)
        synthetic = [case["faithfulness"]["organs"].get(c.name, {}) for case in having]
        real = [case["faithfulness"].get("real", {"organs": {}})["organs"].get(c.name, {}) for case in having]
        rows.append(
            {
                "class": c.name,
                "voxels": f"{sum(voxels):,}",
                "HU, mean ± std": f"{mean:.1f} ± {std:.1f}",
                "expected HU": f"{expected[0]:g} to {expected[1]:g}" if expected else UNKNOWN,
                "deviation, HU": _mean(synthetic, "hu_deviation", 1),
                "deviation of the real CT": _mean(real, "hu_deviation", 1),
                "edge alignment": _mean(synthetic, "edge_alignment", 3),
                "edge alignment of the real CT": _mean(real, "edge_alignment", 3),
                "Dice": _mean([dice.get(case["case"], {}) for case in having], c.name, 4),
            }
        )
    return rows


def _histograms(cases: Sequence[dict], edges: Sequence[float]) -> Iterator[str]:
    for c in CLASSES[1:]:
        synthetic, real = (
            _sum(case["hu_histogram"].get(source, {}).get(c.name) for case in cases) for source in ("synthetic", "real")
        )
        if synthetic is not None:
            yield histogram(c.name, COLORS[c.name], edges, synthetic, real, _expected(c))


def _sum(histograms: Iterable[Sequence[int] | None]) -> list[int] | None:
    """Several histograms as one, None of none."""
    counts = [sum(several) for several in zip(*(h for h in histograms if h is not None), strict=True)]
    return counts or None


def _case_rows(cases: Sequence[dict], metrics: Sequence[dict], dice: Dice) -> list[dict[str, str]]:
    measured = {entry["case"]: entry for entry in metrics}
    names = list(dict.fromkeys(name for entry in metrics for name in entry if name != "case"))
    return [
        {
            "case": case["case"],
            "file": case["ct"],
            "shape": " × ".join(map(str, case["shape"])),
            "seconds": f"{case['seconds']:.2f}",
            **{name: number(measured.get(case["case"], {}).get(name)) for name in names},
            "deviation, HU": _mean([case["faithfulness"]], "hu_deviation", 1),
            "edge alignment": _mean([case["faithfulness"]], "edge_alignment", 3),
            "mean Dice": _mean([{"dice": value} for value in dice.get(case["case"], {}).values()], "dice", 4),
        }
        for case in cases
    ]


def _case_section(folder: Path, case: dict, dice: Dice) -> str:
    name = case["case"]
    classes = folded("Classes", table(_class_rows([case], dice), COLORS))
    return section(name, "", picture(folder / case["preview"], f"mask and CT of {name} in three planes"), classes)


def _expected(c: LabelClass) -> tuple[float, float] | None:
    """The range in which an organ's mean HU is expected."""
    if c.hu is None:
        return None
    mean, spread = c.hu
    return mean - SPREADS * spread, mean + SPREADS * spread


def _pooled(counts: Sequence[int], parts: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Mean and standard deviation of all values together, from those of parts of these sizes."""
    weights = [count / sum(counts) for count in counts]
    mean = sum(weight * part["mean"] for weight, part in zip(weights, parts, strict=True))
    squares = [part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts]
    return mean, math.sqrt(sum(weight * square for weight, square in zip(weights, squares, strict=True)))


def _mean(entries: Sequence[Mapping[str, float | None]], key: str, digits: int) -> str:
    """The mean over those entries that know the value, as text."""
    known = [entry[key] for entry in entries if entry.get(key) is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else UNKNOWN


def _words(name: str) -> str:
    return name.replace("_", " ")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build report.html of a run again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output_dir", type=Path, help="folder with the run's report.json")
    try:
        print(write_html(parser.parse_args(arguments).output_dir))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
