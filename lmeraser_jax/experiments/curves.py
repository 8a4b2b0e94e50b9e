"""The figures of a comparison that are curves: along epochs, erased records, cuts of the tree, requests.

As in `figures`: from rows to a `Figure`, or to None where the rows do not hold the experiment.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmeraser_jax.evaluation.plotting import styled
from lmeraser_jax.experiments.drawing import DASHES, Curve, Look, curves, looks, panels
from lmeraser_jax.experiments.labels import part_names, settle
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.experiments.summary import (
    ACCURACY,
    CLUSTERS,
    SPENT,
    UNTITLED,
    Quantity,
    Rows,
    Spread,
    Titles,
    by_dataset,
    by_method,
    of,
    spreads,
    titled,
    unique,
)
from lmeraser_jax.experiments.uncertainty import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CROWD = 14  # curves of a panel at most; more are parted by their series
END = 40  # characters of the name at the end of a curve
SHORT = 30  # of names that leave room for two panels side by side


def epochs(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Accuracy after every so many epochs, a curve for every backbone and method (paper Fig. 5)."""
    return _along(rows, "epochs", titles, [ACCURACY], "epochs")


def removal(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Accuracy against the share of the records that was erased (paper Fig. 6, left)."""
    return _along(rows, "removal", titles, [ACCURACY], "records erased (%)", 100)


def cut(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Accuracy and number of clusters against the cut of the tree (paper Fig. 6, right)."""
    return _along(rows, "cut", titles, [ACCURACY, CLUSTERS], "cut of the tree (distance threshold, or K)")


def sequences(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Images passed so far, and accuracy, along sequences of requests."""
    return _along(rows, "sequence", titles, [SPENT, ACCURACY], "requests served")


@styled
def _along(
    all_rows: Rows, experiment: str, titles: Titles, quantities: Sequence[Quantity], x_title: str, factor: float = 1
) -> "Figure | None":
    """Curves along x: a row of panels for every data set, or for every one of its series where they are many."""
    rows = of(all_rows, experiment)
    if not rows:
        return None
    facets = [facet for dataset in unique(map(by_dataset, rows)) for facet in _facets(rows, dataset)]
    most = max(len(unique(map(_curve, here))) for _, here in facets)
    height = max(2.9, 0.75 + 0.19 * most)
    methods = looks(unique(map(by_method, all_rows)))
    drawn = [
        (title, quantity, _lines(here, quantity, titles, methods, factor))
        for title, here in facets
        for quantity in quantities
    ]
    short = max(len(line.label) for _, _, lines in drawn for line in lines) <= SHORT
    figure, axes = panels(len(drawn), 2 if short else 1, height, bars(rows, quantities))
    ends = []
    for panel, (title, quantity, lines) in zip(axes, drawn):
        ends.append(curves(panel, lines, quantity, x_title))
        panel.set_title(" · ".join(titled(part, titles) for part in title))
    settle(figure)
    for names in ends:
        part_names(names)
    return figure


def _curve(row: Measurement) -> tuple[str, str, str]:
    return row.method, row.backbone, row.series


def _facets(rows: Rows, dataset: str) -> list[tuple[tuple[str, ...], list[Measurement]]]:
    here = [row for row in rows if row.dataset == dataset]
    if len(unique(map(_curve, here))) <= CROWD:
        return [((dataset,), here)]
    series = unique(row.series for row in here)
    return [((dataset, name), [row for row in here if row.series == name]) for name in series]


def _lines(rows: Rows, quantity: Quantity, titles: Titles, methods: Mapping[str, Look], factor: float) -> list[Curve]:
    """One curve for every method, backbone and series, named by those of the three that differ.

    Methods differ in colour and marker, the rest in dashes; with one method, the rest in colour and marker.
    """
    names = unique(map(_curve, rows))
    differ = [i for i in range(3) if len({name[i] for name in names}) > 1] or [0]
    others = unique(name[1:] for name in names)
    single = looks(others) if len({name[0] for name in names}) == 1 else None
    lines = []
    for name in names:
        dash = DASHES[others.index(name[1:]) % len(DASHES)]
        look = single[name[1:]] if single else methods[name[0]]._replace(dash=dash)
        found: dict[float, Spread] = spreads(
            [row for row in rows if _curve(row) == name], quantity, lambda row: factor * row.x
        )
        label = titled(" · ".join(titled(name[i], titles) for i in differ), {}, END)
        lines.append(Curve(label, found, look))
    return lines
