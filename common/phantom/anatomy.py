"""What the phantom is made of: tissues with their attenuation, and the table of structures.

All coordinates are mm in an average patient: x to the right, y to the front, z upwards, the origin in the middle of the
trunk (L2/L3); the liver's dome lies near z = 185, the symphysis near z = -190. Of two structures the later one wins
where its `over` allows it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..labels import BODY, ORGANS
from .canvas import Blob, Structure, Tube, paired


class Tissue(NamedTuple):
    """One material: its id in the label map, HU (mean, spread between patients) and texture's amplitude in HU."""

    name: str
    label: int
    hu: tuple[float, float]
    texture: float = 5.0


TISSUES = (
    Tissue("air", 0, (-1000, 0), 0),
    *(Tissue(organ.name, organ.id, organ.hu) for organ in ORGANS),
    Tissue("stomach wall", 7, (75, 8)),
    Tissue("stomach gas", 7, (-900, 30), 10),
    Tissue("hepatic vessels", 6, (150, 10)),
    Tissue("bladder wall", 14, (45, 6)),
    Tissue("skin", BODY, (20, 8)),
    Tissue("outer fat", BODY, (-104, 5), 7),
    Tissue("fat", BODY, (-98, 5), 9),
    Tissue("muscle", BODY, (58, 5), 6),
    Tissue("cortical bone", BODY, (560, 80), 60),
    Tissue("spongy bone", BODY, (190, 30), 35),
    Tissue("disc", BODY, (85, 8)),
    Tissue("spinal canal", BODY, (30, 8)),
    Tissue("lung", BODY, (-840, 25), 25),
    Tissue("heart", BODY, (130, 12)),
    Tissue("vein", BODY, (160, 12)),
    Tissue("artery", BODY, (155, 12)),
    Tissue("bowel wall", BODY, (80, 10)),
    Tissue("bowel content", BODY, (25, 12), 10),
    Tissue("feces", BODY, (0, 25), 55),
    Tissue("gas", BODY, (-900, 30), 10),
)
"""All tissues, portal venous phase; a tissue's code is its place, and the organs' codes are their ids."""

CODES = {tissue.name: code for code, tissue in enumerate(TISSUES)}

SOFT = ("fat", "bowel wall", "bowel content", "feces", "gas")
WALL = ("fat", "outer fat", "muscle")
BONE = ("cortical bone", "spongy bone")
CHEST = ("outer fat", "lung", "muscle", "heart")
STOMACH = ("stomach wall", "stomach", "stomach gas")
ABDOMEN = (*SOFT, *STOMACH, "vein", "artery", "liver", "hepatic vessels", "spleen")
MIDDLE = (*ABDOMEN, "duodenum", "pancreas")

# fmt: off
FRAME = (
    Structure("heart", (Blob((-14, 40, 214), (58, 44, 40), (0, -12, 0)),), over=CHEST),
    Structure("muscle", paired(  # psoas
        Tube(((26, -28, 62, 6), (33, -32, 20, 12), (40, -28, -20, 19), (46, -18, -60, 22), (60, 2, -110, 21),
              (78, 34, -165, 18), (82, 36, -215, 17))))),
    Structure("muscle", paired(  # quadratus lumborum
        Tube(((62, -66, 62, 7), (67, -66, 10, 9), (76, -58, -45, 11))))),
    Structure("muscle", paired(  # crura of the diaphragm
        Tube(((13, -20, 150, 5), (13, -16, 90, 6), (10, -14, 30, 5)))),
        over=(*CHEST, "fat"), wander=0),
)
"""Heart and the muscles beside the spine."""

BONES = (
    Structure("cortical bone", paired(Blob((88, -24, -88), (24, 62, 52), (0, 14, -42), 2.2)),  # iliac wing
              carve=paired(Blob((77, -12, -78), (26, 66, 66), (0, 14, -42))),
              over=WALL, blend=2, core=("spongy bone", 1.8)),
    Structure("cortical bone", (  # sacrum and coccyx
        Blob((0, -58, -110), (50, 19, 30), (-25, 0, 0), 2.4), Blob((0, -76, -142), (28, 12, 28), (-10, 0, 0)),
        Tube(((0, -82, -160, 8), (0, -78, -178, 6), (0, -66, -190, 5)))),
        over=(*WALL, *BONE), core=("spongy bone", 2)),
    Structure("cortical bone", paired(  # acetabulum, ischium, pubis
        Blob((82, -10, -150), (22, 30, 34), (0, 0, -20)),
        Tube(((78, -30, -164, 17), (66, -46, -188, 16), (60, -48, -220, 15))),
        Tube(((72, 24, -158, 12), (46, 50, -178, 9), (11, 58, -192, 11)))),
        over=(*WALL, *BONE), core=("spongy bone", 2.5)),
    Structure("muscle", paired(Blob((93, 2, -166), (26, 26, 26))),  # hip joint
              over=(*WALL, *BONE), wander=0, growth=0),
    Structure("cortical bone", paired(  # femur
        Blob((93, 2, -166), (23, 23, 23)),
        Tube(((95, 0, -168, 16), (112, -6, -178, 15), (126, -12, -190, 19), (126, -8, -230, 18)))),
        over=(*WALL, *BONE), core=("spongy bone", 2.5), wander=0, growth=0),
)
"""Hip bones, sacrum and femora."""

COLON = Structure("bowel wall", (
    Tube(((78, 28, -88, 23), (88, 18, -60, 27), (97, 0, -20, 25), (96, -2, 10, 23), (84, 34, 10, 21), (55, 58, -6, 20),
          (15, 64, -22, 19), (-30, 64, -16, 19), (-70, 54, 14, 19), (-100, 14, 62, 20), (-104, -18, 30, 17),
          (-104, -22, -20, 16), (-98, -6, -68, 16), (-70, 22, -98, 16), (-34, 14, -112, 17), (-16, -20, -112, 16),
          (2, -42, -132, 18), (0, -52, -160, 20), (0, -46, -190, 17), (0, -48, -220, 13))),),
    over=SOFT, core=("feces", 2.2), gas="gas", wander=4)
"""From the caecum to the rectum."""

VESSELS = (
    Structure("vein", (  # superior mesenteric, portal and splenic vein
        Tube(((14, 12, -60, 5), (16, 20, -10, 6), (16, 17, 30, 6.5), (18, 13, 58, 7.5), (34, 14, 84, 8),
              (50, 16, 104, 7.5))),
        Tube(((18, 13, 58, 6.5), (-14, 12, 70, 5.5), (-50, -6, 80, 5.5), (-88, -22, 98, 5)))),
        over=SOFT, blend=3, wander=1),
    Structure("vein", paired(  # iliac veins
        Tube(((18, -8, -62, 8), (34, -18, -88, 7.5), (50, -12, -125, 7), (64, 40, -178, 7.5), (68, 48, -220, 7.5)))),
        over=SOFT, wander=1),
    Structure("artery", paired(  # iliac arteries
        Tube(((-2, -2, -44, 7), (22, 0, -72, 6.5), (44, -2, -110, 6), (62, 42, -170, 6), (80, 50, -220, 5.5)))),
        over=(*SOFT, "vein"), blend=2, wander=1),
    Structure("artery", (  # superior mesenteric artery; celiac trunk to the liver and to the spleen
        Tube(((-8, 6, 66, 4.5), (-4, 17, 50, 4.5), (2, 19, 0, 4), (8, 16, -55, 3))),
        Tube(((-8, 6, 80, 4.5), (-8, 18, 84, 4.5), (18, 24, 84, 3.5), (42, 24, 98, 3))),
        Tube(((-8, 18, 84, 3.5), (-40, 2, 92, 3.5), (-84, -20, 108, 3)))),
        over=SOFT, blend=2, wander=1),
    Structure("artery", (  # renal arteries
        Tube(((-6, -4, 46, 4.5), (24, -18, 38, 3.5), (62, -30, 32, 3))),
        Tube(((-8, -4, 46, 4.5), (-34, -18, 46, 3.5), (-62, -30, 44, 3)))),
        over=SOFT, blend=2, wander=1),
    Structure("vein", (  # renal veins
        Tube(((22, -4, 36, 5.5), (38, -10, 32, 5.5), (62, -26, 26, 5))),
        Tube(((20, 4, 44, 4.5), (-8, 9, 44, 4.5), (-36, -8, 42, 5.5), (-62, -26, 40, 5)))),
        over=SOFT, blend=2, wander=1),
)
"""Branches outside of the organs, which belong to the body in the label map."""

ORGAN_TABLE = (
    Structure("liver", (
        Blob((70, 0, 112), (70, 86, 76), (0, -12, 0), 2.3), Blob((80, 0, 54), (46, 58, 60), (0, -6, 0)),
        Blob((2, 38, 124), (82, 40, 42), (0, 16, -6), 2.2)),
        carve=(Blob((12, -4, 38), (50, 62, 62), (0, -24, 0), 2.2), Blob((-18, -38, 120), (50, 40, 90), (0, 0, 18))),
        over=SOFT, blend=20, growth=0.04),
    Structure("hepatic vessels", (  # three hepatic veins, then the portal vein's branches
        Tube(((20, -2, 160, 8), (36, 10, 158, 5.5), (62, 28, 145, 4.5), (86, 40, 125, 3.5))),
        Tube(((20, -2, 160, 8), (48, -14, 156, 5.5), (80, -28, 140, 4.5), (104, -34, 115, 3))),
        Tube(((20, -2, 160, 8), (10, 14, 156, 5.5), (-8, 34, 142, 4.5), (-30, 44, 132, 3))),
        Tube(((48, 15, 103, 8), (66, 6, 106, 6), (88, 14, 112, 4.5), (106, 24, 104, 3.5))),
        Tube(((66, 6, 106, 5.5), (84, -18, 96, 4.5), (100, -32, 76, 3.5))),
        Tube(((84, 12, 110, 4.5), (92, 34, 90, 3.5), (96, 40, 66, 3))),
        Tube(((48, 15, 103, 7), (30, 32, 118, 5.5), (8, 46, 124, 4.5), (-22, 48, 128, 3.5)))),
        over=("liver",), blend=3, wander=2),
    Structure("stomach wall", (
        Tube(((-66, -16, 154, 28), (-72, -4, 140, 36), (-78, 18, 108, 34), (-70, 40, 74, 29), (-42, 52, 46, 24),
              (-8, 52, 40, 19), (16, 45, 47, 14), (26, 40, 52, 10))),),
        over=(*SOFT, "liver", "hepatic vessels"), core=("stomach", 3), wander=3, growth=0.08),
    Structure("stomach gas", (Blob((-60, 98, 90), (90, 50, 100), power=8),),  # lies in front, under a level
              over=("stomach",), wander=5),
    Structure("spleen", (Blob((-96, -38, 110), (40, 54, 58), (12, 0, -24), 2.2),),
              carve=(Blob((-48, 8, 112), (42, 54, 70), (0, 0, -24)),), over=ABDOMEN, blend=5, growth=0.08),
    Structure("fat", paired(Blob((70, -34, 32), (35, 35, 66), (10, -12, 35), 2.2)),  # around the kidneys
              over=(*SOFT, "liver", "hepatic vessels")),
    Structure("right kidney", (Blob((72, -33, 26), (27, 31, 56), (10, -12, 35), 2.2),),
              carve=(Blob((51, -21, 26), (23, 8, 22), (10, -12, -32)),), over=ABDOMEN, blend=5),
    Structure("left kidney", (Blob((-72, -33, 38), (27, 31, 58), (10, 12, -35), 2.2),),
              carve=(Blob((-51, -21, 38), (23, 8, 23), (10, 12, 32)),), over=ABDOMEN, blend=5),
    Structure("gallbladder", (Tube(((44, 32, 72, 7), (50, 44, 58, 13), (56, 54, 42, 17), (59, 58, 32, 15))),),
              over=ABDOMEN, growth=0.1),
    Structure("duodenum", (
        Tube(((28, 40, 52, 12), (44, 34, 56, 13), (56, 18, 40, 14), (58, 8, 12, 14), (48, 6, -12, 14),
              (22, 10, -20, 12), (-8, 14, -16, 11), (-28, 14, -2, 12), (-34, 20, 20, 12))),),
        over=ABDOMEN, wander=1.5),
    Structure("pancreas", (
        Tube(((40, 12, 22, 11), (38, 16, 38, 17), (28, 24, 52, 14), (8, 30, 64, 11), (-18, 27, 72, 12),
              (-50, 8, 82, 12), (-82, -10, 98, 9))),),
        over=(*ABDOMEN, "duodenum"), wander=1.5),
    Structure("postcava", (
        Tube(((16, -4, -54, 10), (21, -3, -20, 11), (22, -3, 40, 12), (22, -2, 100, 12), (20, -2, 150, 13),
              (18, 4, 215, 13))),),
        over=(*MIDDLE, *CHEST), wander=1.5),
    Structure("aorta", (
        Tube(((-4, -4, -46, 9), (-8, -3, -20, 9.5), (-9, -4, 50, 10.5), (-11, -8, 110, 11.5), (-15, -16, 160, 12.5),
              (-19, -22, 215, 12.5))),),
        over=(*MIDDLE, *CHEST, "postcava"), wander=1.5, growth=0.07),
    Structure("right adrenal gland", (  # body and two limbs
        Tube(((34, -16, 88, 4.2), (38, -24, 96, 5.2), (46, -36, 97, 4))),
        Tube(((37, -22, 99, 4.6), (35, -30, 90, 4.2), (34, -38, 86, 3.7)))),
        over=(*MIDDLE, "right kidney", "postcava", "muscle"), blend=2, wander=1),
    Structure("left adrenal gland", (
        Tube(((-34, -8, 92, 4.2), (-40, -17, 97, 5.2), (-50, -32, 99, 4))),
        Tube(((-38, -13, 98, 4.6), (-36, -25, 92, 4.2), (-35, -35, 88, 3.7)))),
        over=(*MIDDLE, "left kidney", "muscle"), blend=2, wander=1),
    Structure("esophagus", (
        Tube(((-8, 4, 215, 10), (-12, 3, 185, 10), (-20, 3, 166, 10), (-34, 2, 150, 10), (-46, 0, 144, 10))),),
        over=(*ABDOMEN, *CHEST), wander=1),
    Structure("bladder wall", (Blob((0, 22, -150), (42, 33, 29), (-12, 0, 0), 2.3),),
              over=SOFT, core=("bladder", 2), growth=0.1),
)
"""The 15 organs but one, and what lies within them."""

SEX_ORGANS = (
    Structure("prostate/uterus", (  # prostate with the seminal vesicles
        Blob((0, 8, -186), (25, 19, 17), (0, 0, 0), 2.2),
        Tube(((28, -14, -166, 6), (0, -9, -172, 8), (-28, -14, -166, 6)))),
        over=(*SOFT, "bladder", "bladder wall"), blend=4, wander=1.5, growth=0.08),
    Structure("prostate/uterus", (  # uterus and cervix
        Blob((4, -6, -134), (34, 20, 22), (20, 0, 8)),
        Tube(((2, -12, -150, 14), (0, -16, -172, 12), (0, -18, -184, 10)))),
        over=(*SOFT, "bladder", "bladder wall"), wander=2, growth=0.08),
)
"""The fifteenth organ, of a man and of a woman."""
# fmt: on


def small_bowel(rng: np.random.Generator) -> list[Structure]:
    """About sixty short loops of jejunum and ileum, one in front of another, in the middle and lower abdomen."""
    loops = []
    for height in np.arange(36, -132, -17):
        for side in np.linspace(-1, 1, 5 if height > -90 else 4):
            middle = np.array([side * np.interp(height, (-130, -60, 36), (38, 66, 76)), rng.uniform(12, 58), height])
            middle += rng.normal(0, (7, 0, 6))
            turn = rng.uniform(0, np.pi)
            reach = rng.uniform(18, 34) * np.array([np.cos(turn), 0.8 * np.sin(turn), rng.uniform(-0.5, 0.5)])
            bend = rng.normal(0, 9, 3)
            radius = rng.uniform(9, 13)
            curve = (middle - reach, middle + bend, middle + reach)
            tube = Tube(tuple((*point, radius) for point in curve))
            loops.append(Structure("bowel wall", (tube,), (), SOFT, 1.0, ("bowel content", 2.2), "gas", 0, 0))
    return [loops[i] for i in rng.permutation(len(loops))]


def mesentery(rng: np.random.Generator) -> Structure:
    """Small veins that fan out from the root of the mesentery."""
    fans = []
    for _ in range(24):
        start = np.array([8, 17, rng.uniform(-50, 20)])
        end = np.array([rng.uniform(-78, 78), rng.uniform(10, 60), start[2] + rng.uniform(-60, 10)])
        bend = (start + end) / 2 + rng.normal(0, 8, 3)
        fans.append(Tube(((*start, 2.6), (*bend, 2.1), (*end, 1.5))))
    return Structure("vein", tuple(fans), blend=1)
