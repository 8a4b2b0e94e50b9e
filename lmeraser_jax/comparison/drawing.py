"""How figures look: style, colours, axes, dots, curves, labels that do not overlap, and their bytes.

No global state of pyplot; matplotlib is imported where it is used, so that nothing else needs it.
"""

import contextlib
import functools
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from lmeraser_jax.comparison.summary import MISSING, Quantity, Spread
from lmeraser_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Okabe and Ito's colours for all kinds of colour vision, without the yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")  # one more than colours: 56 pairs
DASHES = ("-", "--", ":", "-.")
GREY, PALE = "#555555", "#dddddd"
DPI = 150
WIDTH = 10.0  # inches of a figure
LOWEST = 1.8  # inches of a panel with its titles
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # names are names, also with $ in them
    "svg.fonttype": "path",
    "svg.hashsalt": "lmeraser",
}
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with `STYLE`, whatever the user's settings are. Raises `UserError` without matplotlib."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise UserError("figures need matplotlib; install it with: pip install 'lmeraser_jax[plots]'") from error
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in any script; shown as boxes
        yield


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs a function that draws in `style`."""

    @functools.wraps(draw)
    def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with style():
            return draw(*args, **kwargs)

    return inside


@styled
def picture(figure: "Figure", kind: str) -> bytes:
    """A figure as png or svg: the same bytes whenever it is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


class Look(NamedTuple):
    """How one method, data set or backbone is drawn."""

    colour: str
    marker: str
    dash: str = "-"


def looks(names: Sequence[Any]) -> dict[Any, Look]:
    """Colours and markers in turn: names differ in both, or after seven and eight in one."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    return {name: Look(*pair) for name, pair in zip(names, pairs)}


def panels(count: int, columns: int, height: float, **shared: Any) -> "tuple[Figure, list[Axes]]":
    """A figure with so many panels, side by side and in rows of `height` inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (WIDTH if columns > 1 else 0.7 * WIDTH, rows * max(height, LOWEST))
    figure = Figure(size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def ticked(value: float, _: int | None = None) -> str:
    """A number at a tick: 0.5, 20, 3k, 40M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def scale(axes: "Axes", which: str, quantity: Quantity, found: Sequence[Spread]) -> float:
    """Titles and scales the x or y axis for what it will show; returns the place of 0 on it.

    On a logarithmic axis 0 has a place of its own at its low end, behind a line.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis = getattr(axes, f"{which}axis")
    axis.set_label_text(quantity.title)
    axis.set_major_formatter(FuncFormatter(ticked))
    positive = [s.mean for s in found if s.known and s.mean > 0]
    if not quantity.logarithmic or not positive:
        return 0.0
    low, high = min(positive), max(s.mean + s.sd for s in found if s.known)
    middle, ratio = math.sqrt(low * high), max(2.2 * math.sqrt(high / low), 4.0)
    low, high = middle / ratio, middle * ratio
    zero = low / (high / low) ** 0.06
    some_zero = any(s.mean == 0 for s in found)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(zero / (high / low) ** 0.04 if some_zero else low, high)
    steps = LogLocator(10, (1.0,) if high / low > 200 else (1.0, 2.0, 5.0))
    ticks = [tick for tick in steps.tick_values(low, high) if low * 1.01 < tick < high]
    ticks = ticks[:: math.ceil(len(ticks) / 7)]
    axis.set_ticks([zero, *ticks] if some_zero else ticks, labels=["0"] * some_zero + [ticked(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    if some_zero:
        getattr(axes, "axvline" if which == "x" else "axhline")(low, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    return zero


class Group(NamedTuple):
    """Dots of one look, one a row."""

    label: str
    found: Mapping[Any, Spread]
    look: Look
    hollow: bool = False


def dots(
    axes: "Axes", names: Sequence[Any], labels: Sequence[str], groups: Sequence[Group], quantity: Quantity
) -> None:
    """A row for every name, from the top: dots of every group at the mean, a bar of one standard deviation each way."""
    shown = [group.found.get(name, MISSING) for group in groups for name in names]
    zero = scale(axes, "x", quantity, shown)
    step = min(0.24, 0.7 / len(groups))
    for at, group in enumerate(groups):
        found = [group.found.get(name, MISSING) for name in names]
        axes.errorbar(
            [zero if s.mean == 0 else s.mean for s in found],
            np.arange(len(names)) + (at - (len(groups) - 1) / 2) * step,
            xerr=[s.sd for s in found],
            fmt=group.look.marker,
            color=group.look.colour,
            markerfacecolor="white" if group.hollow else group.look.colour,
            markersize=6,
            elinewidth=1.2,
            capsize=2.5,
            label=group.label,
        )
    axes.set_yticks(range(len(names)), labels=list(labels))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params("y", length=0)
    axes.grid(True, color=PALE, linewidth=0.8)
    if not quantity.logarithmic:
        axes.margins(x=0.08)


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
    """Lines with bands of one standard deviation each way; returns their names, for `labels.part_names`.

    On a logarithmic axis what is 0 is left out.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale(axes, "y", quantity, [s for line in lines for s in line.found.values() if s.mean > 0])
    whole = all(place % 1 == 0 for line in lines for place in line.found)
    names = []
    for line in lines:
        places = sorted(line.found)
        x, found = np.array(places), [line.found[place] for place in places]
        mean, sd = np.array([s.mean for s in found]), np.array([s.sd for s in found])
        mean[(mean <= 0) & quantity.logarithmic] = math.nan
        colour, marker, dash = line.look
        every = max(1, len(x) // 12)  # markers do not hide each other
        axes.plot(x, mean, color=colour, marker=marker, linestyle=dash, markersize=5, linewidth=1.6, markevery=every)
        if (sd > 0).any():
            low = np.maximum(mean - sd, mean / 10) if quantity.logarithmic else mean - sd
            axes.fill_between(x, low, mean + sd, color=colour, alpha=0.15, linewidth=0)
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
