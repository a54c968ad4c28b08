"""Placing the labels of points so that none covers another label, a point or, if it can be helped, an error bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the common area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


class Place(NamedTuple):
    """Where a label goes: its left bottom corner in pixels, and whether a line should lead to its point."""

    x: float
    y: float
    leader: bool


_ANGLES = np.deg2rad([20, -20, 160, 200, 60, -60, 120, -120, 90, -90, 0, 180, 40, -40, 140, -140])
_DISTANCES = (9.0, 16.0, 26.0, 40.0, 58.0, 80.0)


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    solid: Sequence[Box],
    soft: Sequence[Box],
) -> list[Place]:
    """Choose a place for every label.

    Args:
        points: where the labelled points are, pixels.
        sizes: width and height of each label, pixels.
        frame: the labels must stay inside.
        solid: rectangles no label should cover, for example markers.
        soft: rectangles a label covers only if nothing else is free, for example error bars.

    Returns:
        One place per label; the most crowded points choose first.
    """
    centres = np.asarray(points, dtype=float).reshape(-1, 2)
    crowd = [float(np.sum(np.hypot(*(centres - centre).T) < 90)) for centre in centres]
    taken: list[Box] = []
    chosen: dict[int, Place] = {}
    for index in sorted(range(len(points)), key=lambda place: -crowd[place]):
        best: tuple[float, Place, Box] | None = None
        for distance in _DISTANCES:
            for order, angle in enumerate(_ANGLES):
                box = _box(points[index], sizes[index], distance, float(angle))
                cost = 0.02 * distance + 0.01 * order + _outside(box, frame)
                cost += _crossed(points[index], box, solid) if distance > 16 else 0.0
                cost += sum(box.overlap(other) for other in (*solid, *taken)) + 0.15 * sum(map(box.overlap, soft))
                if best is None or cost < best[0]:
                    best = (cost, Place(box.left, box.bottom, distance > 16), box)
        if best is not None:
            chosen[index] = best[1]
            taken.append(best[2])
    return [chosen[index] for index in range(len(points))]


def _box(point: tuple[float, float], size: tuple[float, float], distance: float, angle: float) -> Box:
    """Return the label's rectangle at a distance from the point, touching the ray with its nearest side."""
    x = point[0] + distance * np.cos(angle)
    y = point[1] + distance * np.sin(angle)
    across, up = np.cos(angle), np.sin(angle)
    left = x if across > 0.3 else x - size[0] if across < -0.3 else x - size[0] / 2
    bottom = y if up > 0.5 else y - size[1] if up < -0.5 else y - size[1] / 2
    return Box(left, bottom, left + size[0], bottom + size[1])


def _crossed(point: tuple[float, float], box: Box, solid: Sequence[Box]) -> float:
    """Return a penalty for every marker, other than the point's own, that a line to the label would cross."""
    end = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
    steps = [(point[0] + t * (end[0] - point[0]), point[1] + t * (end[1] - point[1])) for t in np.linspace(0, 1, 12)]
    others = [other for other in solid if not _inside(point, other)]
    return 200.0 * sum(any(_inside(step, other) for step in steps) for other in others)


def _inside(point: tuple[float, float], box: Box) -> bool:
    return box.left <= point[0] <= box.right and box.bottom <= point[1] <= box.top


def _outside(box: Box, frame: Box) -> float:
    beyond = (frame.left - box.left, frame.bottom - box.bottom, box.right - frame.right, box.top - frame.top)
    return 1000.0 * sum(max(part, 0.0) for part in beyond)
