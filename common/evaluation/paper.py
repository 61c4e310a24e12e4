"""The figures of Zhuang et al. 2023, *Semantic Image Synthesis for Abdominal CT* (arXiv 2312.06453), as printed."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """A measurement in the paper's tables.

    Attributes:
        heading: the paper's abbreviation, with an arrow to where better is (of organs, up).
        metric: its name in a run's `metrics.json`.
        factor: from there to the paper's unit.
        decimals: how many the paper prints.
    """

    heading: str
    metric: str
    factor: int
    decimals: int


COLUMNS = (
    Column("FID↓", "FID", 1, 2),
    Column("PSNR↑", "PSNR", 1, 2),
    Column("SSIM↑", "SSIM", 1, 3),
    Column("Sple.", "dice_spleen", 100, 1),
    Column("Liv.", "dice_liver", 100, 1),
    Column("Kid_l", "dice_left_kidney", 100, 1),
    Column("Kid_r", "dice_right_kidney", 100, 1),
    Column("Panc.", "dice_pancreas", 100, 1),
    Column("Stom.", "dice_stomach", 100, 1),
    Column("Aorta", "dice_aorta", 100, 1),
    Column("Gall.", "dice_gallbladder", 100, 1),
    Column("Espo.", "dice_esophagus", 100, 1),
    Column("Adr_r", "dice_right_adrenal_gland", 100, 1),
    Column("Adr_l", "dice_left_adrenal_gland", 100, 1),
    Column("Duod.", "dice_duodenum", 100, 1),
    Column("Cava", "dice_postcava", 100, 1),
    Column("Bladder", "dice_bladder", 100, 1),
)
"""What Tables 1 and 2 have, in their order; Dice is in percent."""

METHODS = {
    "abdominal_ct_pix2pix": "Pix2Pix",
    "abdominal_ct_oasis": "OASIS",
    "abdominal_ct_spade": "SPADE",
    "abdominal_ct_sdm": "SDM",
    "abdominal_ct_conditional_ddpm": "Conditional DDPM",
    "abdominal_ct_mask_guided_ddpm": "Mask-guided DDPM",
    "abdominal_ct_edge_guided_ddpm": "Edge-guided DDPM",
}
"""The paper's name of what each bundle is, in the order of Table 2."""

IMAGE_SIZE, TEST_CASES, TEST_SLICES = 256, 50, 6559
"""What the paper tests on: pixels along a side, volumes, axial slices."""


def _rows(text: str) -> dict[str, tuple[float, ...]]:
    cells = [line.split("|") for line in text.strip().splitlines()]
    return {method.strip(): tuple(float(value) for value in values.split()) for method, values in cells}


# fmt: off
TABLE_1 = {
    50_000: _rows("""
        Conditional DDPM | 30.57 14.17 0.589 77.6 75.0 91.1 87.8 57.3 60.6 90.4 30.4 66.4 54.1 53.8 61.7 77.7 64.4
        Mask-guided DDPM | 19.06 14.58 0.603 83.9 84.8 90.3 90.2 62.1 73.4 89.2 40.0 73.2 53.2 56.6 54.1 75.2 57.0
        Edge-guided DDPM | 35.97 13.43 0.576 56.4 56.7 86.6 82.5 51.2 52.2 86.8 10.6 58.3 52.6 58.2 53.6 73.7 61.2
    """),
    100_000: _rows("""
        Conditional DDPM | 11.27 16.07 0.643 93.8 95.3 93.9 92.5 73.8 85.0 91.1 64.5 76.6 66.5 62.8 65.1 81.0 70.8
        Mask-guided DDPM | 10.89 16.10 0.642 93.8 95.8 93.9 93.1 75.3 86.9 91.5 63.9 79.6 65.9 68.5 68.0 82.5 71.6
        Edge-guided DDPM | 10.32 16.14 0.644 93.6 95.1 94.1 93.4 73.8 85.1 90.8 65.0 77.3 64.9 64.1 64.5 80.6 71.0
    """),
    150_000: _rows("""
        Conditional DDPM | 10.56 16.26 0.646 94.0 95.6 93.9 91.2 76.3 86.4 90.8 64.0 78.2 67.2 66.0 65.6 80.9 70.0
        Mask-guided DDPM | 10.58 16.28 0.646 93.9 95.6 93.9 90.9 75.6 87.1 91.3 66.0 79.5 67.2 65.1 65.6 81.3 70.7
        Edge-guided DDPM | 10.64 16.20 0.646 93.5 95.4 93.8 92.8 75.0 86.7 90.3 64.5 78.1 65.4 64.1 65.3 79.6 69.3
    """),
}
# fmt: on
"""Table 1: values of `COLUMNS` by iterations and method."""

TABLE_2 = _rows("""
    Pix2Pix          | 78.86 15.04 0.561 79.3 94.7 94.5 92.0 68.8 86.5 80.8 53.5 67.9 58.4 61.8 61.0 75.9 56.0
    OASIS            | 43.57 14.75 0.560 91.8 93.5 92.0 88.1 73.4 88.9 88.6 78.9 80.1 69.0 75.6 71.7 86.3 74.5
    SPADE            | 60.22 15.27 0.594 92.6 95.4 92.7 91.2 66.6 86.5 86.2 44.8 65.6 61.7 59.3 59.5 79.1 63.9
    SDM              | 12.68 15.12 0.607 91.9 94.3 93.5 93.2 79.3 87.8 89.0 71.9 77.5 69.7 69.6 66.7 81.5 66.2
    Conditional DDPM | 10.56 16.26 0.646 94.0 95.6 93.9 91.2 76.3 86.4 90.8 64.0 78.2 67.2 66.0 65.6 80.9 70.0
    Mask-guided DDPM | 10.58 16.28 0.646 93.9 95.6 93.9 90.9 75.6 87.1 91.3 66.0 79.5 67.2 65.1 65.6 81.3 70.7
    Edge-guided DDPM | 10.64 16.20 0.646 93.9 95.4 93.8 92.8 75.0 86.7 90.3 64.5 78.1 65.4 64.1 65.3 79.6 69.3
""")
"""Table 2: values of `COLUMNS` by method. (Its spleen of the edge-guided DDPM isn't Table 1's.)"""

TABLE_2_ITERATIONS = {"SDM": 150_000} | dict.fromkeys(TABLE_1[150_000], 150_000)
"""How long the methods of Table 2 were trained. The GANs have epochs instead, 300, of a batch size that isn't stated;
SDM was trained as the paper's own models."""
