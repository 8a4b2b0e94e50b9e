"""Attacks a workdir: erases live records in memory and tries to find them in the slices of their clusters.

Of each cluster: the published slice, which keeps the records (positive control); the one that erasing them would
publish; one tuned from scratch without them, the reference. Nothing is written and no lock is taken.
"""

import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmeraser_jax.evaluation.attacks import shadows, statistics, targets, unlearned
from lmeraser_jax.evaluation.attacks.options import Options, check
from lmeraser_jax.evaluation.attacks.relearn import relearn, scratch_for
from lmeraser_jax.evaluation.attacks.report import MEMBERSHIP, Attack, Finding
from lmeraser_jax.evaluation.attacks.routing import routing
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION, Pool
from lmeraser_jax.evaluation.attacks.statistics import RATES, SIGNIFICANT
from lmeraser_jax.hashing import philox
from lmeraser_jax.progress import progress
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.run import Run

POPULATIONS = ("ulira", "klom")  # attacks on slices that unlearned and slices that never saw
SHADOWED = ("lira", *POPULATIONS)  # attacks that need shadow models


class Trial(NamedTuple):
    """A pool with its slices: kept, unlearned, then from scratch."""

    pool: Pool
    slices: tuple[Slice, ...]
    again: Slice | None  # one more slice that keeps the records; None where nothing is learned again
    margins: np.ndarray  # float64 [3, n], of the pool's records under the first three slices
    right: np.ndarray  # bool [3, n], whether these gave the right answer
    shadow_sets: shadows.ShadowSets | None  # None where no attack needs shadow models


def attack(run: Run, options: Options) -> Attack:
    """Attacks a published state.

    Raises:
        UserError: the options or the workdir do not allow it, all reasons at once; a shadow's loss was not finite;
            or a record was erased meanwhile.
    """
    check(run.layout, run.catalog, options)
    start = time.perf_counter()
    trials = _trials(run, options) if options.on_slices else []
    findings = {name: _finding(run, name, trials, options) for name in options.attacks}
    targets.refuse_changed(run, [trial.pool for trial in trials])
    return Attack(
        clusters=len(trials),
        targets=sum(len(trial.pool.of(FORGOTTEN)) for trial in trials),
        outside=sum(len(trial.pool.of(OUTSIDE)) for trial in trials),
        shadows=0 if set(options.attacks).isdisjoint(SHADOWED) else options.shadows,
        seconds=time.perf_counter() - start,
        accuracies=_accuracies(trials) if trials else {},
        findings=tuple(finding for finding in findings.values() if finding is not None),
        skipped=tuple(name for name, finding in findings.items() if finding is None),
    )


def _trials(run: Run, options: Options) -> list[Trial]:
    """Tunes everything that the attacks on slices need."""
    seed, chosen = options.seed, set(options.attacks)
    pools = targets.draw(run, options.records, options.targets, seed)
    relearned = "relearn" in options.attacks and not run.config.tuning.closed
    scratch = scratch_for(len(pools), options.shadows) if relearned else 1
    clusters = []
    for pool in pools:
        retained = pool.of(RETAINED)
        clusters.append((pool.key, retained))  # what the erasure leaves
        clusters += [(f"{pool.key}/scratch/{seed}/{i}", retained) for i in range(scratch)]
        if relearned:
            clusters.append((f"{pool.key}/again/{seed}", pool.of(FORGOTTEN, RETAINED)))
    tuned = iter(shadows.tune_counterfactuals(run, run.tuning_spec, clusters))
    trials = []
    with progress("attacked clusters", len(pools)) as bar:
        for pool in pools:
            slices = (load_slice(run, pool.ref), *itertools.islice(tuned, 1 + scratch))
            again = next(tuned) if relearned else None
            margins, right = shadows.score(run, slices[:3], pool.records)
            sets = None
            if not chosen.isdisjoint(SHADOWED):
                populations = not chosen.isdisjoint(POPULATIONS)
                sets = shadows.shadow_sets(run, pool, options.shadows, seed, populations)
            trials.append(Trial(pool, slices, again, margins, right, sets))
            bar.advance(1)
    return trials


def _finding(run: Run, name: str, trials: Sequence[Trial], options: Options) -> Finding | None:
    """What one attack finds; None where there is nothing that it could attack."""
    rng = philox(options.seed, "attack", name)
    if name == "routing":
        return routing(run, options.seed)
    if name == "relearn":
        again = [trial.again for trial in trials if trial.again is not None]
        return relearn(run, [t.pool for t in trials], [t.slices for t in trials], again) if again else None
    if name in MEMBERSHIP:
        return compare_members(name, trials, rng)
    sets = [trial.shadow_sets for trial in trials if trial.shadow_sets is not None]
    return unlearned.ulira(sets, rng) if name == "ulira" else unlearned.klom(sets, rng)


def compare_members(name: str, trials: Sequence[Trial], rng: np.random.Generator) -> Finding:
    """The attack `loss` or `lira`: scores of the forgotten records beside those of images outside, over all pools."""
    roles = np.concatenate([trial.pool.roles for trial in trials])
    scores = [trial.margins for trial in trials]  # the loss falls as the margin rises
    if name == "lira":
        sets = [trial.shadow_sets for trial in trials if trial.shadow_sets is not None]
        scores = [lira(margins, s.kept, s.inside) for margins, s in zip(scores, sets, strict=True)]
    scores = np.concatenate(scores, axis=1)
    return membership(name, scores[:, roles == FORGOTTEN], scores[:, roles == OUTSIDE], rng)


def membership(name: str, members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Finding:
    """What scores tell under three slices: float [3, m] of the forgotten records, [3, n] of records that none saw.

    A threshold on the loss (Yeom et al., 2018) or LiRA (Carlini et al., 2022). The finding has the `Separation` of each
    column, and the AUCs of the first two above that of the third, the reference.
    """
    columns = [statistics.separation(*pair) for pair in zip(members, others, strict=True)]
    differences = [statistics.auc_difference(members[[c, 2]], others[[c, 2]], rng) for c in range(2)]
    reference = min(columns[2].p, 1 - columns[2].p)  # two-sided
    rates = [
        (f"TPR at {rate:.1%} FPR", *(statistics.cell(column.rates[i]) for column in columns))
        for i, rate in enumerate(RATES)
    ]
    return Finding(
        name,
        detected=(*(difference.p < SIGNIFICANT for difference in differences), reference < SIGNIFICANT / 2),
        smallest_p=differences[0].smallest_p,
        lines=[
            ("AUC", *(str(column.auc) for column in columns)),
            ("above from scratch (by chance)", *map(str, differences), ""),
            *rates,
        ],
        values={"columns": columns, "differences": differences},
    )


def lira(margins: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of each margin under the Gaussians of shadows that saw the record, and that did not.

    Margins are float [C, n] under C slices under attack and [N, n] under N shadows; `inside`, bool [N, n], says which
    shadows saw the record, at least two of either kind. Returns float64 [C, n].
    """
    all_rows = np.ones((1, len(shadows)), bool)
    seen, unseen = (statistics.moments(shadows, mask, all_rows) for mask in (inside, ~inside))
    return statistics.log_ratio(margins, seen, unseen)


def _accuracies(trials: Sequence[Trial]) -> dict[str, tuple[float, ...]]:
    """Shares of right answers of the three slices, each record asked of its own cluster's."""
    roles = np.concatenate([trial.pool.roles for trial in trials])
    right = np.concatenate([trial.right for trial in trials], axis=1)
    groups = {"forgotten": (FORGOTTEN,), "retained": (RETAINED,), "unseen": (OUTSIDE, VALIDATION)}
    return {name: tuple(right[:, np.isin(roles, group)].mean(axis=1).tolist()) for name, group in groups.items()}
