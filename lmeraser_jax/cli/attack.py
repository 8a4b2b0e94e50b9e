"""lmeraser attack: try to find erased records in an unlearned model, and kept ones in the published one.

  lmeraser attack --workdir=DIR [--targets=64 | --records=ID ...] [--shadows=64] [--attacks=loss,lira,...] [--seed=N]

The command erases live records, the targets, in memory only: it changes nothing in the workdir and takes no lock. It
also runs every attack on the published slices, which keep the targets: an attack that misses them there says nothing
about erased ones. Unless you name them, the targets are the records that are predicted worst by slices that never saw
them. For each attacked cluster the command tunes about 3 x SHADOWS slices of half the cluster's size; loss, relearn
and routing alone need about a dozen, and relearn more if fewer than four clusters are attacked.

Exit code 0: at least one attack finds kept records, and none finds an erased one. 1: an attack finds an erased record.
3: the command can say nothing, because no attack finds even the kept records. lmeraser audit is the stronger check: it
compares every bit. See docs/verification.md.
"""

from lmeraser_jax.cli import common
from lmeraser_jax.evaluation.attacks.options import ATTACKS, Options, check

STRAY = "ids are given as --records=ID, once for each"
FLAGS = (
    common.Flag("targets", 64, "number of records to erase in memory"),
    common.Flag("records", (), "id of a record to erase in memory, in place of --targets; may be repeated"),
    common.Flag("shadows", 64, "shadow models for each cluster and each kind of slice, tuned on random halves"),
    common.Flag("attacks", [], "loss, lira, ulira, klom, relearn, routing, joined by commas; empty: all"),
    common.Flag("seed", 0, "seed of the random targets, halves and permutations"),
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
    with common.opened(arguments) as run_:
        from lmeraser_jax.evaluation.attacks.attack import attack

        result = attack(run_, options)
    common.show(arguments, result.text(), result.values())
    return result.code
