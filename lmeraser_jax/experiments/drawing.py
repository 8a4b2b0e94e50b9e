"""How the figures of a comparison look: colours and markers, panels, axes, dots, curves."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmeraser_jax.evaluation.plotting import COLOURS, GREY, PALE, blank, ticked
from lmeraser_jax.experiments.summary import MISSING, Quantity, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")  # one more than colours: 56 pairs
DASHES = ("-", "--", ":", "-.")
WIDTH = 10.0  # inches of a figure
LOWEST = 2.1  # inches of a panel with its titles
LEAST = 0.04  # of its highest value that an axis spans at least


class Look(NamedTuple):
    """How one method, data set or backbone is drawn."""

    colour: str
    marker: str
    dash: str = "-"


def looks(names: Sequence[Any]) -> dict[Any, Look]:
    """Colours and markers in turn: names differ in both, or after seven and eight in one."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    return {name: Look(*pair) for name, pair in zip(names, pairs)}


def panels(count: int, columns: int, height: float, note: str = "", **shared: Any) -> "tuple[Figure, list[Axes]]":
    """A figure with so many panels, side by side and in rows of `height` inches, and a note below them."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width = WIDTH if columns > 1 else 0.7 * WIDTH
    lines = textwrap.wrap(note, int(14 * width))  # characters to the inch
    figure = blank(width, rows * max(height, LOWEST) + 0.17 * len(lines))
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for unused in axes[count:]:
        unused.remove()
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=9, color=GREY)
    return figure, axes[:count]


def scale(axes: "Axes", which: str, quantity: Quantity, found: Sequence[Spread]) -> float:
    """Titles the x or y axis and gives it limits that hold all means and bars; returns the place of 0 on it.

    On a logarithmic axis 0 has a place of its own at its low end, behind a line. Where another one does not start at
    0, its title says so. No axis goes further than its quantity can, but for the width of a marker.
    """
    from matplotlib.ticker import FuncFormatter

    axis = getattr(axes, f"{which}axis")
    axis.set_label_text(quantity.title)
    axis.set_major_formatter(FuncFormatter(ticked))
    ends = [end for s in found if s.known for end in (s.mean, *quantity.bar(s))]
    if quantity.logarithmic and (any(end > 0 for end in ends) or math.isfinite(quantity.highest)):
        return _logarithmic(axes, which, quantity, ends)
    if ends:
        _linear(axes, which, quantity, ends)
    return 0.0


def _linear(axes: "Axes", which: str, quantity: Quantity, ends: Sequence[float]) -> None:
    """From 0, but for shares: these over what is measured."""
    low, high = min(ends), max(ends)
    if math.isfinite(quantity.highest):
        middle, reach = (low + high) / 2, 0.58 * max(high - low, LEAST * quantity.highest)
        low = math.floor(10 * max(middle - reach, min(low, 0))) / 10
        high = math.ceil(10 * min(middle + reach, max(high, quantity.highest))) / 10
    else:
        low, high = min(low, 0.0), 1.08 * high or 1.0
    getattr(axes, f"set_{which}lim")(low, high)
    if low > 0:
        getattr(axes, f"set_{which}label")(f"{quantity.title}\nzoomed in: {low:g} to {high:g}")


def _logarithmic(axes: "Axes", which: str, quantity: Quantity, ends: Sequence[float]) -> float:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    positive = [end for end in ends if end > 0]
    if math.isfinite(quantity.highest):
        high = max([quantity.highest, *positive])
        low = min([high / 7, *positive]) / 2.2
        high *= (high / low) ** 0.04  # half a marker
    else:
        low, high = min(positive), max(positive)
        middle, ratio = math.sqrt(low * high), max(2.2 * math.sqrt(high / low), 4.0)
        low, high = middle / ratio, middle * ratio
    zero = low / (high / low) ** 0.06
    some_zero = len(positive) < len(ends)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(zero / (high / low) ** 0.04 if some_zero else low, high)
    steps = LogLocator(10, (1.0,) if high / low > 200 else (1.0, 2.0, 5.0))
    ticks = [tick for tick in steps.tick_values(low, high) if low * 1.01 < tick < high]
    ticks = ticks[:: math.ceil(len(ticks) / 7)]
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks([zero, *ticks] if some_zero else ticks, labels=["0"] * some_zero + [ticked(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    if some_zero:
        apart(axes, which, low)
    return zero


def apart(axes: "Axes", which: str, place: float) -> None:
    """A line that parts the scale from a strip that is not to scale."""
    getattr(axes, "axvline" if which == "x" else "axhline")(place, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))


def bar(quantity: Quantity, found: Spread, zero: float) -> tuple[float, float]:
    """Lengths of the bar below and above a mean on an axis with 0 at `zero`."""
    low, high = quantity.bar(found)
    mean = found.mean or zero
    return max(0.0, mean - (low or zero)), max(0.0, (high or zero) - mean)  # a mean of equals may be off by a bit


class Group(NamedTuple):
    """Dots of one look, one a row."""

    label: str
    found: Mapping[Any, Spread]
    look: Look
    hollow: bool = False


def dots(
    axes: "Axes", names: Sequence[Any], labels: Sequence[str], groups: Sequence[Group], quantity: Quantity
) -> None:
    """A row for every name, from the top: dots of every group at the mean, with the quantity's bar."""
    shown = [group.found.get(name, MISSING) for group in groups for name in names]
    zero = scale(axes, "x", quantity, shown)
    step = min(0.24, 0.7 / len(groups))
    for at, group in enumerate(groups):
        found = [group.found.get(name, MISSING) for name in names]
        axes.errorbar(
            [s.mean or zero for s in found],
            np.arange(len(names)) + (at - (len(groups) - 1) / 2) * step,
            xerr=np.transpose([bar(quantity, s, zero) for s in found]),
            fmt=group.look.marker,
            color=group.look.colour,
            markerfacecolor="white" if group.hollow else group.look.colour,
            markersize=6,
            elinewidth=1.2,
            capsize=2.5,
            clip_on=False,  # a dot at the end of the axis is whole
            label=group.label,
        )
    axes.set_yticks(range(len(names)), labels=list(labels))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params("y", length=0)
    axes.grid(True, color=PALE, linewidth=0.8)


def legend(figure: "Figure", axes: "Axes") -> None:
    """One legend above all panels, in as many rows as it needs."""
    handles, labels = axes.get_legend_handles_labels()
    characters = max(len(label) for label in labels) + 6
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 12 / characters)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


class Curve(NamedTuple):
    """Means over an x axis, with a name at its end."""

    label: str
    found: Mapping[float, Spread]
    look: Look


def curves(axes: "Axes", lines: Sequence[Curve], quantity: Quantity, x_title: str) -> "list[Annotation]":
    """Lines with the quantity's bars as bands; returns their names, for `labels.part_names`.

    On a logarithmic axis what is 0 is left out.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    zero = scale(axes, "y", quantity, [s for line in lines for s in line.found.values() if s.mean > 0])
    whole = all(place % 1 == 0 for line in lines for place in line.found)
    names = []
    for line in lines:
        places = sorted(line.found)
        x, found = np.array(places), [line.found[place] for place in places]
        mean, ends = np.array([s.mean for s in found]), np.array([quantity.bar(s) for s in found])
        mean[(mean <= 0) & quantity.logarithmic] = math.nan
        colour, marker, dash = line.look
        every = max(1, len(x) // 12)  # markers do not hide each other
        axes.plot(x, mean, color=colour, marker=marker, linestyle=dash, markersize=5, linewidth=1.6, markevery=every)
        if (ends[:, 0] < ends[:, 1]).any():
            low, high = np.where(ends == 0, zero, ends).T
            axes.fill_between(x, low, high, where=np.isfinite(mean), color=colour, alpha=0.15, linewidth=0)
        there = np.flatnonzero(np.isfinite(mean))
        if len(there):
            names.append(_named_end(axes, line, float(x[there[-1]]), float(mean[there[-1]])))
    axes.set_xlabel(x_title)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(ticked))
    axes.grid(True, color=PALE, linewidth=0.8)
    return names


def _named_end(axes: "Axes", line: Curve, x: float, y: float) -> "Annotation":
    arrow = {"arrowstyle": "-", "color": line.look.colour, "linewidth": 0.9, "linestyle": line.look.dash}
    return axes.annotate(
        line.label,
        (x, y),
        xytext=(1.06, y),
        textcoords=axes.get_yaxis_transform(),
        va="center",
        annotation_clip=False,
        arrowprops=arrow | {"shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
    )
