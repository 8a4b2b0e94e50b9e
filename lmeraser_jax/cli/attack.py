"""lmeraser attack: try to find erased records in an unlearned model, and kept ones in the published one.

  lmeraser attack --workdir=DIR [--targets=64 | --records=ID,ID] [--shadows=64] [--attacks=loss,lira,...] [--seed=N]
                  [--figure=FILE.png]

Live records are erased in memory only: the workdir stays as it is, and no lock is taken. Every attack is also made on
the published slices, which keep the records; an attack that misses them there says nothing about erased ones. Targets
are the records that slices which never saw them answer worst, or those that are named. The attack tunes about 3 x
shadows slices of half a cluster's size for each attacked cluster; loss, relearn and routing alone need about a dozen,
and relearn more where fewer than four clusters are attacked.

Exit code 0: an attack that finds kept records finds no erased one, and no other attack does. 1: an attack finds an
erased record. 3: nothing can be said, since no attack finds even the kept ones. lmeraser audit is the stronger check:
it compares every bit. See docs/verification.md.
"""

from collections.abc import Sequence
from pathlib import Path

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import plotting
from lmeraser_jax.evaluation.attacks.options import ATTACKS, Options, check

STRAY = "ids are given as --records=ID,ID"
FLAGS = (
    Flag("targets", 64, "records to erase in memory, drawn by the seed"),
    Flag("records", [], "ids of live records to erase in memory instead"),
    Flag("shadows", 64, "shadow models of a cluster and population, tuned on random halves"),
    Flag("attacks", [], "loss, lira, ulira, klom, relearn, routing; empty: all"),
    Flag("seed", 0, "of targets, halves and permutations"),
    Flag("figure", "", "also draw ROC curves to this PNG"),
)


def run(arguments: common.Arguments) -> int:
    workdir, _ = common.finished(arguments)
    options = Options(
        attacks=tuple(dict.fromkeys(arguments["attacks"])) or ATTACKS,
        records=tuple(arguments["records"]),
        **{name: arguments[name] for name in ("targets", "shadows", "seed")},
    )
    with common.catalog_of(workdir) as (layout, catalog):
        check(layout, catalog, options)  # before JAX is loaded
    figure = arguments["figure"]
    if figure:
        _check_figure(figure, options.attacks)
    with common.opened(arguments) as run_:
        from lmeraser_jax.evaluation.attacks import report
        from lmeraser_jax.evaluation.attacks.attack import attack

        result = attack(run_, options)
    common.show(arguments, result.text(), result.values())
    if figure:
        report.figure(result.findings, Path(figure))
    return result.code


def _check_figure(target: str, attacks: Sequence[str]) -> None:
    """Refuses a figure that cannot be drawn or written before the work begins, not after it."""
    if not {"loss", "lira"} & set(attacks):
        raise UserError(f"--figure={target}: ROC curves are those of loss and lira; name one in --attacks")
    if not target.endswith(".png"):
        raise UserError(f"--figure={target}: the name must end in .png")
    plotting.required()
    common.check_target("figure", target)
