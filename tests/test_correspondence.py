"""Organ Dice: its values, organs that are absent, and the table of a run, even of one that is killed."""

from __future__ import annotations

import csv
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from common.evaluation.correspondence import OrganDice, mean_dice, organ_dice
from common.labels import ORGANS
from common.phantom import phantom

AFFINE = np.diag((-2.0, -2.0, 5.0, 1.0))


def blocks(**sizes: int) -> np.ndarray:
    """Volume (10, 10, 3) whose first voxels have these ids: `blocks(_6=4, _1=2)` is 6 6 6 6 1 1 0 0..."""
    ids = np.repeat([int(name[1:]) for name in sizes], list(sizes.values()))
    return np.pad(ids, (0, 300 - len(ids))).astype(np.uint8).reshape(10, 10, 3)


def test_dice_of_volumes_that_overlap_in_part():
    label_map = blocks(_6=40, _16=30, _1=10)
    segmentation = blocks(_6=30, _0=45, _1=15)  # of 40 liver voxels 30; of 10 spleen voxels 5 among 15
    dice = organ_dice(label_map, segmentation)
    assert dice["liver"] == pytest.approx(2 * 30 / (40 + 30))
    assert dice["spleen"] == pytest.approx(2 * 5 / (10 + 15))
    assert all(math.isnan(value) for name, value in dice.items() if name not in ("liver", "spleen"))


def test_an_absent_organ_has_no_dice_and_a_missed_one_has_none_to_spare():
    dice = organ_dice(blocks(_6=4, _16=20), blocks(_1=4))
    assert dice["liver"] == 0  # there, and not found
    assert math.isnan(dice["spleen"])  # found, and not there
    assert math.isnan(dice["pancreas"])  # neither


def test_fourteen_organs_are_compared_and_others_by_request():
    label_map = blocks(_14=5, _15=5)
    assert list(organ_dice(label_map, label_map)) == [c.name for c in ORGANS[:14]]
    assert organ_dice(label_map, label_map, organs=(15, 2)) == {
        "prostate/uterus": 1,
        "right kidney": pytest.approx(math.nan, nan_ok=True),
    }


def test_a_segmentation_on_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"shape \(10, 10, 2\), its label map \(10, 10, 3\)"):
        organ_dice(blocks(_6=4), blocks(_6=4)[..., :2])


def test_means_are_over_the_volumes_that_have_the_organ():
    nan = math.nan
    cases = [
        {"liver": 0.5, "spleen": nan, "bladder": nan},
        {"liver": 0.0, "spleen": 0.9, "bladder": nan},
        {"liver": 1.0, "spleen": nan, "bladder": nan},
    ]
    assert mean_dice(cases) == {"liver": 0.5, "spleen": 0.9}
    assert mean_dice([]) == {}


# ------------------------------------------------------------------------------------------------- a whole run


def run(folder: Path, segmenter, cases: dict[str, tuple[np.ndarray, np.ndarray]], passes: int = 1) -> Engine:
    """A fake evaluator that knows its outputs: label map and CT by case, one case a batch."""
    engine = Engine(lambda _, batch: [{"pred": torch.from_numpy(cases[item["case"]][1])[None]} for item in batch])
    OrganDice(segmenter, folder).attach(engine)
    loader = [
        [{"case": case, "label_map": MetaTensor(torch.from_numpy(label_map)[None], affine=torch.from_numpy(AFFINE))}]
        for case, (label_map, _) in cases.items()
    ]
    for _ in range(passes):
        engine.run(loader)
    return engine


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "organ_dice.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_phantom_that_is_segmented_as_its_own_mask_has_dice_1(tmp_path):
    made = phantom((48, 40, 40))
    asked = []

    def own_mask(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        asked.append((hu, affine))
        return np.where(made.label == 16, 0, made.label)

    engine = run(tmp_path, own_mask, {"phantom": (made.label, made.hu)})
    names = [c.name for c in ORGANS[:14]]
    assert table(tmp_path) == [{"case": "phantom", **dict.fromkeys(names, "1.0000")}]
    expected = {f"dice_{name.replace(' ', '_')}": 1.0 for name in names} | {"dice_mean": 1.0}
    assert engine.state.metrics == expected and "dice_right_adrenal_gland" in expected
    np.testing.assert_array_equal(asked[0][0], made.hu)  # in HU, on the mask's grid
    np.testing.assert_array_equal(asked[0][1], AFFINE)


def test_a_table_has_a_row_a_case_and_the_metrics_its_means(tmp_path):
    cases = {
        "first": (blocks(_6=40, _1=10), np.zeros((10, 10, 3), np.int16)),
        "second, with a comma": (blocks(_6=40), np.ones((10, 10, 3), np.int16)),
        "third": (blocks(_16=40), np.zeros((10, 10, 3), np.int16)),
    }
    segmenter = lambda hu, _: blocks(_6=20) if hu.any() else blocks(_6=40, _1=30)  # noqa: E731
    engine = run(tmp_path, segmenter, cases)
    rows = table(tmp_path)
    assert [row["case"] for row in rows] == list(cases)
    assert [row["liver"] for row in rows] == ["1.0000", f"{2 * 20 / 60:.4f}", ""]
    assert [row["spleen"] for row in rows] == [f"{2 * 10 / 40:.4f}", "", ""]
    assert {row["aorta"] for row in rows} == {""}
    liver, spleen = (1 + 2 / 3) / 2, 0.5
    assert engine.state.metrics == pytest.approx(
        {"dice_liver": liver, "dice_spleen": spleen, "dice_mean": (liver + spleen) / 2}
    )


def test_running_twice_starts_afresh(tmp_path):
    cases = {"only": (blocks(_6=40), np.zeros((10, 10, 3), np.int16))}
    run(tmp_path, lambda *_: blocks(_6=40), cases, passes=2)
    assert [row["case"] for row in table(tmp_path)] == ["only"]


def test_a_run_that_breaks_leaves_whole_rows_of_the_cases_that_were_done(tmp_path):
    cases = {case: (blocks(_6=40), np.full((10, 10, 3), n, np.int16)) for n, case in enumerate("abc")}

    def segmenter(hu: np.ndarray, _: np.ndarray) -> np.ndarray:
        if hu.max() == 2:
            assert [row["liver"] for row in table(tmp_path)] == ["1.0000", "1.0000"]
            raise RuntimeError("out of memory")
        return blocks(_6=40)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, segmenter, cases)
    assert [row["case"] for row in table(tmp_path)] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["organ_dice.csv"]


def test_a_run_without_any_organ_has_no_means(tmp_path):
    engine = run(tmp_path, lambda *_: blocks(_6=9), {"bare": (blocks(_16=9), np.zeros((10, 10, 3), np.int16))})
    assert engine.state.metrics == {}
    assert set(table(tmp_path)[0].values()) == {"bare", ""}


def test_a_single_slice_is_a_volume(tmp_path):
    label_map = blocks(_3=12)[..., :1]
    engine = run(tmp_path, lambda *_: label_map, {"slice": (label_map, np.zeros((10, 10, 1), np.int16))})
    assert engine.state.metrics["dice_left_kidney"] == 1


# ------------------------------------------------------------------------------------------------- two processes

CASES = {
    "a": (blocks(_6=40, _1=10), np.zeros((10, 10, 3), np.int16)),
    "b, with a comma": (blocks(_6=40), np.ones((10, 10, 3), np.int16)),
    "c": (blocks(_16=40), np.zeros((10, 10, 3), np.int16)),
}


def two_organs(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return blocks(_6=20) if hu.any() else blocks(_6=40, _1=30)


def of_one_process(rank: int, folder: Path, shares: tuple[list[str], list[str]]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    engine = run(folder / f"of {rank}", two_organs, {case: CASES[case] for case in shares[rank]})
    torch.save(engine.state.metrics, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [(["c", "a"], ["b, with a comma"]), (["b, with a comma"], ["c", "a"])])
def test_two_processes_leave_the_table_of_one(tmp_path, shares):
    torch.multiprocessing.start_processes(of_one_process, (tmp_path, shares), nprocs=2, start_method="fork")
    alone = run(tmp_path / "alone", two_organs, CASES)
    assert [row["case"] for row in table(tmp_path / "of 0")] == list(CASES)
    assert (tmp_path / "of 0" / "organ_dice.csv").read_text() == (tmp_path / "alone" / "organ_dice.csv").read_text()
    assert not (tmp_path / "of 1").exists()
    for rank in (0, 1):  # organs that only the other process had, too
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone.state.metrics)
