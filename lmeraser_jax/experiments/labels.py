"""Names beside points and at the ends of curves, placed so that none covers another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

Lines = Sequence[np.ndarray]
SPACING = 1.25  # lines of text, from one to the next
DISTANCES = (9, 14, 20, 28, 38, 50, 64, 80, 100)  # points from a point to its name, nearest first
DIRECTIONS = 16
ROUNDS = 3  # in which every name is placed anew beside the others
CROSSING = 2000  # what a line that crosses another costs, in square pixels of a name that is covered


def settle(figure: "Figure") -> None:
    """Lays out the panels once and fixes their places; what is placed in pixels afterwards stays right."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def part_names(names: "Sequence[Annotation]") -> None:
    """Moves names at the right of one settled panel up and down until none covers another, as little as possible."""
    if not names:
        return
    axes, figure = names[0].axes, names[0].get_figure(root=True)
    assert axes is not None and figure is not None
    names = sorted(names, key=lambda name: name.xy[1])
    gap = float(names[0].get_fontsize()) * figure.dpi / 72 * SPACING
    wanted = [axes.transData.transform(name.xy)[1] for name in names]
    for name, y in zip(names, parted(wanted, gap, *axes.bbox.intervaly)):
        name.set_position((name.get_position()[0], axes.transData.inverted().transform((0, y))[1]))


def parted(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Places with at least `gap` between neighbours, nearest to the wanted ascending ones (least squares).

    Between `low` and `high` where all of them fit there, else from `low` upwards.
    """
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(wanted))
    found = isotonic_regression(np.asarray(wanted, float) - steps).x
    return np.clip(found, low, max(low, high - steps[-1])) + steps


def side_by_side(centres: np.ndarray, bars: np.ndarray, marker: float, line: float) -> np.ndarray:
    """Shifts [n] along x, about as small as it goes, with which no marker and no upright bar covers another one.

    Args:
        centres: of the markers [n, 2]; the first ones stay where they are.
        bars: lower and upper ends of their bars in y [n, 2].
        marker: distance between markers.
        line: distance along x between bars, and markers, beside each other.
    """
    shifts = np.zeros(len(centres))
    for i, (x, y) in enumerate(centres):
        level = np.abs(centres[:i, 1] - y) < marker
        beside = level | ((bars[:i, 0] < bars[i, 1]) & (bars[i, 0] < bars[:i, 1]))
        gaps = np.where(level, marker, np.where(beside, line, 0.0))
        taken = centres[:i, 0] + shifts[:i]
        for step in range(1 + 8 * i):
            shifts[i] = (step + 1) // 2 * (1, -1)[step % 2] * line  # to the left, to the right, further
            if (np.abs(taken - x - shifts[i]) >= gaps - 1e-6).all():
                break
    return shifts


def name_points(
    axes: "Axes", points: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str], lines: Lines
) -> "list[Annotation]":
    """Writes a name beside every point of a settled panel, on no other name, no point and no line where there is room.

    Args:
        axes: a panel with its final place, limits and scales.
        points: x and y in data coordinates.
        names: one a point.
        colours: of the lines that lead from names to their points.
        lines: vertices [n, 2] of lines to keep clear of, in data coordinates.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels = figure.dpi / 72
    centres = axes.transData.transform(np.asarray(points))
    on_lines = np.concatenate([np.zeros((0, 2)), *(_along(axes.transData.transform(line)) for line in lines)])
    marks, thin = _boxes(centres, 10 * pixels), _boxes(on_lines, 2 * pixels)
    panel = axes.bbox.get_points().ravel()
    written = [_written(axes, *one) for one in zip(points, names, colours)]
    sizes = [_extent(name) + np.array([6, 2]) * pixels for name in written]  # with room between neighbours
    boxes, leaders = np.zeros((len(names), 4)), {i: np.zeros((0, 2)) for i in range(len(names))}
    for i in _from_outside(centres, 60 * pixels) * ROUNDS:
        shifts, distances = _candidates(sizes[i], pixels)
        tried = np.concatenate([centres[i] + shifts - sizes[i] / 2, centres[i] + shifts + sizes[i] / 2], axis=1)
        solid = np.delete(np.concatenate([marks, boxes]), [i, len(marks) + i], axis=0)
        others = [leaders[j] for j in leaders if j != i and len(leaders[j])]
        drawn = _boxes(np.concatenate([np.zeros((0, 2)), *map(_along, others)]), 4 * pixels)
        hidden = 5 * _covered(tried, np.concatenate([solid, drawn]))
        hidden += _covered(tried, np.concatenate([thin, marks[i : i + 1]]))
        far = 0.1 * distances**2  # a name far away is about as bad as one that touches a line
        crossed = 5 * _crossed(centres[i], shifts, solid) + CROSSING * _crossings(centres[i], shifts, others)
        best = int(np.argmin(hidden + 5 * _outside(tried, panel) + crossed + far))
        boxes[i], leaders[i] = tried[best], centres[i] + np.stack([0 * shifts[best], shifts[best]])
        written[i].set_position((float(shifts[best, 0] / pixels), float(shifts[best, 1] / pixels)))
    return written


def _from_outside(centres: np.ndarray, near: float) -> list[int]:
    """Points with few others near first; in a crowd, those at its edge before those inside."""
    distances = np.hypot(*(centres[:, None] - centres[None]).transpose(2, 0, 1))  # [n, n]
    crowds = distances < near
    middles = np.array([centres[crowd].mean(axis=0) for crowd in crowds]).reshape(-1, 2)
    edge = np.hypot(*(centres - middles).T)
    return sorted(range(len(centres)), key=lambda i: (int(crowds[i].sum()), -edge[i]))


def _crossed(centre: np.ndarray, shifts: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For every shift [n, 2], the area of points and names that a line from there to the point crosses, about."""
    parts = np.linspace(0.15, 0.85, 12)
    places = (centre + shifts[:, None] * parts[None, :, None]).reshape(-1, 2)
    return _covered(_boxes(places, 4.0), others).reshape(len(shifts), -1).sum(axis=1)


def _crossings(centre: np.ndarray, shifts: np.ndarray, lines: Sequence[np.ndarray]) -> np.ndarray:
    """For every shift [n, 2], how many of the lines [2, 2] a line from there to the point crosses."""
    if not lines:
        return np.zeros(len(shifts))
    (starts, ends), tips = np.moveaxis(np.array(lines), 1, 0), centre + shifts  # [m, 2], [n, 2]

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.sign((b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0])

    here, there = starts[None], ends[None]  # [1, m, 2]
    apart = side(centre, tips[:, None], here) != side(centre, tips[:, None], there)  # [n, m]
    return (apart & (side(here, there, centre) != side(here, there, tips[:, None]))).sum(axis=1)


def _written(axes: "Axes", point: tuple[float, float], text: str, colour: str) -> "Annotation":
    arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
    ground = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
    name = axes.annotate(text, point, (0, 0), textcoords="offset points", bbox=ground, arrowprops=arrow)
    name.set(ha="center", va="center")
    return name


def _extent(name: "Annotation") -> np.ndarray:
    """Width and height of the text alone in pixels."""
    from matplotlib.text import Text

    box = Text.get_window_extent(name)
    return np.array([box.width, box.height])


def _candidates(size: np.ndarray, pixels: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the middle of a name may lie, from its point, the nearest first: pixels [n, 2], distances in points [n]."""
    distances, turns = np.meshgrid(np.array(DISTANCES, float), np.arange(DIRECTIONS), indexing="ij")
    angles = 2 * np.pi * turns.ravel() / DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    reach = distances.ravel()[:, None] * pixels * directions
    return reach + size / 2 * np.clip(1.5 * directions, -1, 1), distances.ravel()


def _boxes(centres: np.ndarray, side: float) -> np.ndarray:
    """Squares around places: low x, low y, high x, high y [n, 4]."""
    return np.concatenate([centres - side / 2, centres + side / 2], axis=1)


def _covered(boxes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Area of every box [n, 4] that lies on others [m, 4], summed over these."""
    low = np.maximum(boxes[:, None, :2], taken[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], taken[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=2).sum(axis=1)


def _outside(boxes: np.ndarray, panel: np.ndarray) -> np.ndarray:
    """Area of every box [n, 4] that lies outside of the panel [4]."""
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - _covered(boxes, panel[None])


def _along(vertices: np.ndarray, step: float = 5.0) -> np.ndarray:
    """Places every few pixels along a line."""
    pieces = [
        np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / step))
        for start, end in zip(vertices[:-1], vertices[1:])
    ]
    return np.concatenate([np.zeros((0, 2)), *pieces])
