"""Which volumes belong to a data set, and how their cached slices reach a network."""

from __future__ import annotations

import itertools
import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .dicom.slices import SUFFIX as DICOM
from .dicom.slices import dicom_files

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd", DICOM)

FIRST_MRI_ID = 500
"""AMOS22 numbers its CT cases below this and its MRI cases from it on."""

# fmt: off
AMOS_TEST_IDS = (
    8, 18, 29, 34, 41, 56, 63, 73, 87, 106, 112, 120, 128, 136, 144, 155, 167, 176, 191, 200, 203, 206, 208, 218, 223,
    233, 244, 250, 257, 278, 283, 286, 289, 292, 304, 309, 311, 316, 323, 326, 333, 339, 344, 352, 357, 364, 368, 373,
    385, 399,
)
# fmt: on
"""The 50 of AMOS22's 100 validation CTs that make the test set: every second one in the order of the ids. (The paper
tests on 50 of the 100 and does not say which.)"""


def case_list(dataset_dir: str | PathLike, split: str) -> list[dict[str, str]]:
    """List the pairs of label map and CT of a data set.

    Three layouts are known:

    - AMOS22: what `dataset.json` lists under "training" and "validation", or without it what lies in `imagesTr/`,
      `labelsTr/` and `imagesVa/`, `labelsVa/`. "train" is all training CTs, "test" the validation CTs of
      `AMOS_TEST_IDS`; a validation set that lacks one of those is used whole.
    - A folder of pairs: `images/` and `labels/` with equal file names. Both splits are all of it.
    - MONAI Label's: CTs, and in `labels/final/` the label maps of those that have one. Both splits are these.

    MRI cases (AMOS ids from 500 on) are left out. A volume is a file of one of `SUFFIXES` (a DICOM SEG is .dcm), or a
    folder with the DICOM files of one series.

    Args:
        dataset_dir: folder of the data set.
        split: "train" or "test".

    Returns:
        `{"image": label map, "ct": CT, "case": name}` for each case, sorted by name; the first two are paths.

    Raises:
        FileNotFoundError: no such folder, no such layout, or a file without its partner.
        ValueError: an unknown split, a case that is there twice, or a data set that holds MRI cases only.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is "{split}", but must be "train" or "test"')
    root = Path(dataset_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"no data set folder {root}: check the path (dataset_dir)")

    suffix = "Tr" if split == "train" else "Va"
    listed = _listed(root, "training" if split == "train" else "validation")
    if listed is not None:
        cases = listed
    elif (root / "imagesTr").is_dir() or (root / "imagesVa").is_dir():
        cases = _paired(root / f"images{suffix}", root / f"labels{suffix}")
    elif (root / "images").is_dir():
        return _only_ct(_paired(root / "images", root / "labels"), root)
    elif (root / "labels" / "final").is_dir():
        return _only_ct(_paired(root, root / "labels" / "final", unlabelled=True), root)
    else:
        raise FileNotFoundError(
            f"no data set in {root}: it needs imagesTr/ and labelsTr/ (AMOS22's layout), images/ and labels/, or "
            "labels/final/ beside the CTs (MONAI Label's)"
        )

    cases = _only_ct(cases, root)
    return cases if split == "train" else _test_cases(cases)


def mask_list(folder: str | PathLike) -> list[dict[str, str]]:
    """List the label maps in a folder, volumes as in `case_list`: `{"image": path, "case": name}`, sorted by name.

    Raises:
        FileNotFoundError: no such folder, or no volume in it.
        ValueError: a case that is there twice, in two formats.
    """
    return [{"image": str(path), "case": case} for case, path in _volumes(Path(folder)).items()]


def _case_name(path: Path) -> str:
    """File name without the suffix of its format; a folder's name as it is."""
    return next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.lower().endswith(suffix)), path.name)


def _volumes(folder: Path) -> dict[str, Path]:
    """Case name -> volume file, or folder of DICOM files, in a folder, sorted by name."""
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: name the folder that it lies in")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: check the path")
    volumes: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not dicom_files(path):
            deeper = next((child for child in sorted(path.iterdir()) if child.is_dir() and dicom_files(child)), None)
            if deeper is not None:
                logger.warning("%s is left out: a DICOM series must lie in a folder of %s itself", deeper, folder)
        elif path.is_dir() or path.name.lower().endswith(SUFFIXES):
            other = volumes.setdefault(_case_name(path), path)
            if other != path:
                raise ValueError(f"{other} and {path.name} are the same case: keep one of them")
    if not volumes and (folder / "dataset.json").is_file():
        raise FileNotFoundError(f"{folder} is a data set: name the folder of its label maps, {folder / 'labelsVa'} say")
    if not volumes:
        raise FileNotFoundError(
            f"no volume in {folder}: expected files that end in {', '.join(SUFFIXES)}, or folders of DICOM files"
        )
    return dict(sorted(volumes.items()))


def _paired(ct_dir: Path, label_dir: Path, unlabelled: bool = False) -> list[dict[str, str]]:
    """Cases of a folder of CTs and a folder of label maps with equal file names (the formats may differ).

    With `unlabelled` a CT may lack its label map; it is left out.
    """
    cts, labels = _volumes(ct_dir), _volumes(label_dir)
    if unlabelled:
        cts = {case: ct for case, ct in cts.items() if case in labels}
    for there, missing, folder in ((cts, labels, label_dir), (labels, cts, ct_dir)):
        alone = sorted(there.keys() - missing.keys())
        if alone:
            raise FileNotFoundError(
                f"{len(alone)} of {len(there)} files without partner in {folder}, the first is {there[alone[0]]}: "
                "add the partner or take the file away"
            )
    return [{"image": str(labels[case]), "ct": str(ct), "case": case} for case, ct in cts.items()]


def _listed(root: Path, section: str) -> list[dict[str, str]] | None:
    """Cases that dataset.json lists in a section, or None where there is no such file or section."""
    index = root / "dataset.json"
    if not index.is_file():
        return None
    try:
        entries = json.loads(index.read_text(encoding="utf-8")).get(section)
        if entries is None:
            return None
        pairs = [(root / entry["label"], root / entry["image"]) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{index} is no AMOS22 list of {{"image": …, "label": …}} pairs: mend or remove it') from error
    if not pairs:
        raise FileNotFoundError(f'{index} lists no case under "{section}": fill the list or remove the file')
    needed = [pair for pair in pairs if (_amos_id(_case_name(pair[1])) or 0) < FIRST_MRI_ID]
    missing = [path for pair in needed for path in pair if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {2 * len(needed)} files listed in {index} are missing, the first is {missing[0]}: "
            "complete the download or mend the list"
        )
    cases = [{"image": str(label), "ct": str(ct), "case": _case_name(ct)} for label, ct in pairs]
    return sorted(cases, key=lambda case: case["case"])


def _amos_id(case: str) -> int | None:
    """Number of an AMOS22 case, None for any other name."""
    match = re.fullmatch(r"amos_(\d+)", case)
    return int(match[1]) if match else None


def _only_ct(cases: list[dict[str, str]], root: Path) -> list[dict[str, str]]:
    """Leave out what is MRI by its AMOS22 number."""
    kept = [case for case in cases if (_amos_id(case["case"]) or 0) < FIRST_MRI_ID]
    if not kept:
        raise ValueError(
            f"{root} holds MRI cases only (AMOS ids from {FIRST_MRI_ID} on): the models make CT, give a data set of CTs"
        )
    if len(kept) < len(cases):
        logger.info("%s: left out %d MRI cases, kept %d CT cases", root, len(cases) - len(kept), len(kept))
    return kept


def _test_cases(cases: list[dict[str, str]]) -> list[dict[str, str]]:
    """The fixed test cases where all of them are there, or else all cases."""
    test = [case for case in cases if _amos_id(case["case"]) in AMOS_TEST_IDS]
    if len(test) == len(AMOS_TEST_IDS):
        return test
    logger.warning("%d of the %d fixed test cases are there: using all %d", len(test), len(AMOS_TEST_IDS), len(cases))
    return cases


class SliceDataset(Dataset):
    """All axial slices of cached volumes, one after the other.

    An item is `{"image": label map, uint8 (1, H, W), ids 0…16; "ct": float32 (1, H, W), [0, 1] over the window}`.

    A volume is mapped anew for every slice. That costs some 60 µs, and in return nothing stays open: a data set may
    have more volumes than a process may open files, and travels to the workers of a DataLoader as a list of paths.

    Args:
        volumes: files that `cache.build_cache` returned.
    """

    def __init__(self, volumes: Sequence[str | PathLike]) -> None:
        self.volumes = [Path(volume) for volume in volumes]
        depths = (len(np.load(volume, mmap_mode="r")) for volume in self.volumes)
        self._ends = list(itertools.accumulate(depths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        volume = bisect_right(self._ends, index)
        # Counted from the volume's end, where the negative index needs no start.
        ct, label = np.load(self.volumes[volume], mmap_mode="r")[index - self._ends[volume]]
        return {
            "image": torch.from_numpy(np.array(label[None])),
            "ct": torch.from_numpy(np.divide(ct[None], 255, dtype=np.float32)),
        }


class ShuffledStream(Sampler[int]):
    """Endless stream of shuffled indices that resumes anywhere and splits between processes.

    The stream is permutation after permutation of `range(length)`, each drawn from (seed, pass). Rank r of R takes the
    elements r, r + R, r + 2R, …, so the k-th batches of b of all ranks make up the k-th batch of b·R of one process.
    Every iterator begins at `start`; a stream has no length, so an engine needs an epoch length of its own.

    Args:
        length: number of items in the data set.
        seed: of the permutations.
        rank, world_size: which part of the stream this process takes, and of how many.
        start: how many indices each rank has consumed already (iterations × batch size).

    Raises:
        ValueError: an empty data set, a rank outside the world, a negative start.
    """

    def __init__(self, length: int, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        if length < 1:
            raise ValueError(f"a stream over {length} items has nothing to give: check the data set")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}: ranks count from 0")
        if start < 0:
            raise ValueError(f"start is {start}, but a stream starts at 0 or later")
        self.length, self.seed, self.rank, self.world_size, self.start = length, seed, rank, world_size, start

    def __iter__(self) -> Iterator[int]:
        drawn = -1
        for position in itertools.count(self.start * self.world_size + self.rank, self.world_size):
            turn, place = divmod(position, self.length)
            if turn != drawn:
                order, drawn = np.random.default_rng((self.seed, turn)).permutation(self.length), turn
            yield int(order[place])
