from __future__ import annotations

import itertools
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from common.data import AMOS_TEST_IDS, ShuffledStream, SliceDataset, case_list, mask_list


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def amos22(root: Path, training: list[int], validation: list[int], index: bool = True) -> Path:
    """An AMOS22 folder of empty files."""
    sections = {}
    for section, suffix, ids in (("training", "Tr", training), ("validation", "Va", validation)):
        names = [f"amos_{number:04d}.nii.gz" for number in ids]
        touch(*(root / f"{kind}{suffix}" / name for kind in ("images", "labels") for name in names))
        sections[section] = [{"image": f"./images{suffix}/{n}", "label": f"./labels{suffix}/{n}"} for n in names]
    if index:
        (root / "dataset.json").write_text(json.dumps(sections))
    return root


def names(cases: list[dict[str, str]]) -> list[str]:
    return [case["case"] for case in cases]


@pytest.mark.parametrize("index", [True, False])
def test_amos22_training_is_sorted_ct_and_mri_is_counted(tmp_path, caplog, index):
    root = amos22(tmp_path, training=[507, 6, 1, 600, 499], validation=[8, 540], index=index)

    with caplog.at_level(logging.INFO, logger="common.data"):
        cases = case_list(root, "train")

    assert cases == [
        {
            "image": str(root / "labelsTr" / f"{name}.nii.gz"),
            "ct": str(root / "imagesTr" / f"{name}.nii.gz"),
            "case": name,
        }
        for name in ("amos_0001", "amos_0006", "amos_0499")
    ]
    assert "left out 2 MRI cases" in caplog.text
    assert names(case_list(root, "test")) == ["amos_0008"]


def test_the_test_split_is_the_listed_half_of_the_validation_cts(tmp_path):
    others = [number for number in range(1, 410) if number not in AMOS_TEST_IDS][:50]
    root = amos22(tmp_path, training=[500, 2], validation=sorted([*AMOS_TEST_IDS, *others, 510, 520]))

    assert names(case_list(root, "test")) == [f"amos_{number:04d}" for number in AMOS_TEST_IDS]


def test_the_list_has_50_cts_in_the_order_of_ids():
    assert len(AMOS_TEST_IDS) == 50
    assert list(AMOS_TEST_IDS) == sorted(set(AMOS_TEST_IDS))
    assert max(AMOS_TEST_IDS) < 500


def test_a_smaller_validation_set_is_used_whole(tmp_path):
    ids = [3, *AMOS_TEST_IDS[:-1]]
    assert len(case_list(amos22(tmp_path, training=[1], validation=ids), "test")) == 50


def test_dataset_json_decides_over_what_lies_around(tmp_path):
    root = amos22(tmp_path, training=[1], validation=[8])
    touch(root / "imagesTr" / "amos_0002.nii.gz")
    assert names(case_list(root, "train")) == ["amos_0001"]


def test_names_without_amos_number_count_as_ct(tmp_path):
    touch(tmp_path / "imagesTr" / "ts_0600.nii.gz", tmp_path / "labelsTr" / "ts_0600.nii.gz")
    assert names(case_list(tmp_path, "train")) == ["ts_0600"]


def test_a_folder_of_pairs_is_both_splits_in_any_format(tmp_path):
    for ct, label in (("b.nii", "b.nii"), ("a.nii.gz", "a.nrrd"), ("c.x.mha", "c.x.mha")):
        touch(tmp_path / "images" / ct, tmp_path / "labels" / label)
    touch(tmp_path / "images" / "readme.txt", tmp_path / "images" / "._a.nii.gz")

    train = case_list(tmp_path, "train")

    assert names(train) == ["a", "b", "c.x"]
    assert train[0] == {
        "image": str(tmp_path / "labels" / "a.nrrd"),
        "ct": str(tmp_path / "images" / "a.nii.gz"),
        "case": "a",
    }
    assert case_list(tmp_path, "test") == train


def test_studies_of_monai_label_are_what_has_a_final_label(tmp_path):
    touch(*(tmp_path / f"{case}.nii.gz" for case in ("c", "a", "not_yet")), tmp_path / "datastore_v2.json")
    touch(tmp_path / "labels" / "original" / "not_yet.nii.gz")
    touch(*(tmp_path / "labels" / "final" / name for name in ("a.nrrd", "c.nii.gz")))

    train = case_list(tmp_path, "train")

    assert train == [
        {"image": str(tmp_path / "labels" / "final" / label), "ct": str(tmp_path / f"{case}.nii.gz"), "case": case}
        for case, label in (("a", "a.nrrd"), ("c", "c.nii.gz"))
    ]
    assert case_list(tmp_path, "test") == train

    touch(tmp_path / "labels" / "final" / "lost.nii.gz")
    with pytest.raises(FileNotFoundError, match="1 of 3 files without partner") as error:
        case_list(tmp_path, "train")
    assert str(tmp_path / "labels" / "final" / "lost.nii.gz") in one_line(error)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_data_set_of_mri_is_refused(tmp_path):
    root = amos22(tmp_path, training=[507, 508], validation=[8])
    with pytest.raises(ValueError, match=r"MRI cases only.*500") as error:
        case_list(root, "train")
    assert str(root) in one_line(error)


@pytest.mark.parametrize("widow, missing", [("images/b.nii.gz", "labels"), ("labels/b.nii.gz", "images")])
def test_a_missing_partner_is_named(tmp_path, widow, missing):
    touch(tmp_path / "images" / "a.nii.gz", tmp_path / "labels" / "a.nii.gz", tmp_path / widow)
    with pytest.raises(FileNotFoundError, match="1 of 2 files without partner") as error:
        case_list(tmp_path, "train")
    assert str(tmp_path / widow) in one_line(error) and str(tmp_path / missing) in str(error.value)


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    root = amos22(tmp_path, training=[1, 4], validation=[8])
    (root / "labelsTr" / "amos_0004.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 files") as error:
        case_list(root, "train")
    assert str(root / "labelsTr" / "amos_0004.nii.gz") in one_line(error)


@pytest.mark.parametrize("content", ["{", "[]", '{"training": ["./imagesTr/amos_0001.nii.gz"]}', '{"training": [{}]}'])
def test_a_broken_dataset_json_is_named(tmp_path, content):
    root = amos22(tmp_path, training=[1], validation=[8])
    (root / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset\.json") as error:
        case_list(root, "train")
    one_line(error)


def test_a_dataset_json_of_another_make_leaves_the_folders(tmp_path):
    root = amos22(tmp_path, training=[1], validation=[8])
    (root / "dataset.json").write_text('{"numTraining": 1, "channel_names": {"0": "CT"}}')
    assert names(case_list(root, "train")) == ["amos_0001"]


def test_missing_and_empty_folders_are_named(tmp_path):
    for folder, expected in ((tmp_path / "nowhere", "no data set folder"), (tmp_path, "no data set in")):
        with pytest.raises(FileNotFoundError, match=expected) as error:
            case_list(folder, "train")
        assert str(folder) in one_line(error)

    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match="no volume in") as error:
        case_list(tmp_path, "train")
    assert str(tmp_path / "images") in one_line(error)

    with pytest.raises(ValueError, match=r'"validation".*"train" or "test"') as error:
        case_list(tmp_path, "validation")
    one_line(error)


def test_a_case_in_two_formats_is_refused(tmp_path):
    touch(tmp_path / "a.nii", tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="same case") as error:
        mask_list(tmp_path)
    one_line(error)


def test_suffixes_in_capitals_count_too(tmp_path):
    touch(tmp_path / "a.NII.GZ", tmp_path / "b.Mha")
    assert [entry["case"] for entry in mask_list(tmp_path)] == ["a", "b"]


def test_a_series_that_lies_too_deep_is_named(tmp_path, caplog):
    touch(tmp_path / "a.nii.gz")
    series = tmp_path / "patient" / "study"
    series.mkdir(parents=True)
    (series / "1").write_bytes(bytes(128) + b"DICM")
    assert [entry["case"] for entry in mask_list(tmp_path)] == ["a"]
    assert caplog.messages == [f"{series} is left out: a DICOM series must lie in a folder of {tmp_path} itself"]


def test_mask_list(tmp_path):
    touch(tmp_path / "b.nrrd", tmp_path / "a.b.nii.gz", tmp_path / "notes.json")
    assert mask_list(tmp_path) == [
        {"image": str(tmp_path / "a.b.nii.gz"), "case": "a.b"},
        {"image": str(tmp_path / "b.nrrd"), "case": "b"},
    ]
    with pytest.raises(FileNotFoundError, match="no folder") as error:
        mask_list(tmp_path / "nowhere")
    one_line(error)


@pytest.fixture
def volumes(tmp_path):
    """Two cached volumes of 3 and 2 slices, 4×4; the values of slice k of all 5 follow from k."""
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    planes = np.stack([np.stack([np.full((4, 4), 50 * k), np.full((4, 4), k)]) for k in range(5)]).astype(np.uint8)
    np.save(paths[0], planes[:3])
    np.save(paths[1], planes[3:])
    return paths


def check_item(item: dict[str, torch.Tensor], k: int) -> None:
    assert item["image"].dtype == torch.uint8 and item["ct"].dtype == torch.float32
    assert torch.equal(item["image"], torch.full((1, 4, 4), k, dtype=torch.uint8))
    assert torch.equal(item["ct"], torch.full((1, 4, 4), 50 * k / 255))


def test_slices_of_all_volumes_in_a_row(volumes):
    dataset = SliceDataset(volumes)
    assert len(dataset) == 5
    for k, item in enumerate(dataset):  # ends by IndexError
        check_item(item, k)
    assert k == 4
    check_item(dataset[-1], 4)
    with pytest.raises(IndexError):
        dataset[5]


def test_slices_can_be_written_to_without_touching_the_cache(volumes):
    dataset = SliceDataset(volumes)
    item = dataset[1]
    item["image"].zero_()
    item["ct"].zero_()
    check_item(dataset[1], 1)


def test_a_dataset_travels_light_and_works_in_workers(volumes):
    dataset = SliceDataset(volumes)
    for item in dataset:
        del item
    assert len(pickle.dumps(dataset)) < 1000
    loader = DataLoader(dataset, batch_size=1, num_workers=2, multiprocessing_context="spawn")
    for k, batch in enumerate(loader):
        check_item({key: value[0] for key, value in batch.items()}, k)
    assert k == 4


def take(stream: ShuffledStream, n: int) -> list[int]:
    return list(itertools.islice(stream, n))


def test_every_pass_of_a_stream_is_another_permutation():
    passes = np.reshape(take(ShuffledStream(50, seed=3), 200), (4, 50))
    for order in passes:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in passes}) == 4


def test_a_stream_depends_on_its_seed_alone():
    first = take(ShuffledStream(50, seed=3), 120)
    assert take(ShuffledStream(50, seed=3), 120) == first
    assert take(ShuffledStream(50, seed=4), 120) != first
    # neighbouring seeds don't share passes
    assert take(ShuffledStream(50, seed=4), 50) != first[50:100]
    stream = ShuffledStream(50, seed=3)
    assert take(stream, 120) == take(stream, 120) == first


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 23])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 3)])
def test_a_stream_resumes_where_it_stopped(start, rank, world_size):
    whole = take(ShuffledStream(7, 1, rank, world_size), start + 20)
    assert take(ShuffledStream(7, 1, rank, world_size, start=start), 20) == whole[start:]


@pytest.mark.parametrize("length", [2, 10, 101])  # fewer items than a batch, and passes that end inside one
def test_batches_of_the_ranks_make_up_the_batch_of_one_process(length):
    world_size, batch = 4, 3

    def batches(stream: ShuffledStream, size: int) -> list[list[int]]:
        return list(itertools.islice(BatchSampler(stream, size, drop_last=True), 30))

    alone = batches(ShuffledStream(length, seed=5), batch * world_size)
    ranks = [batches(ShuffledStream(length, 5, rank, world_size), batch) for rank in range(world_size)]
    for k in range(30):
        assert sorted(index for rank in ranks for index in rank[k]) == sorted(alone[k])


def test_a_stream_feeds_a_loader(volumes):
    loader = DataLoader(SliceDataset(volumes), batch_size=5, sampler=ShuffledStream(5, seed=0))
    for batch in itertools.islice(loader, 3):
        assert sorted(batch["image"][:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("arguments", [(0,), (5, 0, 2, 2), (5, 0, -1, 2), (5, 0, 0, 1, -1)])
def test_impossible_streams_are_refused(arguments):
    with pytest.raises(ValueError) as error:
        ShuffledStream(*arguments)
    one_line(error)
