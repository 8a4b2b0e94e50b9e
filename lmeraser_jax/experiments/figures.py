"""The figures of a comparison: from rows to a `Figure`, or to None where the rows do not hold the experiment.

Everywhere: mean over the seeds, and the bar that `summary.Quantity.bar` says. `titles` names methods, data sets and
backbones for people.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmeraser_jax.evaluation.plotting import COLOURS, styled
from lmeraser_jax.experiments.drawing import Group, Look, dots, legend, looks, panels
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.experiments.summary import (
    ACCURACY,
    BALANCED,
    IMAGES,
    PARAMETERS,
    RECORDS,
    SECONDS,
    UNTITLED,
    Quantity,
    Rows,
    Titles,
    by_dataset,
    by_method,
    main,
    on_several,
    spreads,
    titled,
    unique,
)
from lmeraser_jax.experiments.uncertainty import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTITIONS = ("lmeraser", "rndpart")
HEADS = ("lmeraser", "one-head")


@styled
def accuracy(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Accuracy of every method on every data set (paper Fig. 3); balanced accuracy as hollow dots."""
    chosen = main(rows)
    if not chosen:
        return None
    methods = _ordered(chosen, ACCURACY)
    datasets = unique(row.dataset for row in chosen)
    note = bars(chosen, [ACCURACY])
    figure, axes = panels(len(datasets), 3, 1.1 + 0.34 * len(methods), note, sharey=True)
    for panel, dataset in zip(axes, datasets):
        here = [row for row in chosen if row.dataset == dataset]
        groups = [
            Group("accuracy", spreads(here, ACCURACY, by_method), Look(COLOURS[0], "o")),
            Group("balanced accuracy", spreads(here, BALANCED, by_method), Look(COLOURS[1], "o"), hollow=True),
        ]
        dots(panel, methods, [titled(name, titles) for name in methods], groups, ACCURACY)
        panel.set_title(titled(dataset, titles))
    legend(figure, axes[0])
    return figure


@styled
def backbones(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Accuracy by backbone (paper Fig. 4), a panel for every method that was measured on several."""
    methods = on_several(rows)
    several, names = unique(map(by_method, methods)), unique(row.backbone for row in methods)
    if not several:
        return None
    datasets = unique(map(by_dataset, methods))
    look = looks(names)
    height = 1.2 + len(datasets) * _row_height(len(names))
    figure, axes = panels(len(several), 2, height, bars(methods, [ACCURACY]), sharey=True)
    for panel, method in zip(axes, several):
        here = [row for row in methods if row.method == method]
        found = {name: spreads([row for row in here if row.backbone == name], ACCURACY, by_dataset) for name in names}
        groups = [Group(titled(name, titles), found[name], look[name]) for name in names]
        dots(panel, datasets, [titled(name, titles) for name in datasets], groups, ACCURACY)
        panel.set_title(titled(method, titles))
    legend(figure, axes[0])
    return figure


@styled
def affected(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Records and parameters that a mean request affects (paper Fig. 7)."""
    chosen = main(rows)
    return _compared(
        chosen, titles, measured(chosen, [RECORDS, PARAMETERS]), by_method, by_dataset, looks_of(rows, by_dataset)
    )


@styled
def effort(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Time and images of a mean request (paper Table 3)."""
    chosen = main(rows)
    return _compared(
        chosen, titles, measured(chosen, [SECONDS, IMAGES]), by_method, by_dataset, looks_of(rows, by_dataset)
    )


def partitions(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """Adaptive clusters against a random partition: accuracy and cost (paper Fig. 8)."""
    return pair(rows, *PARTITIONS, titles)


def heads(rows: Rows, titles: Titles = UNTITLED) -> "Figure | None":
    """A head for every cluster against one head for all: accuracy and cost (paper Fig. 9)."""
    return pair(rows, *HEADS, titles)


@styled
def pair(rows: Rows, first: str, second: str, titles: Titles = UNTITLED) -> "Figure | None":
    """Accuracy and cost of two methods on the data sets where both were measured."""
    chosen = rows_of_pair(rows, first, second)
    costs = measured(chosen, [SECONDS, IMAGES])
    return _compared(chosen, titles, [ACCURACY, *costs], by_dataset, by_method, looks_of(rows, by_method))


def rows_of_pair(rows: Rows, first: str, second: str) -> list[Measurement]:
    """Those that `pair` draws, of the first method first."""
    chosen = [row for row in main(rows) if row.method in (first, second)]
    both = {row.dataset for row in chosen if row.method == first} & {r.dataset for r in chosen if r.method == second}
    return sorted((row for row in chosen if row.dataset in both), key=lambda row: row.method != first)


def looks_of(rows: Rows, name: Callable[[Measurement], str]) -> dict[str, Look]:
    """One look for a method or a data set in all figures of the same rows."""
    return looks(unique(map(name, rows)))


def _ordered(rows: Rows, quantity: Quantity) -> list[str]:
    """Methods, the best mean over the data sets first, those without any last."""
    found = spreads(rows, quantity, by_method)
    sign = -1 if quantity.best is max else 1
    return sorted(found, key=lambda name: sign * found[name].mean if found[name].known else math.inf)


def measured(rows: Rows, quantities: Iterable[Quantity]) -> list[Quantity]:
    """Those that some row holds: no column of zeros that nobody measured."""
    return [q for q in quantities if any(np.isfinite(q.of(row)) and q.of(row) > 0 for row in rows)]


def _row_height(groups: int) -> float:
    """Inches of a row of dots."""
    return 0.32 + 0.1 * (groups - 1)


def _compared(
    rows: Rows,
    titles: Titles,
    quantities: Sequence[Quantity],
    by: Callable[[Measurement], str],
    group: Callable[[Measurement], str],
    look: Mapping[str, Look],
) -> "Figure | None":
    """A panel for every quantity, a row for every `by`, a look for every `group`."""
    if not rows or not quantities:
        return None
    names = _ordered(rows, quantities[0]) if by is by_method else unique(map(by, rows))
    groups = unique(map(group, rows))
    height = 1.2 + len(names) * _row_height(len(groups))
    figure, axes = panels(len(quantities), 3, height, bars(rows, quantities), sharey=True)
    for panel, quantity in zip(axes, quantities):
        shown = [
            Group(titled(name, titles), spreads([r for r in rows if group(r) == name], quantity, by), look[name])
            for name in groups
        ]
        dots(panel, names, [titled(name, titles) for name in names], shown, quantity)
    legend(figure, axes[0])
    return figure
