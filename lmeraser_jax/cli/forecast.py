"""lmeraser forecast: an estimate of what serving erasures at once, hourly, daily, weekly or as you like costs.

  lmeraser forecast --workdir=DIR --rate=REQUESTS_PER_DAY --window=DAYS [--images_per_second=X] [--figure=FILE.png]
  lmeraser forecast --workdir=DIR --rate=REQUESTS_PER_DAY --requests=K      (whenever exactly K requests have come)

Reads the catalog alone: clusters, their sizes and sampled members, images and seconds of their slices. Changes nothing
and waits for nobody. docs/theory.md has the formulas.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError, raise_all

if TYPE_CHECKING:
    from lmeraser_jax.experiments.policy import Forecast, Workload

TAKES_CONFIG = False  # it is the workdir's
NUMBERS = {"rate": "requests a day", "window": "days in which requests are collected", "images_per_second": "images"}
OR_REQUESTS = "; or --requests=K, requests that are collected"
FORMATS = (".png", ".svg", ".pdf")
LEAST, MOST = 1e-9, 1e9  # of any of the numbers
POINTS = 24  # values of lambda T in the picture


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_float("rate", None, "requests a day, above 0", flag_values=flags)
    absl_flags.DEFINE_float("window", None, "days in which requests are collected, above 0", flag_values=flags)
    text = "in place of --window: requests that are collected, 1 to the number of records"
    absl_flags.DEFINE_integer("requests", None, text, flag_values=flags)
    text = "images tuned per second by all devices together, above 0; by default each does what those that made this"
    text += " workdir's slices did"
    absl_flags.DEFINE_float("images_per_second", None, text, flag_values=flags)
    absl_flags.DEFINE_integer("devices", 1, "number of devices that tune, of all processes", flag_values=flags)
    text = "share of the clusters nobody named that a new clustering re-tunes, 0 to 1; by default of past ones, else 1"
    absl_flags.DEFINE_float("reclustered", None, text, flag_values=flags)
    text = "also draw formulas and simulated windows: a .png, .svg or .pdf"
    absl_flags.DEFINE_string("figure", "", text, flag_values=flags)


def run(arguments: common.Arguments) -> int:
    from lmeraser_jax.experiments import policy
    from lmeraser_jax.experiments.cost_model import Batch

    workload, changed, count = _checked(arguments), arguments["reclustered"], arguments["requests"]
    batch = Batch(count, fixed=True) if count else Batch(arguments["rate"] * arguments["window"])
    machine = workload.machine(arguments["devices"], arguments["images_per_second"])
    changed = workload.changed if changed is None else changed
    found = policy.forecast(workload, arguments["rate"], batch, machine, changed)
    if arguments["figure"]:
        _draw(arguments["figure"], found)
    common.show(arguments, found.table(), found.values())
    return 0


def _checked(arguments: common.Arguments) -> "Workload":
    """The workdir's workload. Raises `UserError` with everything that is wrong."""
    from lmeraser_jax.experiments import policy

    problems, workload = [*_illegal(arguments), *_undrawable(arguments["figure"])], None
    try:
        with common.catalog_of(common.workdir_of(arguments)) as (layout, catalog):
            workload = policy.published(layout, catalog)
        if workload.speed is None and arguments["images_per_second"] is None:
            problems.append("--images_per_second=X is missing: images, above 0; no slice of this program was timed")
        count = arguments["requests"]
        if count is not None and count > workload.clusters.records:
            problems.append(
                f"--requests={count}: must be at most the number of records, {workload.clusters.records:.0f}"
            )
    except UserError as error:
        problems.append(str(error))
    raise_all(problems)
    assert workload is not None
    return workload


def _illegal(arguments: common.Arguments) -> list[str]:
    problems, count = [], arguments["requests"]
    needed = {"rate"} if count is not None else {"rate", "window"}
    for name, what in NUMBERS.items():
        value = arguments[name]
        if value is None and name in needed:
            problems.append(f"--{name}=X is missing: {what}, a number above 0" + OR_REQUESTS * (name == "window"))
        elif value is not None and not LEAST <= value <= MOST:
            problems.append(f"--{name}={value:g}: {what}, must be a number from {LEAST:g} to {MOST:g}")
    if count is not None and arguments["window"] is not None:
        problems.append(f"--requests={count} and --window={arguments['window']:g}: give one of them")
    if count is not None and count < 1:
        problems.append(f"--requests={count}: must be at least 1")
    if arguments["devices"] < 1:
        problems.append(f"--devices={arguments['devices']}: must be at least 1")
    share = arguments["reclustered"]
    if share is not None and not 0 <= share <= 1:
        problems.append(f"--reclustered={share:g}: must be a share from 0 to 1")
    return problems


def _undrawable(target: str) -> list[str]:
    """Why a picture could not be written, told before the work is done."""
    if not target:
        return []
    if Path(target).suffix not in FORMATS:
        return [f"--figure={target}: must end in one of {', '.join(FORMATS)}"]
    from lmeraser_jax.evaluation import plotting

    try:
        plotting.required()
        common.check_target("figure", target)
    except UserError as error:
        return [str(error)]
    return []


def _draw(target: str, found: "Forecast") -> None:
    """From the rarest to the busiest of the policies with a window, at least until a request is expected."""
    import numpy as np

    from lmeraser_jax.experiments import simulation

    expected = [found.rate * policy.window_days for policy in found.policies if policy.window_days]
    requests = np.geomspace(min(expected), max(1.0, *expected), POINTS).tolist()
    simulation.figure(target, found.workload.clusters, requests, found.changed, found.machine)
