"""The page about a run, read back by a parser: its numbers are those of the run's files, and it needs nothing else."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from test_markup import Element, points, read, read_definitions, read_table

from common.html_report import main, write_html
from common.report import HU_BINS, hu_histogram, hu_statistics, label_histogram

SPLEEN, LIVER, BODY = 1, 6, 16
STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WEIGHTS = {"file": "/models/model.pt", "sha256": "0123abcd" * 8, "bundle": "abdominal_ct_sdm", "iteration": 150000}
SETTINGS = {"sampler": "ddim", "sampling_steps": 25, "sampler_options": {"eta": 0.5}, "guidance_scale": 1.5}


def volumes(seed: int, organs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label map, CT and real CT of 4 x 5 x 6 voxels with noise in them."""
    generator = np.random.default_rng(seed)
    label_map = generator.choice((0, *organs, BODY), size=(4, 5, 6)).astype(np.uint8)
    return label_map, *(generator.integers(-200, 280, label_map.shape).astype(np.int16) for _ in range(2))


def entry(name: str, seed: int, organs: tuple[int, ...], real: bool = True) -> dict:
    """What a report says of such a case, with numbers of faithfulness made from the seed."""
    label_map, hu, real_hu = volumes(seed, organs)

    def measures(offset: float) -> dict:
        names = {SPLEEN: "spleen", LIVER: "liver"}
        of_organs = {
            names[o]: {"hu_deviation": 10.0 * seed + o + offset, "edge_alignment": (seed + o + offset) / 32}
            for o in organs
        }
        return {
            "organs": of_organs,
            **({"hu_deviation": 3.25 + seed + offset, "edge_alignment": (seed + offset) / 16} if organs else {}),
            "z_change": 20.5 + seed + offset,
        }

    return {
        "case": name,
        "ct": f"{name}_ct.nii.gz",
        "preview": f"{name}_preview.png",
        "shape": [4, 5, 6],
        "seconds": 1.25 * seed,
        "label_histogram": label_histogram(label_map),
        "hu": hu_statistics(label_map, hu),
        "hu_histogram": {"synthetic": hu_histogram(label_map, hu)}
        | ({"real": hu_histogram(label_map, real_hu)} if real else {}),
        "faithfulness": measures(0) | ({"real": measures(0.5), "z_change_ratio": 1 + seed / 8} if real else {}),
    }


FIRST, SECOND = entry("amos_0001", 1, (SPLEEN, LIVER)), entry("amos_0002", 2, (LIVER,))


def report(*cases: dict, **changes) -> dict:
    return {
        "started": STARTED.isoformat(),
        "versions": {"python": "3.12.1", "torch": "2.9.0+cpu"},
        "device": "cuda:1",
        "weights": WEIGHTS,
        "settings": SETTINGS,
        "hu_bins": HU_BINS,
        "cases": list(cases),
    } | changes


def write_run(folder: Path, content: dict, metrics: dict | None = None, dice: str | None = None) -> None:
    (folder / "report.json").write_text(json.dumps(content))
    for case in content["cases"]:
        (folder / case["preview"]).write_bytes(os.fsencode(f"PNG of {case['case']}"))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if dice is not None:
        (folder / "organ_dice.csv").write_text(dice)


@pytest.fixture
def made(tmp_path):
    """`made(report, metrics, dice)`: the page about such a run."""

    def make(*content) -> Element:
        write_run(tmp_path, *content)
        assert write_html(tmp_path) == tmp_path / "report.html"
        return read((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


def sections(document: Element) -> dict[str, Element]:
    return {element.one("h2").text: element for element in document.all("section")}


def classes(document: Element) -> dict[str, dict[str, str]]:
    return {row["class"]: row for row in read_table(sections(document)["Classes"])}


# ----------------------------------------------------------------------------------------------------- one case


def test_the_classes_of_one_case_have_the_reports_numbers(made):
    rows = classes(made(report(FIRST), None, "case,spleen,liver\namos_0001,0.9125,\n"))
    assert list(rows) == ["spleen", "liver", "body"]
    for name, row in rows.items():
        statistics = FIRST["hu"][name]
        assert row["voxels"] == str(FIRST["label_histogram"][name])
        assert row["HU, mean ± std"] == f"{statistics['mean']:.1f} ± {statistics['std']:.1f}"
    for name in ("spleen", "liver"):
        for source, suffix in ((FIRST["faithfulness"], ""), (FIRST["faithfulness"]["real"], " of the real CT")):
            measured, deviation = source["organs"][name], "deviation of the real CT" if suffix else "deviation, HU"
            assert rows[name][deviation] == f"{measured['hu_deviation']:.1f}"
            assert rows[name][f"edge alignment{suffix}"] == f"{measured['edge_alignment']:.3f}"
    assert (rows["spleen"]["expected HU"], rows["liver"]["expected HU"]) == ("85 to 145", "75 to 135")
    assert (rows["spleen"]["Dice"], rows["liver"]["Dice"]) == ("0.9125", "–")
    assert {rows["body"][name] for name in list(rows["body"])[3:]} == {"–"}


def test_what_is_not_known_has_no_column(made):
    document = made(report(entry("a", 1, (LIVER,), real=False)))
    assert list(classes(document)["liver"]) == [
        *("class", "voxels", "HU, mean ± std", "expected HU", "deviation, HU", "edge alignment")
    ]
    assert [list(row) for row in read_table(sections(document)["Summary"])] == [["mean over cases", "synthetic"]] * 3
    assert "mean Dice" not in read_table(sections(document)["Cases"])[0]
    assert document.all("polyline") == []


def test_the_facts_of_the_run_are_there(made):
    run = sections(made(report(FIRST)))["Run"]
    titles, lists = run.all("h3"), run.all("dl")
    facts = {title.text: read_definitions(facts) for title, facts in zip(titles, lists, strict=True)}
    assert facts == {
        "This run": {"started": "2026-01-02 03:04:05+00:00", "device": "cuda:1", "seconds": "1.25"},
        "Weights": WEIGHTS | {"iteration": "150000"},
        "Settings": {
            "sampler": "ddim",
            "sampling steps": "25",
            "sampler options": '{"eta": 0.5}',
            "guidance scale": "1.5",
        },
        "Versions": {"python": "3.12.1", "torch": "2.9.0+cpu"},
    }


def test_titles_name_what_made_the_volumes(made):
    titles = [
        made(report(FIRST, weights=weights)).one("h1").text
        for weights in (WEIGHTS, {"file": "/models/public.pt", "sha256": "0"}, None)
    ]
    assert titles == ["abdominal_ct_sdm", "public.pt", "volumes made earlier"]


def test_volumes_made_earlier_have_no_weights_and_no_settings(made):
    run = sections(made(report(FIRST, weights=None, settings=None)))["Run"]
    assert [e.text for e in run.all("h3")] == ["This run", "Versions"]


def test_a_mask_without_organs_has_a_page_too(made):
    summary = read_table(sections(made(report(entry("a", 1, ()))))["Summary"])
    assert [row["mean over cases"] for row in summary] == [
        *("change between slices, HU", "change between slices, synthetic over real")
    ]


# ------------------------------------------------------------------------------------------------------ several


def test_classes_of_several_cases_are_pooled_over_voxels(made):
    rows = classes(made(report(FIRST, SECOND), None, "case,liver\namos_0001,0.5\namos_0002,0.9\n"))
    both = [volumes(1, (SPLEEN, LIVER)), volumes(2, (LIVER,))]
    for name, c in (("liver", LIVER), ("body", BODY)):
        values = np.concatenate([hu[label_map == c] for label_map, hu, _ in both])
        assert rows[name]["voxels"] == str(len(values))
        mean, std = map(float, rows[name]["HU, mean ± std"].split(" ± "))
        assert (mean, std) == (pytest.approx(values.mean(), abs=0.11), pytest.approx(values.std(), abs=0.11))
    # 10 seed + 6, and by organs rather than voxels
    assert (rows["liver"]["deviation, HU"], rows["spleen"]["deviation, HU"]) == ("21.0", "11.0")
    assert rows["liver"]["Dice"] == "0.7000"


def test_voxels_are_readable_in_thousands(made):
    case = FIRST | {"label_histogram": FIRST["label_histogram"] | {"liver": 1234567}}
    assert classes(made(report(case)))["liver"]["voxels"] == "1,234,567"


def test_faithfulness_is_a_mean_over_cases(made):
    document = made(report(FIRST, SECOND))
    assert read_table(sections(document)["Summary"]) == [
        {"mean over cases": words, "synthetic": synthetic, "real": real}
        for words, synthetic, real in (
            ("deviation from the organs' expected HU", f"{4.75:.1f}", f"{5.25:.1f}"),
            ("edge alignment", "0.094", "0.125"),
            ("change between slices, HU", "22.0", "22.5"),
            ("change between slices, synthetic over real", f"{1.1875:.3f}", "–"),
        )
    ]


def test_metrics_are_those_of_the_evaluation(made):
    metrics = {"SSIM": 0.81234567, "PSNR": 22.5, "FID_xy": 231.456, "KID": 1.234e-5, "n": 12345.0, "MS-SSIM": None}
    dice = {"dice_spleen": 0.5, "dice_right_kidney": 0.25, "dice_mean": 0.375}
    cases = [{"case": "amos_0002", "slices": 6, "SSIM": 0.7}, {"case": "amos_0001", "slices": 5, "SSIM": 0.9}]
    document = made(
        report(FIRST, SECOND),
        {"metrics": metrics | dice, "cases": cases},
        "case,spleen,liver\namos_0001,0.5,0.75\namos_0002,,0.25\n",
    )
    assert read_definitions(sections(document)["Summary"]) == {
        **{"SSIM": "0.8123", "PSNR": "22.5", "FID xy": "231.5", "KID": "1.234e-05", "n": "12,345", "MS-SSIM": "–"},
        "dice mean": "0.375",
    }
    first, second = read_table(sections(document)["Cases"])
    assert first == {
        "case": "amos_0001",
        "file": "amos_0001_ct.nii.gz",
        "shape": "4 × 5 × 6",
        "seconds": "1.25",
        "slices": "5",
        "SSIM": "0.9",
        "deviation, HU": f"{4.25:.1f}",
        "edge alignment": "0.062",
        "mean Dice": "0.6250",
    }
    assert [second[name] for name in ("case", "slices", "SSIM", "mean Dice")] == ["amos_0002", "6", "0.7", "0.2500"]


def test_histograms_are_of_all_voxels(made):
    document = made(report(FIRST, SECOND))
    drawings = {e.one("figcaption").text: e for e in sections(document)["HU"].all("figure")}
    assert list(drawings) == ["spleen", "liver", "body"]
    both = [volumes(1, (SPLEEN, LIVER)), volumes(2, (LIVER,))]
    for name, c in (("spleen", SPLEEN), ("liver", LIVER), ("body", BODY)):
        counts = []
        for k in (1, 2):
            values = np.concatenate([v[k][v[0] == c] for v in both]).clip(-160, 239)
            counts.append(np.bincount((values + 160) // 20, minlength=20))
        for tag, count in zip(("polygon", "polyline"), counts, strict=True):
            heights = [92 - y for _, y in points(drawings[name].one(tag))[1:-1:2]]
            np.testing.assert_allclose(heights, 86 * count / np.max(counts), atol=0.01)
    # of the liver 75 to 135, of the body nothing
    left, width = (float(drawings["liver"].one("rect").attributes[name]) for name in ("x", "width"))
    assert (left, width) == (pytest.approx(14 + 212 * 235 / 400, abs=0.01), pytest.approx(212 * 60 / 400, abs=0.01))
    assert drawings["body"].all("rect") == []


def test_every_case_has_its_picture_and_its_own_numbers(made):
    document = sections(made(report(FIRST, SECOND)))
    for case in (FIRST, SECOND):
        element = document[case["case"]]
        source = element.one("img").attributes["src"]
        assert base64.b64decode(source.split(",")[1]) == f"PNG of {case['case']}".encode()
        rows = {row["class"]: row for row in read_table(element.one("details"))}
        assert rows.keys() == case["hu"].keys()
        for name, row in rows.items():
            statistics = case["hu"][name]
            assert row["HU, mean ± std"] == f"{statistics['mean']:.1f} ± {statistics['std']:.1f}"
            assert row["voxels"] == str(case["label_histogram"][name])


# -------------------------------------------------------------------------------------------------- a page alone


def test_the_page_needs_nothing_else(made, tmp_path):
    metrics = {"metrics": {"SSIM": 0.5}, "cases": []}
    document = made(report(FIRST, SECOND), metrics, "case,liver\namos_0001,0.5\n")
    assert {e.tag for e in document}.isdisjoint({"script", "link", "iframe", "object", "embed", "a", "form", "base"})
    for element in document:
        for name, value in element.attributes.items():
            assert name not in ("href", "srcset", "xlink:href", "action") and not name.startswith("on")
            assert name != "src" or value.startswith("data:image/png;base64,")
            assert "url(" not in value
    text = (tmp_path / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text


@pytest.mark.parametrize("name", ["<b>x</b>", "a & b&lt;", """"'><img src=x onerror=1>""", "Müller 肝", "caf\udce9"])
def test_odd_case_names_are_shown_as_they_are(made, tmp_path, name):
    case = entry(name.replace("/", ""), 1, (LIVER,))
    metrics = {"metrics": {}, "cases": [{"case": case["case"], "slices": 4}]}
    document = made(report(case), metrics)
    plain = case["case"].replace("\udce9", "\ufffd")  # what is no character becomes the sign for that
    assert document.all("section")[-1].one("h2").text == plain
    (row,) = read_table(sections(document)["Cases"])
    assert (row["case"], row["file"], row["slices"]) == (plain, f"{plain}_ct.nii.gz", "4")
    assert document.all("b") == [] and len(document.all("img")) == 1
    assert plain in document.one("img").attributes["alt"]


# --------------------------------------------------------------------------------------------------- the command


def test_the_command_builds_the_page_again(tmp_path):
    write_run(tmp_path, report(FIRST))
    command = [sys.executable, "-m", "common.html_report", str(tmp_path)]
    project = Path(__file__).absolute().parents[1]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    main([str(tmp_path)])
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "error: no .*report.json: name the output_dir"),
        ('{"cases": [', "error: .*report.json is damaged .*: run inference or evaluation again"),
        (
            '{"cases": []}',
            "error: .*report.json is of something else or an earlier version: run inference",
        ),
    ],
)
def test_a_folder_without_a_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()
