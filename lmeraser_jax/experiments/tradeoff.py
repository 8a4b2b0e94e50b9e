"""The figure of trade-offs: accuracy against what a request and what a prediction costs, with the Pareto fronts."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmeraser_jax.evaluation.plotting import GREY, PALE, styled
from lmeraser_jax.experiments.drawing import LEAST, Look, apart, bar, panels, scale
from lmeraser_jax.experiments.figures import looks_of, measured
from lmeraser_jax.experiments.labels import name_points, settle, side_by_side
from lmeraser_jax.experiments.summary import (
    ACCURACY,
    COST,
    PASSES,
    UNTITLED,
    Quantity,
    Rows,
    Titles,
    by_dataset,
    by_method,
    main,
    pareto,
    spreads,
    titled,
    unique,
)
from lmeraser_jax.experiments.uncertainty import bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST = 3  # methods that make a scale
SIZE = 7.0  # points of a marker
BESIDE = "What would cover each other stands side by side."
STRIP = "Below a dashed line nothing is to scale."


class Point(NamedTuple):
    """A method in a panel: its place, what its bars reach to each side, its numbers, whether it is drawn to scale."""

    x: float
    y: float
    wide: tuple[float, float]
    high: tuple[float, float]
    numbers: tuple[float, float]  # cost, accuracy
    scaled: bool


@styled
def tradeoff(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Accuracy against the cost of a request and, where it is known, of a prediction, with the best trade-offs."""
    chosen = main(rows)
    if not chosen:
        return None
    quantities = [COST, *measured(chosen, [PASSES])]
    datasets = {name: [row for row in chosen if row.dataset == name] for name in unique(map(by_dataset, chosen))}
    floors = {name: lowest_to_scale(_means(here)) for name, here in datasets.items()}
    strips = any(mean < floors[name] for name, here in datasets.items() for mean in _means(here))
    places = list(itertools.product(datasets, quantities))
    note = f"{bars(chosen, [ACCURACY, COST])} {BESIDE}"
    height = max(4.6, 0.42 * len(unique(map(by_method, chosen))))
    figure, axes = panels(len(places), 2, height, f"{note} {STRIP}" if strips else note)
    points = []
    for panel, (name, quantity) in zip(axes, places):
        panel.set_title(titled(name, titles))
        points.append(_points(panel, datasets[name], quantity, floors[name]))
    settle(figure)
    look = looks_of(rows, by_method)
    for panel, found in zip(axes, points):
        _draw(panel, found, look, titles)
    return figure


def _means(rows: Rows) -> list[float]:
    return [score.mean for score in spreads(rows, ACCURACY, by_method).values() if score.known]


def _points(panel: "Axes", rows: Rows, quantity: Quantity, floor: float) -> dict[str, Point]:
    """Scales a panel for the methods of a data set; where they are in it."""
    costs, scores = spreads(rows, quantity, by_method), spreads(rows, ACCURACY, by_method)
    names = [name for name in costs if costs[name].known and scores[name].known]
    zero = scale(panel, "x", quantity, [costs[name] for name in names])
    scale(panel, "y", ACCURACY, [scores[name] for name in names if scores[name].mean >= floor])
    panel.grid(True, color=PALE, linewidth=0.8)
    strip = _strip(panel) if any(scores[name].mean < floor for name in names) else 0.0
    points = {}
    for name in names:
        cost, score = costs[name], scores[name]
        scaled = score.mean >= floor
        high = bar(ACCURACY, score, 0.0) if scaled else (0.0, 0.0)
        place = cost.mean or zero, score.mean if scaled else strip
        points[name] = Point(*place, bar(quantity, cost, zero), high, (cost.mean, score.mean), scaled)
    return points


def lowest_to_scale(means: Sequence[float]) -> float:
    """Below it are at most half of all, so far that with them the rest would share less than half of the axis."""
    ordered = sorted(means, reverse=True)
    fewest = max(FEWEST, math.ceil(len(ordered) / 2))
    scales = [
        count
        for count in range(fewest, len(ordered))
        if ordered[count - 1] - ordered[count] > max(ordered[0] - ordered[count - 1], 100 * LEAST)
    ]
    return ordered[min(scales, default=len(ordered)) - 1] if ordered else 0.0


def _strip(panel: "Axes") -> float:
    """Makes room below the accuracies of a panel for those that are not to scale; returns its middle."""
    low, high = panel.get_ylim()
    ticks = [tick for tick in panel.get_yticks() if low < tick <= high]
    middle = low - 0.08 * (high - low)
    panel.set_yticks([middle, *ticks], labels=[f"< {low:g}", *(f"{tick:g}" for tick in ticks)])
    panel.set_ylim(low - 0.16 * (high - low), high)
    apart(panel, "y", low)
    return middle


def _draw(panel: "Axes", points: Mapping[str, Point], look: Mapping[str, Look], titles: Titles) -> None:
    """Markers, bars, front and names into a settled panel."""
    if not points:
        return
    names = list(points)
    best = [names[i] for i in pareto([points[name].numbers for name in names])]
    names = [*best, *sorted(set(names) - set(best), key=names.index)]  # what is on the front keeps its place
    lines = _front(panel, [points[name] for name in best])
    places = _side_by_side(panel, [points[name] for name in names])
    for name, (x, y) in zip(names, places):
        (colour, marker, _), (left, right), (down, up) = look[name], points[name].wide, points[name].high
        wide, high = [[left], [right]], [[down], [up]]
        panel.errorbar(x, y, high, wide, marker, color=colour, markersize=SIZE, elinewidth=1, capsize=2, clip_on=False)
        lines += [np.array([(x, y - down), (x, y + up)]), np.array([(x - left, y), (x + right, y)])]
    labels = [_label(name, points[name], titles) for name in names]
    name_points(panel, places, labels, [look[name].colour for name in names], lines)


def _label(name: str, point: Point, titles: Titles) -> str:
    title = titled(name, titles)
    return title if point.scaled else f"{title} ({point.numbers[1]:.1f} %)"


def _front(panel: "Axes", best: Sequence[Point]) -> list[np.ndarray]:
    """Draws the line of the best trade-offs, cheapest first, to the end of the axis; returns it."""
    corners = [point[:2] for point in best] + [(panel.get_xlim()[1], best[-1].y)]
    panel.plot(*zip(*corners), drawstyle="steps-post", color=GREY, linewidth=1.2, zorder=1, gid="front")
    steps = [vertex for (x, y), (right, _) in itertools.pairwise(corners) for vertex in ((x, y), (right, y))]
    return [np.array(steps)]


def _side_by_side(panel: "Axes", points: Sequence[Point]) -> list[tuple[float, float]]:
    """Places in data coordinates, moved along x where markers or bars would cover each other."""
    figure = panel.get_figure(root=True)
    assert figure is not None
    pixels, to_pixels = figure.dpi / 72, panel.transData.transform
    centres = to_pixels([point[:2] for point in points])
    ends = [to_pixels([(p.x, p.y - p.high[0]) for p in points]), to_pixels([(p.x, p.y + p.high[1]) for p in points])]
    upright = np.stack([end[:, 1] for end in ends], axis=1)
    centres[:, 0] += side_by_side(centres, upright, 0.9 * SIZE * pixels, 0.45 * SIZE * pixels)
    return [(float(x), point.y) for (x, _), point in zip(panel.transData.inverted().transform(centres), points)]
