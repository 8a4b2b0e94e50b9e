"""The tables of a comparison as HTML; every text that comes from rows or titles is escaped."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

from lmeraser_jax.experiments.summary import (
    ACCURACY,
    BALANCED,
    CLUSTERS,
    COST,
    FULL,
    IMAGES,
    MISSING,
    PARAMETERS,
    PASSES,
    RECORDS,
    SAMPLED,
    SECONDS,
    TEST_ERROR,
    UNSAMPLED,
    WORST,
    Quantity,
    Rows,
    Spread,
    Titles,
    by_method,
    clean,
    main,
    spreads,
    titled,
    unique,
)

COLUMNS = (ACCURACY, TEST_ERROR, BALANCED, COST, WORST, SECONDS, PASSES, RECORDS, PARAMETERS, FULL, CLUSTERS)
NAME = 200  # characters of a name


def escaped(value: object) -> str:
    """Safe between tags and in quoted attributes."""
    return html.escape(clean(value), quote=True)


def named(name: str, titles: Titles) -> str:
    return escaped(titled(name, titles, NAME))


def listed(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(text)}</li>' for text in texts)}</ul>"


def methods(rows: Rows, titles: Titles) -> str:
    """For every data set a row for every method, a column for every quantity that was measured; best means marked."""
    chosen, tables = main(rows), []
    for dataset in unique(row.dataset for row in chosen):
        here = [row for row in chosen if row.dataset == dataset]
        names = unique(row.method for row in here)
        columns = [q for q in COLUMNS if any(math.isfinite(q.of(row)) and q.of(row) for row in here)]
        cells = [_column(quantity, spreads(here, quantity, by_method), names) for quantity in columns]
        records = max(row.records for row in here)
        caption = f"{named(dataset, titles)}, {named(here[0].backbone, titles)}, {records:,} records"
        heads = [escaped(quantity.title) for quantity in columns]
        tables.append(_table(caption, "method", heads, [named(name, titles) for name in names], list(zip(*cells))))
    return "".join(tables)


def requests(rows: Rows, titles: Titles) -> str:
    """Paper Table 3, time per request, and images; a row for every method, a column for every data set.

    The time, too, of requests for records that are not sampled and for sampled ones, where it is known.
    """
    chosen, tables = main(rows), []
    datasets, names = unique(row.dataset for row in chosen), unique(row.method for row in chosen)
    heads, stubs = [named(dataset, titles) for dataset in datasets], [named(name, titles) for name in names]
    for quantity in (SECONDS, UNSAMPLED, SAMPLED, IMAGES):
        found = [spreads([row for row in chosen if row.dataset == d], quantity, by_method) for d in datasets]
        if any(value.known for column in found for value in column.values()):
            cells = [_column(quantity, column, names) for column in found]
            tables.append(_table(escaped(quantity.title), "method", heads, stubs, list(zip(*cells))))
    return "".join(tables) or "<p>not measured</p>"


def not_numbers(rows: Rows, titles: Titles) -> str:
    """Names the numbers that are not finite; whatever needs them is shown as missing."""
    bad = unique(
        f"{titled(row.dataset, titles)}, {titled(row.method, titles)}, {row.experiment}, seed {row.seed}: {field}"
        for row in rows
        for field, value in dataclasses.asdict(row).items()
        if isinstance(value, float) and not math.isfinite(value)
    )
    return f"<p>Not finite, and shown as missing with all that is computed from them:</p>{listed(bad)}" if bad else ""


def _column(quantity: Quantity, found: Mapping[str, Spread], names: Sequence[str]) -> list[str]:
    """Cells of one quantity; those that read like the best mean are marked, unless all do."""
    values = [found.get(name, MISSING) for name in names]
    known = [value.mean for value in values if value.known]
    marked = [False] * len(values)
    if quantity.best and known:
        best = quantity.best(known)
        like = [value.known and quantity.text(value.mean, value.mean) == quantity.text(best, best) for value in values]
        marked = like if sum(like) < len(known) else marked
    return [f"<td{' class=best' * mark}>{escaped(quantity.shown(value))}</td>" for value, mark in zip(values, marked)]


def _table(
    caption: str, corner: str, heads: Sequence[str], stubs: Sequence[str], lines: Sequence[Sequence[str]]
) -> str:
    """Takes safe HTML only."""
    head = "".join(f'<th scope="col">{text}</th>' for text in (corner, *heads))
    body = "".join(f'<tr><th scope="row">{stub}</th>{"".join(line)}</tr>' for stub, line in zip(stubs, lines))
    table = f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
