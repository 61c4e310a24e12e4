"""How fast training slices come: the memory-mapped cache beside .nii.gz files through MONAI's transforms.

Both feed batches of 16 at 256×256 in one process, in shuffled order, from the same phantom in a temporary folder:
512×512 CT slices as a scanner makes them. To MONAI's advantage each slice is a file of its own: reading one slice out
of a compressed volume means decompressing all slices before it.

    python -m benchmarks.loader
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

import nibabel as nib
import torch
from monai.data import Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Resized, ScaleIntensityRanged
from torch.utils.data import DataLoader

from common.cache import build_cache
from common.data import ShuffledStream, SliceDataset
from common.phantom import phantom
from common.transforms import HU_WINDOW

VOLUMES, SHAPE = 2, (512, 512, 32)
SIZE, BATCH = 256, 16
SECONDS = 5.0


def write_volumes(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Write the phantoms and return the list of their volumes and the list of their slices, one file each."""
    volumes, slices = [], []
    for seed in range(VOLUMES):
        case = phantom(SHAPE, seed=seed)
        volume = {"case": f"phantom_{seed}"}
        for key, voxels in (("image", case.label), ("ct", case.hu)):
            volume[key] = str(folder / f"{seed}_{key}.nii.gz")
            nib.save(nib.Nifti1Image(voxels, case.affine), volume[key])
        volumes.append(volume)
        for k in range(SHAPE[2]):
            files = {}
            for key, voxels in (("image", case.label), ("ct", case.hu)):
                files[key] = str(folder / f"{seed}_{k:03d}_{key}.nii.gz")
                nib.save(nib.Nifti1Image(voxels[:, :, k], case.affine), files[key])
            slices.append(files)
    return volumes, slices


def slices_per_second(dataset: torch.utils.data.Dataset) -> float:
    """Slices per second over `SECONDS`, after one batch that doesn't count."""
    loader = DataLoader(dataset, batch_size=BATCH, sampler=ShuffledStream(len(dataset)), num_workers=0)
    batches = iter(loader)
    next(batches)
    begin = time.perf_counter()
    for count in itertools.count(1):
        next(batches)
        elapsed = time.perf_counter() - begin
        if elapsed > SECONDS:
            return count * BATCH / elapsed


def main() -> None:
    torch.set_num_threads(1)
    keys = ("image", "ct")
    transforms = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            ScaleIntensityRanged("ct", *HU_WINDOW, 0.0, 1.0, clip=True),
            Resized(keys, (SIZE, SIZE), mode=("nearest-exact", "bilinear"), anti_aliasing=(False, True)),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        volumes, slices = write_volumes(Path(folder))
        begin = time.perf_counter()
        cache = build_cache(volumes, Path(folder) / "cache", SIZE)
        building = (time.perf_counter() - begin) / VOLUMES
        rows = (
            ("SliceDataset (memory map)", slices_per_second(SliceDataset(cache))),
            (".nii.gz slices, MONAI transforms", slices_per_second(Dataset(slices, transforms))),
        )
    print(f"\nOne process, {torch.get_num_threads()} thread, batches of {BATCH} at {SIZE}×{SIZE}:\n")
    print("| source | slices/s |\n|---|---|")
    for name, rate in rows:
        print(f"| {name} | {rate:,.0f} |")
    print(f"\nBuilding the cache, once: {building:.1f} s per volume of {'×'.join(map(str, SHAPE))}.")


if __name__ == "__main__":
    main()
