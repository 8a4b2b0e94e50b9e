"""A comparison for a terminal: a table for every data set, and what the report says of it in a sentence."""

from lmeraser_jax.experiments import findings
from lmeraser_jax.experiments.results import Results
from lmeraser_jax.experiments.summary import (
    ACCURACY,
    BALANCED,
    COST,
    SECONDS,
    Titles,
    by_method,
    main,
    spreads,
    titled,
    unique,
)
from lmeraser_jax.experiments.summary import of as of_experiment
from lmeraser_jax.experiments.uncertainty import test_error

COLUMNS = ((ACCURACY, "accuracy, %"), (BALANCED, "balanced, %"), (COST, "images, % of all"), (SECONDS, "s a request"))
CURVES = {
    "removal": findings.removal,
    "cut": findings.cut,
    "epochs": findings.epochs,
    "sequence": findings.sequences,
}
PLUS_MINUS = "±: one standard deviation over seeds; without the error of a test set that all seeds share."


def table(results: Results, titles: Titles) -> str:
    """Means and standard deviations over the seeds; best accuracy first."""
    lines = []
    chosen = main(results.rows)
    for dataset in unique(row.dataset for row in chosen):
        here = [row for row in chosen if row.dataset == dataset]
        seeds = len({row.seed for row in here})
        columns = [spreads(here, quantity, by_method) for quantity, _ in COLUMNS]
        names = sorted(columns[0], key=lambda name: -columns[0][name].mean)
        width = max(len(titled(name, titles)) for name in names)
        lines.append(f"{titled(dataset, titles)}, {titled(here[0].backbone, titles)}, {seeds} seed{'s' * (seeds > 1)}")
        lines.append(f"  {'':<{width}}" + "".join(f"{heading:>18}" for _, heading in COLUMNS))
        for name in names:
            cells = [quantity.shown(found[name]) for (quantity, _), found in zip(COLUMNS, columns, strict=True)]
            lines.append(f"  {titled(name, titles):<{width}}" + "".join(f"{cell:>18}" for cell in cells))
        lines += [f"  {line}" for line in (PLUS_MINUS, test_error(here)) if line]
    if chosen:
        lines += findings.accuracy(results.rows, titles) + findings.tradeoff(results.rows, titles)
    for name, say in CURVES.items():
        lines += say(results.rows, titles) if of_experiment(results.rows, name) else []
    return "\n".join(lines)
