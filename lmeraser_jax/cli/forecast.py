"""lmeraser forecast: estimate what serving erasures at once, hourly, daily, weekly or otherwise costs.

  lmeraser forecast --workdir=DIR --rate=REQUESTS_PER_DAY --window=DAYS [--devices=N]
  lmeraser forecast --workdir=DIR --rate=REQUESTS_PER_DAY --requests=K      (serves whenever K requests have come)

The estimate uses the sizes and sampled members of the clusters, and the images and seconds of their slices. The command
changes nothing and does not wait for the lock. docs/theory.md has the formulas.
"""

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.experiments.cost_model import Batch, Workload, forecast, read_workload

TAKES_CONFIG = False  # the workdir's config counts
LEAST, MOST = 1e-9, 1e9  # of a rate or a window
FLAGS = (
    common.Flag("rate", float, "requests a day, above 0"),
    common.Flag("window", float, "days in which requests are collected, above 0"),
    common.Flag(
        "requests", int, "in place of --window: requests that are collected, 1 to the number of records", low=1
    ),
    common.Flag("devices", 1, "number of devices that tune, over all processes", low=1),
)


def run(arguments: common.Arguments) -> int:
    workload, count = _check(arguments), arguments["requests"]
    batch = Batch(count, fixed=True) if count else Batch(arguments["rate"] * arguments["window"])
    result = forecast(workload, arguments["rate"], batch)
    common.show(arguments, result.table(), result.values())
    return 0


def _check(arguments: common.Arguments) -> Workload:
    """The workdir's workload. Raises `UserError` with everything that is wrong."""
    count, window, workload = arguments["requests"], arguments["window"], None
    problems = _number_problems("rate", arguments["rate"], "requests a day")
    if count is None:
        problems += _number_problems("window", window, "days of collecting (or give --requests=K)")
    elif window is not None:
        problems.append(f"--requests={count} and --window={window:g}: give one of them")
    try:
        with common.catalog_of(common.workdir_of(arguments)) as (layout, catalog):
            workload = read_workload(layout, catalog, arguments["devices"])
            if count is not None and count > workload.clusters.records:
                problems.append(f"--requests={count}: must be at most the {workload.clusters.records:.0f} records")
    except UserError as error:
        problems.append(str(error))
    raise_all(problems)
    assert workload is not None
    return workload


def _number_problems(name: str, value: float | None, meaning: str) -> list[str]:
    if value is None:
        return [f"--{name}=X is missing: {meaning}, a number above 0"]
    if not LEAST <= value <= MOST:
        return [f"--{name}={value:g}: {meaning}, must be a number from {LEAST:g} to {MOST:g}"]
    return []
