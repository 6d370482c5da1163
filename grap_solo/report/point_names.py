"""Writes names beside points, where they cover the least."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from grap_solo.report.layout import DARK, SMALL


@dataclass(frozen=True)
class Point:
    """A method's cost and accuracies.

    Attributes:
        label: the method's name.
        cost: median, minimum and maximum of the training time relative to fixed weights. The last
            two may be NaN.
        accuracies: for each evaluation, mean and standard deviation in percent. The deviation may
            be NaN.
    """

    label: str
    cost: tuple[float, float, float]
    accuracies: Mapping[str, tuple[float, float]]


# The places for a name: the direction from its point, and how the text is aligned there.
DIRECTIONS = (
    (1.0, 0.0, "left", "center"),
    (0.7, 0.7, "left", "bottom"),
    (0.7, -0.7, "left", "top"),
    (-1.0, 0.0, "right", "center"),
    (-0.7, 0.7, "right", "bottom"),
    (-0.7, -0.7, "right", "top"),
    (0.0, 1.0, "center", "bottom"),
    (0.0, -1.0, "center", "top"),
)

DISTANCES = (6.0, 14.0, 24.0, 36.0, 50.0)  # In points; beyond the first, a line leads there.


def label_points(axes: Axes, points: Sequence[Point], evaluation: str) -> None:
    """Writes each point's name where it covers the least of the points, whiskers and names.

    Tries every direction and distance for one name after the other and keeps the cheapest place.
    The layout of the figure must be final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixel, renderer = figure.dpi / 72, FigureCanvasAgg(figure).get_renderer()
    places = [(point.cost[0], point.accuracies[evaluation][0]) for point in points]
    centres = axes.transData.transform(places)
    markers = [_box(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in centres]
    whiskers = [box for point in points for box in _whiskers(axes, point, evaluation)]
    names: list[Bbox] = []
    solid = list(markers)
    for i in sorted(range(len(points)), key=lambda i: places[i]):
        text = axes.annotate(
            points[i].label,
            places[i],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=SMALL,
            color=DARK,
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkB": 4},
        )
        text.set_in_layout(False)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        size = Text.get_window_extent(text, renderer)
        least, taken = np.inf, [size]
        for distance, (x, y, ha, va) in itertools.product(DISTANCES, DIRECTIONS):
            offset = np.array([x, y]) * distance
            box = _box_beside(centres[i] + offset * pixel, size, ha, va)
            line = _line(centres[i], box) if distance > DISTANCES[0] else []
            penalty = 4 * pixel * distance + 5 * (
                size.width * size.height - _overlap(box, axes.bbox)
            )
            penalty += 4 * sum(_overlap(box, each) for each in solid)
            penalty += 3 * sum(_overlap(box, each) for each in whiskers)
            crossed = [each for each in (*markers, *names) if each is not markers[i]]
            penalty += 8 * sum(_overlap(part, each) for part in line for each in crossed)
            if penalty < least:
                least, taken = penalty, [box, *line]
                text.set(horizontalalignment=ha, verticalalignment=va)
                text.xyann = tuple(offset)
                assert text.arrow_patch is not None
                text.arrow_patch.set_visible(bool(line))
        names.append(taken[0])
        solid += taken


def _line(start: np.ndarray, box: Bbox) -> list[Bbox]:
    """Covers the line from a point to its name with small boxes."""
    end = np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2])
    along = [start + (end - start) * part for part in np.linspace(0, 1, 25)[1:]]
    return [_box(x - 1.5, y - 1.5, 3, 3) for x, y in along if not box.contains(x, y)]


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x, y, width, height)


def _box_beside(place: np.ndarray, size: Bbox, ha: str, va: str) -> Bbox:
    """Returns the box of a text of this size that is aligned at ``place``."""
    left = place[0] - size.width * {"left": 0, "center": 0.5, "right": 1}[ha]
    bottom = place[1] - size.height * {"bottom": 0, "center": 0.5, "top": 1}[va]
    return _box(left, bottom, size.width, size.height)


def _whiskers(axes: Axes, point: Point, evaluation: str) -> list[Bbox]:
    """Returns the boxes of a point's two whiskers, two pixels wide."""
    (middle, low, high), (mean, std) = point.cost, point.accuracies[evaluation]
    std = float(np.nan_to_num(std))
    low, high = (middle if np.isnan(each) else each for each in (low, high))
    corners = [(low, mean), (high, mean), (middle, mean - std), (middle, mean + std)]
    a, b, c, d = axes.transData.transform(corners)
    return [_box(a[0], a[1] - 1, b[0] - a[0], 2), _box(c[0] - 1, c[1], 2, d[1] - c[1])]


def _overlap(one: Bbox, other: Bbox) -> float:
    """Returns the area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
