"""Cells of the tables against numbers written by hand, and the three formats against each other."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.data import AMOS_TEST_IDS
from common.evaluation.paper import COLUMNS, METHODS, TABLE_1, TABLE_2
from common.evaluation.tables import main
from common.labels import ORGANS

FILES = {"tables.md", "tables.html", "table_1.csv", "table_2.csv", "runs.csv"}
HEADER = [
    *("Iter.", "Method", "Source", "Size", "Cases", "Slices", "FID↓", "PSNR↑", "SSIM↑"),
    *("Sple.", "Liv.", "Kid_l", "Kid_r", "Panc.", "Stom.", "Aorta", "Gall.", "Espo.", "Adr_r", "Adr_l", "Duod."),
    *("Cava", "Bladder"),
]
ALL = {
    **{"FID": 10.614, "KID": 0.00456, "n": 6500, "PSNR": 16.2349, "SSIM": 0.64651, "MS-SSIM": 0.7124},
    **{"dice_spleen": 0.9312, "dice_liver": 0.9508, "dice_left_kidney": 0.9386, "dice_right_kidney": 0.9123},
    **{"dice_pancreas": 0.7561, "dice_stomach": 0.8707, "dice_aorta": 0.9134, "dice_gallbladder": 0.6604},
    **{"dice_esophagus": 0.7951, "dice_right_adrenal_gland": 0.6719, "dice_left_adrenal_gland": 0.6507},
    **{"dice_duodenum": 0.6562, "dice_postcava": 0.8133, "dice_bladder": 0.7072, "dice_mean": 0.8026},
}
SHOWN = [
    *("10.61", "16.23", "0.647", "93.1", "95.1", "93.9", "91.2", "75.6", "87.1", "91.3", "66.0", "79.5", "67.2"),
    *("65.1", "65.6", "81.3", "70.7"),
]


class Tables(HTMLParser):
    """The cells of every table of a page, its styles and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def in_markdown(text: str) -> list[list[list[str]]]:
    """Each table of a text, without the line below its header."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    split = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
    return [[[cell.strip().replace("\\|", "|") for cell in row] for row in [rows[0], *rows[2:]]] for rows in split]


def in_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def evaluated(tmp_path):
    """`evaluated(name, bundle, iteration, metrics)`: the folder of an evaluation of two cases, 120 and 90 slices."""

    def write(
        name: str,
        bundle: str | None = "abdominal_ct_mask_guided_ddpm",
        iteration: int = 150_000,
        metrics: dict[str, float] = ALL,
        cases: tuple[str, ...] = ("amos_0008", "amos_0018"),
        image_size: int = 256,
    ) -> str:
        folder = tmp_path / name
        folder.mkdir()
        weights = {"file": "model.pt", "sha256": "0123456789abcdef" * 4, "bundle": bundle, "iteration": iteration}
        report = {
            "started": "2026-01-01T00:00:00+00:00",
            "weights": weights | {"image_size": image_size} if bundle else None,
            "settings": {"sampler": "ddpm", "sampler_options": {}, "seed": 0} if bundle else None,
            "cases": [{"case": case, "ct": f"{case}_ct.nii.gz"} for case in cases],
        }
        slices = [120, *[90] * (len(cases) - 1)]
        content = {
            "metrics": metrics,
            "settings": {"Dice": {"segmenter": "TotalSegmentator", "version": "2.18.0", "fast": True}}
            if bundle
            else {},
            "cases": [{"case": case, "slices": count} for case, count in zip(cases, slices, strict=True)],
        }
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "metrics.json").write_text(json.dumps(content))
        return str(folder)

    return write


@pytest.fixture
def tables(tmp_path):
    """`tables(*runs)`: runs the command and gives Table 1, Table 2 and the runs as Markdown shows them."""

    def make(*runs: str) -> list[list[list[str]]]:
        main([*runs, "--output", str(tmp_path / "tables")])
        return in_markdown((tmp_path / "tables" / "tables.md").read_text(encoding="utf-8"))

    return make


@pytest.fixture
def refused(tables, capsys, tmp_path):
    """`refused(*runs)`: the message with which the command refuses them before anything is written."""

    def attempt(*runs: str) -> str:
        with pytest.raises(SystemExit) as caught:
            tables(*runs)
        assert caught.value.code == 2 and not (tmp_path / "tables").exists()
        return capsys.readouterr().err.splitlines()[-1]

    return attempt


# ------------------------------------------------------------------------------------------------ the paper's figures


def test_the_paper_s_figures_are_those_that_the_bundles_quote(bundles):
    quoted = 0
    for name, method in METHODS.items():
        readme = (bundles[name] / "docs" / "README.md").read_text(encoding="utf-8")
        (table,) = (t for t in re.findall(r"^\|.*FID \|.*\n\|-.*\n(?:\|.*\n)+", readme, flags=re.MULTILINE))
        header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        headings = [column.heading.rstrip("↓↑") for column in COLUMNS]
        assert header in (headings, ["iterations", *headings])
        for row in rows:
            values = tuple(map(float, row[-17:]))
            iterations = int(row[0].replace(",", "")) if header[0] == "iterations" else None
            assert values == (TABLE_2[method] if iterations is None else TABLE_1[iterations][method])
            quoted += 1
    assert quoted == 4 + 9


def test_table_2_differs_from_table_1_in_the_spleen_that_it_prints_otherwise_alone():
    differences = [
        (method, column.heading, one, two)
        for method, values in TABLE_1[150_000].items()
        for column, one, two in zip(COLUMNS, values, TABLE_2[method], strict=True)
        if one != two
    ]
    assert differences == [("Edge-guided DDPM", "Sple.", 93.5, 93.9)]


def test_there_is_a_column_for_every_organ_but_prostate_and_uterus():
    organs = {f"dice_{organ.name.replace(' ', '_')}" for organ in ORGANS}
    measured = {column.metric for column in COLUMNS if column.metric.startswith("dice_")}
    assert organs - measured == {"dice_prostate/uterus"} and measured < organs


# ---------------------------------------------------------------------------------------------------------- our cells


def test_ours_stands_below_the_paper_s_with_what_it_was_measured_on(evaluated, tables):
    one, two, _ = tables(evaluated("run"))
    for table in (one, two):
        assert table[0] == HEADER
        (ours,) = (i for i, row in enumerate(table) if row[2] == "ours")
        assert table[ours] == ["150,000", "Mask-guided DDPM", "ours", "256", "2", "210", *SHOWN]
        assert table[ours - 1] == [
            *("150,000", "Mask-guided DDPM", "paper", "256", "50", "6,559", "10.58", "16.28", "0.646", "93.9", "95.6"),
            *("93.9", "90.9", "75.6", "87.1", "91.3", "66.0", "79.5", "67.2", "65.1", "65.6", "81.3", "70.7"),
        ]


def test_the_csv_has_full_precision(evaluated, tables, tmp_path):
    tables(evaluated("run"))
    for name in ("table_1", "table_2"):
        rows = in_csv(tmp_path / "tables" / f"{name}.csv")
        assert list(rows[0]) == [heading.rstrip("↓↑") for heading in HEADER]
        (ours,) = (row for row in rows if row["Source"] == "ours")
        assert (ours["Iter."], ours["Cases"], ours["Slices"]) == ("150000", "2", "210")
        assert (float(ours["FID"]), float(ours["PSNR"]), float(ours["SSIM"])) == (10.614, 16.2349, 0.64651)
        for column in COLUMNS[3:]:
            assert float(ours[column.heading]) == 100 * ALL[column.metric]


def test_table_1_is_the_paper_s_with_ours_at_their_iterations(evaluated, tables):
    table, _, _ = tables(
        evaluated("early", "abdominal_ct_edge_guided_ddpm", 300),
        evaluated("mark", "abdominal_ct_conditional_ddpm", 100_000),
        evaluated("gan", "abdominal_ct_spade", 100_000),
        evaluated("later", "abdominal_ct_conditional_ddpm", 200_000),
    )
    names = ("Conditional DDPM", "Mask-guided DDPM", "Edge-guided DDPM")
    of_paper = {n: [(n, name, "paper") for name in names] for n in ("50,000", "100,000", "150,000")}
    assert [tuple(row[:3]) for row in table[1:]] == [
        ("300", "Edge-guided DDPM", "ours"),
        *of_paper["50,000"],
        of_paper["100,000"][0],
        ("100,000", "Conditional DDPM", "ours"),
        *of_paper["100,000"][1:],
        *of_paper["150,000"],
        ("200,000", "Conditional DDPM", "ours"),
    ]


def test_table_2_takes_each_method_at_its_most_iterations(evaluated, tables):
    _, table, listed = tables(
        evaluated("long", "abdominal_ct_spade", 488_800),
        evaluated("short", "abdominal_ct_spade", 100_000),
        evaluated("mark", "abdominal_ct_edge_guided_ddpm", 50_000),
        f"Theirs={evaluated('theirs', None)}",
    )
    assert [tuple(row[:3]) for row in table[1:]] == [
        ("–", "Pix2Pix", "paper"),
        ("–", "OASIS", "paper"),
        ("–", "SPADE", "paper"),
        ("488,800", "SPADE", "ours"),
        ("150,000", "SDM", "paper"),
        ("150,000", "Conditional DDPM", "paper"),
        ("150,000", "Mask-guided DDPM", "paper"),
        ("150,000", "Edge-guided DDPM", "paper"),
        ("50,000", "Edge-guided DDPM", "ours"),
        ("–", "Theirs", "ours"),
    ]
    assert [row[:2] for row in listed[1:]] == [  # every one of them
        *(["488,800", "SPADE"], ["100,000", "SPADE"], ["50,000", "Edge-guided DDPM"], ["–", "Theirs"])
    ]


def test_a_method_of_the_paper_by_name_stands_beside_it(evaluated, tables):
    one, two, _ = tables(f"Mask-guided DDPM={evaluated('theirs', None)}")
    assert not any("ours" in row for row in one)  # nobody knows where in Table 1
    (place,) = (i for i, row in enumerate(two) if row[2] == "ours")
    assert two[place][:2] == ["–", "Mask-guided DDPM"] and two[place - 1][:3] == ["150,000", two[place][1], "paper"]


def test_what_was_not_measured_is_an_en_dash_and_empty_in_csv(evaluated, tables, tmp_path):
    some = {"PSNR": 16.0, "SSIM": 0.6, "FID": None, "dice_liver": 0.9, "dice_bladder": 0.0, "dice_mean": 0.45}
    one, _, listed = tables(evaluated("run", metrics=some))
    (ours,) = (row for row in one if row[2] == "ours")
    assert ours[6:] == ["–", "16.00", "0.600", "–", "90.0", *["–"] * 11, "0.0"]
    assert listed[1][5:8] == ["–", "–", "45.0"]
    (row,) = (row for row in in_csv(tmp_path / "tables" / "table_1.csv") if row["Source"] == "ours")
    assert (row["FID"], row["Sple."], row["Liv."], row["Bladder"]) == ("", "", "90.0", "0.0")


def test_fid_of_several_planes_is_the_axial_one_as_in_the_paper(evaluated, tables):
    planes = {"FID": 30.0, "FID_xy": 11.0, "FID_yz": 49.0, "KID": 0.03, "KID_xy": 0.01}
    one, _, listed = tables(evaluated("run", metrics=ALL | planes))
    assert next(row for row in one if row[2] == "ours")[6] == "11.00" and listed[1][5] == "0.0100"


def test_the_runs_are_listed_with_what_made_them(evaluated, tables):
    listed = tables(evaluated("run"), f"Theirs={evaluated('theirs', None)}")[2]
    assert listed[0] == [
        *("Iter.", "Method", "Size", "Cases", "Slices", "KID↓", "MS-SSIM↑", "Dice↑"),
        *("Segmenter", "Sampling", "Weights, SHA-256"),
    ]
    facts = ["150,000", "Mask-guided DDPM", "256", "2", "210"]
    segmenter = "segmenter TotalSegmentator, version 2.18.0, fast True"
    assert listed[1] == [*facts, "0.0046", "0.712", "80.3", segmenter, "sampler ddpm, seed 0", "0123456789ab"]
    assert listed[2] == ["–", "Theirs", "–", "2", "210", "0.0046", "0.712", "80.3", "–", "–", "–"]


# -------------------------------------------------------------------------------------------------------- the formats


def test_markdown_html_and_csv_agree(evaluated, tables, tmp_path):
    some = {name: ALL[name] for name in list(ALL)[::2]}
    from_markdown = tables(
        evaluated("a"), evaluated("b", "abdominal_ct_oasis", 1, some), f"A|b <i>&amp;={evaluated('c', None)}"
    )
    output = tmp_path / "tables"
    assert {path.name for path in output.iterdir()} == FILES
    page = Tables((output / "tables.html").read_text(encoding="utf-8"))
    assert page.tables == from_markdown and page.loads == []
    assert any("A|b <i>&amp;" in row for row in page.tables[1])
    for name, (header, *rows) in zip(("table_1", "table_2", "runs"), from_markdown, strict=True):
        content = in_csv(output / f"{name}.csv")
        assert [len(row) for row in rows] == [len(header)] * len(content)
        for raw, row in zip(content, rows, strict=True):
            for value, shown in zip(raw.values(), row, strict=True):
                if shown == "–":
                    assert value == ""
                elif re.fullmatch(r"[\d,]+(\.\d+)?", shown):
                    decimals = len(shown.partition(".")[2])
                    assert abs(float(value) - float(shown.replace(",", ""))) <= 0.5001 * 10**-decimals
                else:
                    assert value == shown


def test_the_notes_say_what_the_paper_has_two_figures_for(evaluated, tables, tmp_path):
    tables(evaluated("run"))
    for name in ("tables.md", "tables.html"):
        text = (tmp_path / "tables" / name).read_text(encoding="utf-8")
        assert "spleen is 93.9 in its Table 2 and 93.5 in its Table 1" in text


def test_runs_that_are_not_of_the_test_set_are_named(evaluated, tables, tmp_path):
    test = tuple(f"amos_{number:04d}" for number in AMOS_TEST_IDS)
    whole = evaluated("whole", cases=test)

    def incomparable() -> str:
        text = (tmp_path / "tables" / "tables.md").read_text(encoding="utf-8")
        return text.partition("Not comparable")[2].rpartition(": ")[2].strip()

    tables(whole)
    assert incomparable() == ""
    tables(
        whole,
        evaluated("patient", "abdominal_ct_sdm", 300, cases=("ts_0001",)),
        evaluated("more", "abdominal_ct_spade", 10, cases=(*test, "amos_0001")),
        evaluated("small", "abdominal_ct_oasis", 20, cases=test, image_size=64),
    )
    assert incomparable() == "SDM, 300 iterations; SPADE, 10 iterations; OASIS, 20 iterations."


# ----------------------------------------------------------------------------------------------------------- refusals


def test_two_runs_for_one_row_are_refused(evaluated, refused, tables):
    a, b = evaluated("a"), evaluated("b")
    message = refused(a, b)
    assert f"{a} and {b} are both Mask-guided DDPM of 150,000 iterations: give one another name, NAME={b}" in message
    assert [row[1] for row in tables(a, f"Again={b}")[2][1:]] == ["Mask-guided DDPM", "Again"]


def test_runs_without_measurements_or_origin_are_refused(evaluated, refused, tmp_path):
    run, theirs = evaluated("run"), evaluated("theirs", None)
    assert "give it a name, NAME=" in refused(run, theirs)
    Path(run, "metrics.json").unlink()
    assert f"no metrics.json of the run in {run}: evaluate with configs/evaluate.yaml" in refused(run)
    assert "report.json: name the output_dir" in refused(str(tmp_path / "nowhere"))
