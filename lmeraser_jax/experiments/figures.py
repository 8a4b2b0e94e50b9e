"""The figures of a comparison: from rows to a `Figure`, or to None where the rows do not hold the experiment.

Everywhere: means over the seeds, and bars from the lowest to the highest seed. `titles` names methods, data sets and
backbones for people. pyplot and its global state are not used; matplotlib is imported where it is used.
"""

import contextlib
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeraser_jax import interrupt
from lmeraser_jax.experiments import summary
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.experiments.summary import ACCURACY, Quantity, Rows, Spread, Titles, grouped, spread, spreads
from lmeraser_jax.progress import progress
from lmeraser_jax.storage.atomic_files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours for all kinds of colour vision, without the yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, PALE = "#555555", "#dddddd"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "text.parse_math": False,  # names are names, also with $ in them
    "svg.fonttype": "path",
    "svg.hashsalt": "lmeraser",
}
NO_DATES = {"png": {"Software": None}, "svg": {"Date": None}}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")  # one more than colours: 56 pairs
WIDTH = 10.0  # inches of a figure
title_of = partial(summary.title_of, longest=40)
Looks = Mapping[str, tuple[str, str]]  # {name of a method or a curve: (its colour, its marker)}


def missing() -> str:
    """What to install where matplotlib is missing; "" where it is there."""
    try:
        import matplotlib.figure
        import matplotlib.style  # noqa: F401
    except ImportError:
        return "figures need matplotlib; install it with: python -m pip install matplotlib (the extra plots)"
    return ""


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with `STYLE`, whatever the user's settings are; also a decorator of what draws."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        yield


def blank(width: float, height: float) -> "Figure":
    """An empty figure of so many inches that lays itself out. For functions in `style`."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def ticked(value: float, _: int | None = None) -> str:
    """A number at a tick: 0.5, 20, 3k, 40M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


@style()
def picture(figure: "Figure", kind: str) -> bytes:
    """A figure as png or svg: the same bytes whenever it is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=NO_DATES[kind])
    return buffer.getvalue()


@style()
def accuracy(rows: Rows, titles: Titles) -> "Figure | None":
    """Accuracy of every method (paper Figs. 3 and 4), a panel for every data set and backbone, the best on top."""
    places = summary.places_of(rows)
    if not places:
        return None
    overall = spreads(itertools.chain(*places.values()), ACCURACY)
    names = sorted(overall, key=lambda name: -overall[name].mean if overall[name].known else math.inf)
    figure, axes = _grid(len(places), 1.0 + 0.3 * len(names), sharey=True)
    looks = _looks([quantity.title for quantity in (ACCURACY, summary.BALANCED)])
    for panel, (place, here) in zip(axes, places.items()):
        for shift, quantity in ((-0.12, ACCURACY), (0.12, summary.BALANCED)):
            values = spreads(here, quantity)
            heights = [spread([i + shift]) for i in range(len(names))]
            _errorbar(panel, [values.get(name, Spread()) for name in names], heights, looks[quantity.title])
        panel.set_title(_join(place, titles))
        panel.set_yticks(range(len(names)), labels=[title_of(name, titles) for name in names])
        panel.set_ylim(len(names) - 0.5, -0.5)
        _label_axis(panel, "x", ACCURACY)
    _legend(figure, looks)
    return figure


@style()
def tradeoff(rows: Rows, titles: Titles) -> "Figure | None":
    """Accuracy against the cost of a request and of a prediction; a line joins the best trade-offs."""
    places = summary.places_of(rows)
    if not places:
        return None
    quantities = [summary.COST]
    if any(row.passes > 0 for row in rows):
        quantities.append(summary.PASSES)
    panels = list(itertools.product(places.items(), quantities))
    figure, axes = _grid(len(panels), 4.2)
    looks = _looks(dict.fromkeys(row.method for here in places.values() for row in here))
    for panel, ((place, here), quantity) in zip(axes, panels):
        costs, scores = spreads(here, quantity), spreads(here, ACCURACY)
        known = [name for name in costs if costs[name].known and scores[name].known]
        for name in known:
            _errorbar(panel, [costs[name]], [scores[name]], looks[name])
        points = [(costs[name].mean, scores[name].mean) for name in known]
        front = np.reshape([points[i] for i in pareto(points)], (-1, 2))
        panel.plot(*front.T, drawstyle="steps-post", color=GREY, linewidth=1.2, zorder=1, gid="front")
        panel.set_title(_join(place, titles))
        if quantity is summary.COST:  # 0 has a place below the lowest decade
            lowest = min((cost for cost, _ in points if cost > 0), default=1.0)
            panel.set_xscale("symlog", linthresh=10.0 ** math.floor(math.log10(lowest)))
        _label_axis(panel, "x", quantity)
        _label_axis(panel, "y", ACCURACY)
    _legend(figure, {title_of(name, titles): look for name, look in looks.items()})
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points (cost, accuracy) that no other beats, the cheapest first; of equal points all."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


@style()
def curves(experiment: str, x_title: str, second: Quantity | None, rows: Rows, titles: Titles) -> "Figure | None":
    """Accuracy and a second quantity along an experiment: panels for each data set and series, a curve for each method
    and backbone."""
    chosen = [row for row in rows if row.experiment == experiment]
    if not chosen:
        return None
    several = len({row.backbone for row in chosen}) > 1

    def label(row: Measurement) -> str:
        return _join((row.method, row.backbone) if several else (row.method,), titles)

    quantities = [ACCURACY] if second is None else [ACCURACY, second]
    panels = list(itertools.product(grouped(chosen, attrgetter("dataset", "series")).items(), quantities))
    figure, axes = _grid(len(panels), 3.0)
    looks = _looks(dict.fromkeys(map(label, chosen)))
    for panel, ((place, here), quantity) in zip(axes, panels):
        for curve, group in grouped(here, label).items():
            values = spreads(group, quantity, attrgetter("x"))
            x = sorted(values)
            _errorbar(panel, [spread([at]) for at in x], [values[at] for at in x], looks[curve], "-")
        panel.set_title(_join(place if place[1] else place[:1], titles))
        panel.set_xlabel(x_title)
        _label_axis(panel, "y", quantity)
    _legend(figure, looks)
    return figure


FIGURES: dict[str, tuple[str, "Callable[[Rows, Titles], Figure | None]"]] = {
    "accuracy": ("Accuracy (paper Figs. 3 and 4)", accuracy),
    "tradeoff": ("Accuracy against cost", tradeoff),
    "epochs": ("Accuracy over epochs (paper Fig. 5)", partial(curves, "epochs", "epochs", None)),
    "removal": (
        "Removal of data (paper Fig. 6, left)",
        partial(curves, "removal", "share of the records erased", None),
    ),
    "cut": (
        "Number of clusters (paper Fig. 6, right)",
        partial(curves, "cut", "cut of the tree (distance threshold, or K)", summary.CLUSTERS),
    ),
    "sequences": ("Sequences of requests", partial(curves, "sequence", "requests served", summary.SPENT)),
}


def write_figures(folder: Path, rows: Rows, titles: Titles) -> tuple[list[Path], list[tuple[str, bytes]]]:
    """Writes all figures, each completely or not at all; removes those that the rows do not hold.

    Returns the files, and the figures for the report as (heading, SVG). Raises `Stopped` as soon as it is asked for.
    """
    paths, pictures = [], []
    with progress("figures", len(FIGURES)) as shown:
        for name, (heading, draw) in FIGURES.items():
            interrupt.raise_if_stopped()
            figure = draw(rows, titles)
            paths += write_figure(folder, name, figure)
            if figure is not None:
                pictures.append((heading, paths[-1].read_bytes()))
            shown.advance(1, name)
    return paths, pictures


def write_figure(folder: Path, name: str, figure: "Figure | None") -> list[Path]:
    """Writes figures/NAME.png and .svg and returns them in this order; removes both where there is no figure."""
    paths = [folder / "figures" / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, picture(figure, path.suffix[1:]))
    return paths if figure is not None else []


def _join(names: Iterable[str], titles: Titles) -> str:
    return " · ".join(title_of(name, titles) for name in names)


def _grid(count: int, height: float, **shared: Any) -> "tuple[Figure, list[Axes]]":
    """A figure with so many panels, two side by side, in rows of `height` inches."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = blank(WIDTH if columns > 1 else 0.7 * WIDTH, rows * height + 0.6)
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _looks(names: Iterable[str]) -> Looks:
    return dict(zip(names, zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))))


def _errorbar(panel: "Axes", x: Sequence[Spread], y: Sequence[Spread], look: tuple[str, str], line: str = "") -> None:
    """Points at means with bars from the lowest to the highest seed."""
    colour, marker = look

    def reach(values: Sequence[Spread]) -> np.ndarray:  # [2, n]; a mean of equals may be off by a rounding
        lengths = [(value.mean - value.low, value.high - value.mean) for value in values]
        return np.maximum(np.transpose(lengths), 0.0)

    x_means, y_means = ([value.mean for value in values] for values in (x, y))
    panel.errorbar(x_means, y_means, reach(y), reach(x), color=colour, fmt=marker + line, elinewidth=1.2, capsize=2.5)


def _label_axis(panel: "Axes", which: str, quantity: Quantity) -> None:
    axis = getattr(panel, f"{which}axis")
    axis.set_label_text(quantity.title)
    axis.set_major_formatter(ticked)
    panel.grid(True, color=PALE, linewidth=0.8)


def _legend(figure: "Figure", looks: Looks) -> None:
    """One legend below all panels, in as many rows as it needs."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=marker, linestyle="") for colour, marker in looks.values()]
    labels = [f" {name}" if name.startswith("_") else name for name in looks]  # matplotlib leaves out "_name"
    columns = int(figure.get_figwidth() * 11 / (max(map(len, labels)) + 8))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(columns, len(labels))))
