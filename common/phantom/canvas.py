"""Solid shapes, and a voxel grid on which they are painted in deformed coordinates: how the phantom is drawn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator, make_interp_spline
from scipy.spatial.transform import Rotation

Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]
Field = tuple[Box, np.ndarray]
"""Depths below a surface in mm, negative outside of it, and the box of the grid where they were taken."""

OUTSIDE = -1e3
"""Depth where nothing was evaluated, in mm."""


class Blob(NamedTuple):
    """Superellipsoid: centre and radii in mm, turned by degrees about x, then y, then z; power 2 is an ellipsoid."""

    centre: Point
    radii: Point
    turn: Point = (0, 0, 0)
    power: float = 2.0


class Tube(NamedTuple):
    """Tube with round ends along a smooth curve through points (x, y, z, radius) in mm."""

    points: tuple[tuple[float, float, float, float], ...]


Part = Blob | Tube


class Structure(NamedTuple):
    """Parts, smoothly joined, minus the carved ones, filled with a tissue.

    Attributes:
        tissue: what it is filled with.
        parts: their union, rounded over `blend` mm where they meet.
        carve: cut out of the union, rounded likewise.
        over: the tissues that it may replace.
        blend: mm.
        core: tissue inside of a rim, and the rim's thickness in mm.
        gas: tissue that takes the front half of the core wherever the canvas's `gas` field is high.
        wander: how far it lies from its place between patients, standard deviation in mm.
        growth: how its size differs between patients, standard deviation of the logarithm.
    """

    tissue: str
    parts: tuple[Part, ...]
    carve: tuple[Part, ...] = ()
    over: tuple[str, ...] = ("fat",)
    blend: float = 8.0
    core: tuple[str, float] | None = None
    gas: str | None = None
    wander: float = 2.5
    growth: float = 0.05


def mirrored(part: Part) -> Part:
    """The same part on the other side of x = 0."""
    if isinstance(part, Tube):
        return Tube(tuple((-x, *rest) for x, *rest in part.points))
    (x, *centre), (turn_x, turn_y, turn_z) = part.centre, part.turn
    return part._replace(centre=(-x, *centre), turn=(turn_x, -turn_y, -turn_z))


def paired(*parts: Part) -> tuple[Part, ...]:
    """Parts together with their mirror images."""
    return parts + tuple(mirrored(part) for part in parts)


def vary(structure: Structure, rng: np.random.Generator) -> Structure:
    """The structure as the next patient has it: shifted, scaled, its tubes a little wavy."""

    def draw(*size: int) -> np.ndarray:
        return np.clip(rng.standard_normal(size), -2, 2)

    shift, scale = structure.wander * draw(3), np.exp(structure.growth * draw(3))
    middle = np.mean([point[:3] for p in structure.parts for point in getattr(p, "points", (p[0],))], axis=0)

    def moved(part: Part) -> Part:
        if isinstance(part, Blob):
            centre = middle + (np.array(part.centre) - middle) * scale + shift
            return part._replace(centre=tuple(centre), radii=tuple(part.radii * scale))
        points = np.array(part.points, float)
        points[:, :3] = middle + (points[:, :3] - middle) * scale + shift
        points[1:-1, :3] += structure.wander / 3 * draw(len(points) - 2, 3)
        points[:, 3] *= scale.mean()
        return Tube(tuple(map(tuple, points)))

    return structure._replace(parts=tuple(map(moved, structure.parts)), carve=tuple(map(moved, structure.carve)))


def curve(tube: Tube, step: float = 9.0) -> np.ndarray:
    """Points (n, 4) about `step` mm apart on a tube's smooth curve, with the radius as the fourth coordinate."""
    points = np.array(tube.points, float)
    run = np.concatenate(([0], np.cumsum(np.linalg.norm(np.diff(points[:, :3], axis=0), axis=1))))
    return PchipInterpolator(run, points)(np.linspace(0, run[-1], 1 + max(2, round(run[-1] / step)))).astype(np.float32)


def smooth_max(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    """Maximum of two depths, rounded where they differ by less than `blend` mm."""
    return np.maximum(a, b) + np.clip(blend - np.abs(a - b), 0, None) ** 2 / (4 * blend)


def overlap(one: Box, other: Box) -> tuple[Box, Box]:
    """The common part of two boxes, seen from the first voxel of either."""
    common = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)]
    common = [(start, max(start, stop)) for start, stop in common]
    return tuple(
        tuple(slice(start - s.start, stop - s.start) for (start, stop), s in zip(common, box, strict=True))
        for box in (one, other)
    )


def merged(fields: list[Field], join: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Field:
    """Depths from several boxes joined in the smallest box that holds them all."""
    box = tuple(slice(min(b[a].start for b, _ in fields), max(b[a].stop for b, _ in fields)) for a in range(3))
    depth = np.full([s.stop - s.start for s in box], OUTSIDE, np.float32)
    for inner, field in fields:
        here, _ = overlap(box, inner)
        depth[here] = join(depth[here], field)
    return box, depth


def smooth_field(axes: list[np.ndarray], knot_spacing: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth random function of about unit variance on a grid: a cubic spline through random knots.

    The knots lie `knot_spacing` mm apart within ±260 mm, whatever the grid: the same generator gives the same function.
    """
    knots = np.linspace(-260, 260, 2 + round(520 / knot_spacing))
    spline = make_interp_spline(knots, np.eye(len(knots)))
    field = rng.standard_normal((len(knots),) * 3, dtype=np.float32)
    for axis in axes:  # contracts the first dimension and appends the new one: three turns give (X, Y, Z)
        field = np.tensordot(field, spline(np.clip(axis, -260, 260)).astype(np.float32), axes=(0, 1))
    return field


class Canvas:
    """A grid of tissue codes, in coordinates in mm that may be deformed.

    Attributes:
        tissue: (X, Y, Z) uint8, 0 in the beginning.
        points: (3, X, Y, Z) float32, deformed coordinates.
        gas: (X, Y, Z), where it exceeds 0.3 the bowel holds gas.
    """

    def __init__(self, axes: list[np.ndarray], codes: dict[str, int], deformation: float | np.ndarray = 0.0):
        self.axes = axes
        self.codes = codes
        self.points = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32) + np.float32(deformation)
        self.tissue = np.zeros(self.points.shape[1:], np.uint8)
        self.gas = np.zeros(self.tissue.shape, np.float32)
        self._reach = float(np.abs(deformation).max())

    def box(self, low: np.ndarray, high: np.ndarray) -> Box:
        """The voxels that can lie between two corners in mm, whatever the deformation."""
        return tuple(
            slice(*np.searchsorted(axis, (start - self._reach, end + self._reach)))
            for axis, start, end in zip(self.axes, low, high, strict=True)
        )

    def put(self, tissue: str, where: np.ndarray, box: Box = (slice(None),) * 3) -> None:
        """Set the tissue of the voxels of a box where a mask holds."""
        self.tissue[box][where] = self.codes[tissue]

    def depth(self, part: Part, margin: float = 0.0) -> Field:
        """Depth below the surface of a part, in a box that is `margin` mm wider than it.

        A tube's depth is exact; a blob's is measured in parts of its shortest radius.
        """
        if isinstance(part, Tube):
            return merged([self._cone(start, end, margin) for start, end in pairwise(curve(part))], np.maximum)
        turn = Rotation.from_euler("xyz", part.turn, degrees=True).as_matrix()
        extent = np.abs(turn) @ part.radii + margin
        box, offset = self._around(np.array(part.centre) - extent, np.array(part.centre) + extent, part.centre)
        local = np.tensordot((turn / part.radii).T.astype(np.float32), offset, axes=1)
        radius = (np.abs(local) ** np.float32(part.power)).sum(0) ** np.float32(1 / part.power)
        return box, (1 - radius) * np.float32(min(part.radii))

    def _cone(self, start: np.ndarray, end: np.ndarray, margin: float) -> Field:
        """Depth below the surface of a straight tube between two points (x, y, z, radius)."""
        reach = max(start[3], end[3]) + margin
        box, offset = self._around(np.minimum(start, end)[:3] - reach, np.maximum(start, end)[:3] + reach, start[:3])
        run = (end - start)[:3]
        along = np.clip(np.tensordot(run / (run @ run), offset, axes=1), 0, 1)
        return box, start[3] + along * (end - start)[3] - np.linalg.norm(offset - np.multiply.outer(run, along), axis=0)

    def _around(self, low: np.ndarray, high: np.ndarray, centre: Point) -> Field:
        box = self.box(low, high)
        return box, self.points[(slice(None), *box)] - np.reshape(centre, (3, 1, 1, 1)).astype(np.float32)

    def solid(self, structure: Structure) -> Field:
        """Depth below the surface of a whole structure."""
        join = partial(smooth_max, blend=structure.blend)
        box, depth = merged([self.depth(part, structure.blend) for part in structure.parts], join)
        for part in structure.carve:
            inner, hole = self.depth(part, structure.blend)
            here, there = overlap(box, inner)
            depth[here] = -join(-depth[here], hole[there])
        return box, depth

    def paint(self, structure: Structure) -> None:
        """Fill a structure with its tissues where they are welcome."""
        box, depth = self.solid(structure)
        inside = (depth > 0) & np.isin(self.tissue[box], [self.codes[name] for name in structure.over])
        self.put(structure.tissue, inside, box)
        if structure.core:
            core, rim = structure.core
            inside &= depth > rim
            self.put(core, inside, box)
        if structure.gas:
            front = depth < np.roll(depth, 1, axis=1)
            self.put(structure.gas, inside & front & (self.gas[box] > 0.3), box)
