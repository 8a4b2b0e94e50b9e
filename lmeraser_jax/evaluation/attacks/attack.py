"""An attack on a workdir: erases some live records in memory and tries to find them in what is left.

Three slices of each attacked cluster are compared: the published one, which keeps the records, so that they must be
found in it (positive control); the one that erasing them would publish; and one tuned from scratch without them under
random streams of its own, the reference for the others. Nothing is written, neither to the catalog nor to files, and no
lock is taken.
"""

import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmeraser_jax.evaluation.attacks import membership, shadows, targets, unlearned
from lmeraser_jax.evaluation.attacks.options import Options, check
from lmeraser_jax.evaluation.attacks.relearn import relearn, scratch_for
from lmeraser_jax.evaluation.attacks.report import Attack, Finding
from lmeraser_jax.evaluation.attacks.routing import routing
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION, Pool
from lmeraser_jax.hashing import philox
from lmeraser_jax.progress import progress
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.run import Run

CURVES = ("loss", "lira")  # attacks with ROC curves
POPULATIONS = ("ulira", "klom")  # attacks on slices that unlearned and slices that never saw
SHADOWED = ("lira", *POPULATIONS)  # attacks that need shadow models


class Trial(NamedTuple):
    """A pool with its slices: kept, unlearned, then from scratch."""

    pool: Pool
    slices: tuple[Slice, ...]
    again: Slice | None  # one more slice that keeps the records; None where nothing is learned again
    margins: np.ndarray  # float64 [3, w], of the watched records under the first three slices
    right: np.ndarray  # bool [3, w], whether these gave the right answer
    shadow_sets: shadows.ShadowSets | None  # None where no attack needs shadow models

    @property
    def roles(self) -> np.ndarray:
        """int8 [w], of the watched records."""
        return self.pool.roles[self.pool.watched]


def attack(run: Run, options: Options) -> Attack:
    """Attacks a published state. Needs no lock and changes nothing.

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
            margins, right = shadows.score(run, slices[:3], pool.records.take(pool.watched))
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
    if name in CURVES:
        return compare_members(name, trials, rng)
    sets = [trial.shadow_sets for trial in trials if trial.shadow_sets is not None]
    return unlearned.ulira(sets, rng) if name == "ulira" else unlearned.klom(sets, rng)


def compare_members(name: str, trials: Sequence[Trial], rng: np.random.Generator) -> Finding:
    """The attack `loss` or `lira`: scores of the forgotten records beside those of images outside, over all pools."""
    roles = np.concatenate([trial.roles for trial in trials])
    scores = [trial.margins for trial in trials]  # the loss falls as the margin rises
    if name == "lira":
        sets = [trial.shadow_sets for trial in trials if trial.shadow_sets is not None]
        scores = [membership.lira(margins, s.kept, s.inside) for margins, s in zip(scores, sets, strict=True)]
    scores = np.concatenate(scores, axis=1)
    return membership.membership(name, scores[:, roles == FORGOTTEN], scores[:, roles == OUTSIDE], rng)


def _accuracies(trials: Sequence[Trial]) -> dict[str, tuple[float, ...]]:
    """Shares of right answers of the three slices, each record asked of its own cluster's."""
    roles = np.concatenate([trial.roles for trial in trials])
    right = np.concatenate([trial.right for trial in trials], axis=1)
    groups = {"forgotten": (FORGOTTEN,), "retained": (RETAINED,), "unseen": (OUTSIDE, VALIDATION)}
    return {name: tuple(right[:, np.isin(roles, group)].mean(axis=1).tolist()) for name, group in groups.items()}
