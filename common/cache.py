"""Volumes on disk -> the slices a network trains on, computed once and memory-mapped afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from .body import with_body
from .files import replacing
from .geometry import AxialGrid
from .labels import BODY
from .loading import fill, load_volume
from .transforms import HU_WINDOW, check_label_map, check_same_geometry, window

FORMAT = 1
"""Version of what a cache file holds; raise it whenever the same source would give other bytes."""


def build_cache(cases: Iterable[Mapping[str, str]], cache_dir: str | PathLike, size: int = 256) -> list[Path]:
    """Preprocess every case that isn't in the cache yet and return one file per case, in the order of the cases.

    A file is a NumPy array (D, 2, size, size) uint8: all axial slices on the network grid; plane 0 the CT as
    round(255·window(HU)), plane 1 the label map with the body class (from the CT where the label map has none). The CT
    fits into uint8 because the loss can't see more: its discretised Gaussian has half-bins of 1/255 on [-1, 1]
    (Nichol & Dhariwal 2021, decoder likelihood), that is 256 grey values, 1.6 HU each.

    An interrupted build goes on where it stopped. A source that changed (path, size or time of modification) gets a new
    file. Several processes may build the same cache at once: they share the work, and each volume is preprocessed once.

    Args:
        cases: what `data.case_list` returns.
        cache_dir: folder of the cache; made when missing.
        size: side of the network grid in pixels.

    Raises:
        FileNotFoundError: a source is missing; before any work.
        OSError: a source can't be read or the cache can't be written; nothing half-written stays behind.
        ValueError: a cache of other parameters lies in `cache_dir`, or label map and CT don't have the same geometry.
        LabelMapError: a volume is no label map.
    """
    cache_dir = Path(cache_dir)
    targets = {cache_dir / f"{case['case']}-{_source_key(case)}.npy": case for case in cases}
    _claim(cache_dir, {"format": FORMAT, "size": size, "window": list(HU_WINDOW)})

    # First what no other process is at, then wait for what they are at.
    for wait in (False, True):
        missing = [target for target in targets if not target.exists()]
        for target in tqdm(missing, desc="caching", unit="volume", disable=not missing):
            with suppress(Timeout), FileLock(target.with_name(f".{target.stem}.lock"), blocking=wait):
                if not target.exists():
                    slices = _slices(targets[target], size)
                    with replacing(target) as temporary:
                        np.save(temporary, slices)
    return list(targets)


def _source_key(case: Mapping[str, str]) -> str:
    """Short hash that changes when a file of a case is replaced."""
    sources = [Path(case[key]).resolve(strict=True) for key in ("image", "ct")]
    files = [file for path in sources for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _claim(cache_dir: Path, parameters: dict) -> None:
    """Write the parameters into a new cache; refuse one that has others."""
    index = cache_dir / "cache.json"
    if not index.exists():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(cache_dir / ".cache.lock"):
                if not index.exists():
                    with replacing(index) as temporary:
                        temporary.write_text(json.dumps(parameters), encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"cannot write the cache {cache_dir}: {reason}; name another folder with --cache_dir"
            ) from error
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        found = "unreadable parameters"
    if found != parameters:
        raise ValueError(
            f"the cache in {cache_dir} has {found}, not {parameters}: choose another cache_dir or delete this folder"
        )


def _slices(case: Mapping[str, str], size: int) -> np.ndarray:
    """Preprocess one case: (D, 2, size, size) uint8, see `build_cache`."""
    label = load_volume(case["image"])
    ct = load_volume(case["ct"], label)
    label = fill(label, ct)
    ids = torch.from_numpy(check_label_map(label, case["image"]))
    check_same_geometry(label, ct)
    hu, affine = ct.as_tensor(), ct.affine.numpy()
    if not (ids == BODY).any():
        ids = with_body(ids, affine, hu)

    grid = AxialGrid.of(hu.shape, affine, size)
    grey = window(grid.to_slices(hu, label=False)).mul(255).round().to(torch.uint8)
    return torch.stack((grey, grid.to_slices(ids, label=True))).permute(3, 0, 1, 2).contiguous().numpy()
