"""An attack on a workdir: erases some live records in memory and tries to find them in what is left.

Three slices of each attacked cluster are compared: the published one, which keeps the records, so that they must be
found in it (positive control); the one that erasing them would publish; and one tuned from scratch without them under
random streams of its own, the reference for the others. Nothing is written, neither to the catalog nor to files, and no
lock is taken.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmeraser_jax.errors import join_limited, raise_all
from lmeraser_jax.evaluation.attacks import membership, shadows, targets, unlearned
from lmeraser_jax.evaluation.attacks.relearn import relearn, scratch_for
from lmeraser_jax.evaluation.attacks.report import Accuracies, Attack, Finding
from lmeraser_jax.evaluation.attacks.routing import routing
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION, Counterfactual, Pool
from lmeraser_jax.hashing import philox
from lmeraser_jax.progress import progress
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.run import Run

ATTACKS = ("loss", "lira", "ulira", "klom", "relearn", "routing")
CURVES = ("loss", "lira")  # attacks with ROC curves
POPULATIONS = ("ulira", "klom")  # attacks on slices that unlearned and slices that never saw
SHADOWED = ("lira", *POPULATIONS)  # attacks that need shadow models


@dataclasses.dataclass(frozen=True)
class Options:
    """What to attack and how: see `lmeraser attack --help`."""

    targets: int = 64
    shadows: int = 64
    attacks: tuple[str, ...] = ATTACKS
    records: tuple[str, ...] = ()
    seed: int = 0

    @property
    def on_slices(self) -> bool:
        return bool(set(self.attacks) - {"routing"})

    @property
    def shadowed(self) -> bool:
        return bool(set(self.attacks) & set(SHADOWED))

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        problems = []
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or not self.attacks:
            problems.append(f"--attacks={join_limited(unknown)}: no such attack; legal: {', '.join(ATTACKS)}")
        if self.shadows < 4:
            problems.append(f"--shadows={self.shadows}: must be at least 4, two with and two without each record")
        if self.records and len(set(self.records)) < 2:
            problems.append(f"--records={join_limited(self.records)}: must be at least 2 different ids")
        if not self.records and self.targets < 2:
            problems.append(f"--targets={self.targets}: must be at least 2")
        return problems


class Trial(NamedTuple):
    """A pool with its slices: kept, unlearned, then from scratch.

    `again` is one more slice that keeps the records, None where nothing is learned again; `scores` are those of the
    watched records under the first three slices; `shadow_sets` is None where no attack needs shadow models.
    """

    pool: Pool
    slices: tuple[Slice, ...]
    again: Slice | None
    scores: shadows.Scores
    shadow_sets: shadows.ShadowSets | None

    @property
    def roles(self) -> np.ndarray:
        """int8 [w], of the watched records."""
        return self.pool.roles[self.pool.watched]


def attack(run: Run, options: Options) -> Attack:
    """Attacks a published state. Changes nothing.

    Args:
        run: an opened workdir; needs no lock.
        options: what to do.

    Raises:
        UserError: the options or the workdir do not allow it, all reasons at once; a shadow's loss was not finite;
            or a record was erased meanwhile.
    """
    problems = options.problems() + targets.workdir_problems(run)
    if options.on_slices and not targets.workdir_problems(run):
        problems += targets.target_problems(run, options.records, options.targets)
    raise_all(problems)
    start = time.perf_counter()
    trials, slices, images = _trials(run, options) if options.on_slices else ([], 0, 0)
    findings = {name: _finding(run, name, trials, options) for name in options.attacks}
    targets.refuse_changed(run, [trial.pool for trial in trials])
    return Attack(
        clusters=len(trials),
        targets=sum(len(trial.pool.of(FORGOTTEN)) for trial in trials),
        outside=sum(len(trial.pool.of(OUTSIDE)) for trial in trials),
        shadows=options.shadows if options.shadowed else 0,
        slices=slices,
        images=images,
        seconds=time.perf_counter() - start,
        accuracies=_accuracies(trials) if trials else None,
        findings=tuple(finding for finding in findings.values() if finding is not None),
        skipped=tuple(name for name, finding in findings.items() if finding is None),
    )


def _trials(run: Run, options: Options) -> tuple[list[Trial], int, int]:
    """Tunes everything that the attacks on slices need; also says how many slices and images that were, in all."""
    pools, slices, images = targets.draw(run, options.records, options.targets, options.seed)
    relearned = "relearn" in options.attacks and not run.config.tuning.closed
    scratch = scratch_for(len(pools), options.shadows) if relearned else 1
    clusters = [c for pool in pools for c in _counterfactuals(pool, options.seed, scratch, relearned)]
    tuned, passed = shadows.tune_counterfactuals(run, run.tuning_spec, clusters)
    slices, images = slices + len(tuned), images + passed
    trials, share = [], len(tuned) // len(pools)
    with progress("attacked clusters", len(pools)) as bar:
        for place, pool in enumerate(pools):
            own = tuned[place * share : (place + 1) * share]
            candidates = (load_slice(run, pool.ref), *own[: 1 + scratch])
            scores = shadows.score(run, candidates[:3], pool.records.take(pool.watched))
            sets = None
            if options.shadowed:
                populations = bool(set(options.attacks) & set(POPULATIONS))
                sets, more, passed = shadows.shadow_sets(run, pool, options.shadows, options.seed, populations)
                slices, images = slices + more, images + passed
            trials.append(Trial(pool, candidates, own[-1] if relearned else None, scores, sets))
            bar.advance(1)
    return trials, slices, images


def _counterfactuals(pool: Pool, seed: int, scratch: int, relearned: bool) -> list[Counterfactual]:
    """The cluster after the erasure, so many from scratch, and for relearning another one that keeps the records."""
    after = shadows.after_erasure(pool)
    clusters = [after, *(Counterfactual(f"{pool.key}/scratch/{seed}/{i}", after.members) for i in range(scratch))]
    if relearned:
        clusters.append(Counterfactual(f"{pool.key}/again/{seed}", pool.of(FORGOTTEN, RETAINED)))
    return clusters


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
    scores = [trial.scores.margins for trial in trials]  # the loss falls as the margin rises
    if name == "lira":
        sets = [trial.shadow_sets for trial in trials if trial.shadow_sets is not None]
        scores = [membership.lira(margins, s.kept, s.inside) for margins, s in zip(scores, sets, strict=True)]
    scores = np.concatenate(scores, axis=1)
    return membership.membership(name, scores[:, roles == FORGOTTEN], scores[:, roles == OUTSIDE], rng)


def _accuracies(trials: Sequence[Trial]) -> Accuracies:
    """Shares of right answers of the three slices, each record asked of its own cluster's."""
    roles = np.concatenate([trial.roles for trial in trials])
    right = np.concatenate([trial.scores.right for trial in trials], axis=1)
    groups = ((FORGOTTEN,), (RETAINED,), (OUTSIDE, VALIDATION))
    return Accuracies(*(tuple(right[:, np.isin(roles, group)].mean(axis=1).tolist()) for group in groups))
