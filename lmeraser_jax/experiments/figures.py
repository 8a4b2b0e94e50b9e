"""The figures of a comparison: from rows to a `Figure`, or to None where the rows do not hold the experiment.

Everywhere: means over the seeds, and bars from the lowest to the highest seed. Costs stand on a logarithmic axis that
begins with 0. `titles` names methods, data sets and backbones for people.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmeraser_jax import interrupt
from lmeraser_jax.evaluation.plotting import COLOURS, GREY, PALE, blank, picture, styled, ticked
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.experiments.summary import (
    ACCURACY,
    BALANCED,
    CLUSTERS,
    COST,
    IMAGES,
    PARAMETERS,
    PASSES,
    RECORDS,
    SECONDS,
    SPENT,
    UNKNOWN,
    Plate,
    Quantity,
    Rows,
    Spread,
    Titles,
    by_dataset,
    by_method,
    main_rows,
    rows_of,
    spread,
    spreads,
    title_of,
    unique,
)
from lmeraser_jax.progress import progress
from lmeraser_jax.storage.atomic_files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")  # one more than colours: 56 pairs
WIDTH = 10.0  # inches of a figure
LONGEST = 40  # characters of a name
LINEAR = (ACCURACY, BALANCED, CLUSTERS, PASSES, SPENT)  # quantities whose axis is not logarithmic


class Look(NamedTuple):
    """How a method, data set, backbone or curve is drawn."""

    colour: str
    marker: str


class Group(NamedTuple):
    """Points of one look: their label, and {place: number}."""

    label: str
    values: Mapping[Any, Spread]


@styled
def accuracy(rows: Rows, titles: Titles) -> "Figure | None":
    """Accuracy and balanced accuracy of every method on every data set (paper Fig. 3), the best method on top."""
    chosen = main_rows(rows)
    panels = []
    for dataset in unique(map(by_dataset, chosen)):
        here = [row for row in chosen if row.dataset == dataset]
        groups = [Group(quantity.title, spreads(here, quantity, by_method)) for quantity in (ACCURACY, BALANCED)]
        panels.append((title_of(dataset, titles, LONGEST), ACCURACY, groups))
    return _dots(panels, _best_first(chosen), titles)


@styled
def requests(rows: Rows, titles: Titles) -> "Figure | None":
    """Time and images of a mean request, and what it affects (paper Table 3 and Fig. 7)."""
    chosen = main_rows(rows)
    panels = []
    for quantity in _measured(chosen, (SECONDS, IMAGES, RECORDS, PARAMETERS)):
        panels.append(("", quantity, _groups(chosen, quantity, by_dataset, by_method, titles)))
    return _dots(panels, _best_first(chosen), titles)


@styled
def backbones(rows: Rows, titles: Titles) -> "Figure | None":
    """Accuracy by backbone (paper Fig. 4), a panel for every method that was measured with several backbones."""
    methods, panels = rows_of(rows, "methods"), []
    for method in unique(map(by_method, methods)):
        here = [row for row in methods if row.method == method]
        if len({row.backbone for row in here}) > 1:
            groups = _groups(here, ACCURACY, lambda row: row.backbone, by_dataset, titles)
            panels.append((title_of(method, titles, LONGEST), ACCURACY, groups))
    return _dots(panels, unique(map(by_dataset, methods)), titles)


@styled
def tradeoff(rows: Rows, titles: Titles) -> "Figure | None":
    """Accuracy against the cost of a request and of a prediction; a line joins the best trade-offs."""
    chosen = main_rows(rows)
    if not chosen:
        return None
    names = _best_first(chosen)
    panels = list(itertools.product(unique(map(by_dataset, chosen)), _measured(chosen, (COST, PASSES)) or [COST]))
    figure, axes = _grid(len(panels), 4.2)
    looks = _looks(names)
    for panel, (dataset, quantity) in zip(axes, panels):
        here = [row for row in chosen if row.dataset == dataset]
        costs, scores = spreads(here, quantity, by_method), spreads(here, ACCURACY, by_method)
        known = [name for name in names if name in costs and costs[name].known and scores[name].known]
        for name in known:
            _errorbar(panel, [costs[name]], [scores[name]], looks[name])
        points = [(costs[name].mean, scores[name].mean) for name in known]
        front = [points[i] for i in pareto(points)]
        panel.plot(*np.transpose(front), drawstyle="steps-post", color=GREY, linewidth=1.2, zorder=1, gid="front")
        panel.set_title(title_of(dataset, titles, LONGEST))
        _scale(panel, "x", quantity, costs.values())
        _scale(panel, "y", ACCURACY, scores.values())
    _legend(figure, {title_of(name, titles, LONGEST): look for name, look in looks.items()})
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points (cost, accuracy) that no other beats, the cheapest first; of equal points all."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


@styled
def curves(
    rows: Rows, titles: Titles, experiment: str, x_title: str, quantities: Sequence[Quantity] = (ACCURACY,)
) -> "Figure | None":
    """Panels for every data set and series of an experiment, a curve for every method and backbone."""
    chosen = rows_of(rows, experiment)
    if not chosen:
        return None
    several = len({row.backbone for row in chosen}) > 1

    def label(row: Measurement) -> str:
        names = (row.method, row.backbone) if several else (row.method,)
        return " · ".join(title_of(name, titles, LONGEST) for name in names)

    panels = list(itertools.product(unique((row.dataset, row.series) for row in chosen), quantities))
    figure, axes = _grid(len(panels), 3.0)
    looks = _looks(unique(map(label, chosen)))
    for panel, (place, quantity) in zip(axes, panels):
        here = [row for row in chosen if (row.dataset, row.series) == place]
        for curve in unique(map(label, here)):
            values = spreads([row for row in here if label(row) == curve], quantity, lambda row: row.x)
            x = sorted(values)
            _errorbar(panel, [spread([at]) for at in x], [values[at] for at in x], looks[curve], "-")
        names = place if place[1] else place[:1]
        panel.set_title(" · ".join(title_of(name, titles, LONGEST) for name in names))
        panel.set_xlabel(x_title)
        _scale(panel, "y", quantity, [spread([quantity.of(row)]) for row in here])
    _legend(figure, looks)
    return figure


FIGURES: dict[str, tuple[str, "Callable[[Rows, Titles], Figure | None]"]] = {
    "accuracy": ("Accuracy (paper Fig. 3)", accuracy),
    "tradeoff": ("Accuracy against cost", tradeoff),
    "requests": ("What a request takes and affects (paper Table 3 and Fig. 7)", requests),
    "backbones": ("Backbones (paper Fig. 4)", backbones),
    "epochs": ("Accuracy over epochs (paper Fig. 5)", partial(curves, experiment="epochs", x_title="epochs")),
    "removal": (
        "Removal of data (paper Fig. 6, left)",
        partial(curves, experiment="removal", x_title="share of the records erased"),
    ),
    "cut": (
        "Number of clusters (paper Fig. 6, right)",
        partial(curves, experiment="cut", x_title="cut (distance threshold, or K)", quantities=(ACCURACY, CLUSTERS)),
    ),
    "sequences": (
        "Sequences of requests",
        partial(curves, experiment="sequence", x_title="requests served", quantities=(SPENT, ACCURACY)),
    ),
}


def write_figures(folder: Path, rows: Rows, titles: Titles) -> tuple[list[Path], list[Plate]]:
    """Writes figures/NAME.png and .svg, each completely or not at all; removes figures that the rows do not hold.

    Returns:
        The files, and the figures for the report.

    Raises:
        UserError: matplotlib is missing.
        Stopped: the process was asked to stop.
    """
    paths, plates = [], []
    with progress("figures", len(FIGURES)) as shown:
        for name, (heading, draw) in FIGURES.items():
            interrupt.raise_if_stopped()
            figure = draw(rows, titles)
            files = {kind: folder / "figures" / f"{name}.{kind}" for kind in ("png", "svg")}
            for kind, path in files.items():
                if figure is None:
                    path.unlink(missing_ok=True)
                else:
                    write_bytes(path, picture(figure, kind))
                    paths.append(path)
            if figure is not None:
                plates.append(Plate(heading, files["svg"].read_bytes()))
            shown.advance(1, name)
    return paths, plates


def _best_first(rows: Rows) -> list[str]:
    """Methods by their accuracy, the best mean over all data sets first, those without any last."""
    values = spreads(rows, ACCURACY, by_method)
    return sorted(values, key=lambda name: -values[name].mean if values[name].known else math.inf)


def _measured(rows: Rows, quantities: Iterable[Quantity]) -> list[Quantity]:
    """The quantities that some row holds."""
    return [quantity for quantity in quantities if any(quantity.of(row) > 0 for row in rows)]


def _groups(
    rows: Rows,
    quantity: Quantity,
    group_of: Callable[[Measurement], str],
    place_of: Callable[[Measurement], str],
    titles: Titles,
) -> list[Group]:
    groups = {name: [row for row in rows if group_of(row) == name] for name in unique(map(group_of, rows))}
    return [Group(title_of(name, titles, LONGEST), spreads(here, quantity, place_of)) for name, here in groups.items()]


def _dots(
    panels: Sequence[tuple[str, Quantity, Sequence[Group]]], names: Sequence[str], titles: Titles
) -> "Figure | None":
    """A panel for every title, quantity and its groups; a row for every name, from the top; None without panels."""
    if not panels:
        return None
    figure, axes = _grid(len(panels), 1.0 + 0.3 * len(names), sharey=True)
    looks = _looks(unique(group.label for _, _, groups in panels for group in groups))
    for panel, (title, quantity, groups) in zip(axes, panels):
        for i, group in enumerate(groups):
            height = (i - (len(groups) - 1) / 2) * 0.6 / len(groups)
            rows = [spread([place + height]) for place in range(len(names))]
            _errorbar(panel, [group.values.get(name, UNKNOWN) for name in names], rows, looks[group.label])
        panel.set_title(title)
        panel.set_yticks(range(len(names)), labels=[title_of(name, titles, LONGEST) for name in names])
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.tick_params("y", length=0)
        _scale(panel, "x", quantity, [value for group in groups for value in group.values.values()])
    _legend(figure, looks)
    return figure


def _grid(count: int, height: float, **shared: Any) -> "tuple[Figure, list[Axes]]":
    """A figure with so many panels, two side by side, in rows of `height` inches."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = blank(WIDTH if columns > 1 else 0.7 * WIDTH, rows * height + 0.6)
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _looks(names: Iterable[str]) -> dict[str, Look]:
    """A colour and a marker for each name."""
    return {name: Look(*look) for name, *look in zip(names, itertools.cycle(COLOURS), itertools.cycle(MARKERS))}


def _errorbar(panel: "Axes", x: Sequence[Spread], y: Sequence[Spread], look: Look, line: str = "") -> None:
    """Points at means with bars from the lowest to the highest seed."""
    panel.errorbar(
        [value.mean for value in x],
        [value.mean for value in y],
        yerr=_reach(y),
        xerr=_reach(x),
        color=look.colour,
        fmt=look.marker + line,
        markersize=6,
        elinewidth=1.2,
        capsize=2.5,
    )


def _reach(values: Sequence[Spread]) -> np.ndarray:
    """Lengths of the bars below and above the means, [2, n]; a mean of equals may be off by a rounding."""
    lengths = [(value.mean - value.low, value.high - value.mean) for value in values]
    return np.maximum(np.transpose(lengths), 0.0)


def _scale(panel: "Axes", which: str, quantity: Quantity, values: Iterable[Spread]) -> None:
    """Titles the x or y axis; one that is logarithmic begins with 0, below its lowest decade."""
    from matplotlib.ticker import FuncFormatter

    known = [value for value in values if value.known]
    positive = [value.mean for value in known if value.mean > 0]
    if quantity not in LINEAR and positive:
        lowest = 10.0 ** math.floor(math.log10(min(positive)))
        getattr(panel, f"set_{which}scale")("symlog", linthresh=lowest)
        getattr(panel, f"set_{which}lim")(-0.3 * lowest, 1.5 * max(value.high for value in known))
    axis = getattr(panel, f"{which}axis")
    axis.set_label_text(quantity.title)
    axis.set_major_formatter(FuncFormatter(ticked))
    panel.grid(True, color=PALE, linewidth=0.8)


def _legend(figure: "Figure", looks: Mapping[str, Look]) -> None:
    """One legend below all panels, in as many rows as it needs."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=look.colour, marker=look.marker, linestyle="") for look in looks.values()]
    columns = int(figure.get_figwidth() * 11 / (max(map(len, looks)) + 8))
    figure.legend(handles, list(looks), loc="outside lower center", ncols=max(1, min(columns, len(looks))))
