"""The 17 classes of a label map. Everything that is known about a class is written here and nowhere else."""

from __future__ import annotations

from typing import NamedTuple


class LabelClass(NamedTuple):
    """One class of the label map.

    Attributes:
        id: value in the label map.
        name: AMOS22's name.
        color: RGB, 0...255, for pictures.
        hu: typical mean attenuation in the portal venous phase and its spread between patients, both in HU;
            None for background and body, which are mixtures.
        totalsegmentator_v1: id in TotalSegmentator v1's 104 classes, None where it has no such class.
        totalsegmentator_v2: id in TotalSegmentator v2's 117 classes (its prostate does not cover the uterus).
    """

    id: int
    name: str
    color: tuple[int, int, int]
    hu: tuple[float, float] | None = None
    totalsegmentator_v1: int | None = None
    totalsegmentator_v2: int | None = None


CLASSES = (
    LabelClass(0, "background", (0, 0, 0)),
    LabelClass(1, "spleen", (157, 108, 162), (115, 15), 1, 1),
    LabelClass(2, "right kidney", (185, 102, 83), (165, 25), 2, 2),
    LabelClass(3, "left kidney", (120, 62, 48), (165, 25), 3, 3),
    LabelClass(4, "gallbladder", (139, 150, 60), (12, 6), 4, 4),
    LabelClass(5, "esophagus", (211, 171, 143), (45, 12), 42, 15),
    LabelClass(6, "liver", (221, 130, 101), (105, 15), 5, 5),
    LabelClass(7, "stomach", (216, 132, 182), (40, 20), 6, 6),
    LabelClass(8, "aorta", (224, 60, 49), (155, 25), 7, 52),
    LabelClass(9, "postcava", (60, 110, 205), (135, 20), 8, 63),
    LabelClass(10, "pancreas", (249, 180, 111), (90, 15), 10, 7),
    LabelClass(11, "right adrenal gland", (244, 214, 49), (65, 12), 11, 8),
    LabelClass(12, "left adrenal gland", (200, 190, 20), (65, 12), 12, 9),
    LabelClass(13, "duodenum", (255, 253, 160), (50, 15), 56, 19),
    LabelClass(14, "bladder", (110, 184, 209), (8, 6), 104, 21),
    LabelClass(15, "prostate/uterus", (230, 158, 200), (60, 15), None, 22),
    LabelClass(16, "body", (98, 98, 98)),
)
"""All classes; a class stands at the index of its id."""

BACKGROUND = 0
BODY = 16
NUM_CLASSES = len(CLASSES)
ORGANS = CLASSES[1:BODY]
"""The 15 organs of AMOS22."""

OTHER_NAMES = {
    "gall bladder": "gallbladder",
    "oesophagus": "esophagus",
    "inferior vena cava": "postcava",
    "urinary bladder": "bladder",
    "prostate": "prostate/uterus",
    "uterus": "prostate/uterus",
}
"""What others, such as TotalSegmentator, call classes, where more than case and the order of words differs."""
