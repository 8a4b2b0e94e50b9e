"""An attack on a workdir: erases some live records in memory and tries to find them in what is left.

Three slices of each attacked cluster are compared: the published one, which keeps the records and must be caught
(positive control); the one that erasing them would publish; and one tuned from scratch without them under random
streams of its own, which is what the others are measured against. Nothing is written, neither to the catalog nor to
files, and no lock is taken.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmeraser_jax.errors import join_limited, raise_all
from lmeraser_jax.evaluation.attacks import membership, pools, shadows, targets
from lmeraser_jax.evaluation.attacks.common_head import common_head
from lmeraser_jax.evaluation.attacks.klom import klom
from lmeraser_jax.evaluation.attacks.membership import Membership
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION, Pool
from lmeraser_jax.evaluation.attacks.relearn import relearn, scratch_for
from lmeraser_jax.evaluation.attacks.report import Accuracies, Attack, Finding
from lmeraser_jax.evaluation.attacks.routing import routing
from lmeraser_jax.evaluation.attacks.shadows import Counterfactual, Scores, Shadows
from lmeraser_jax.evaluation.attacks.targets import Drawn
from lmeraser_jax.evaluation.attacks.ulira import ulira
from lmeraser_jax.hashing import philox
from lmeraser_jax.progress import progress
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.run import Run

SHADOWED = ("rmia", "lira", "ulira", "klom")  # attacks that need shadow models of clusters
POPULATIONS = ("ulira", "klom")  # those that need slices that unlearned and that never saw
SLICES = ("loss", "relearn", "common", *SHADOWED)  # attacks on slices
ATTACKS = ("loss", "rmia", "lira", "ulira", "klom", "relearn", "common", "routing")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to attack and how: see `lmeraser attack --help`."""

    targets: int = 64
    shadows: int = 64
    attacks: tuple[str, ...] = ATTACKS
    records: tuple[str, ...] = ()
    seed: int = 0

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        found = []
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or not self.attacks:
            found.append(f"--attacks={join_limited(unknown)}: no such attack; legal: {', '.join(ATTACKS)}")
        if self.shadows < 4:
            found.append(f"--shadows={self.shadows}: must be at least 4, two with and two without each record")
        if self.records and len(set(self.records)) < 2:
            found.append(f"--records={join_limited(self.records)}: must be at least 2 different ids")
        if not self.records and self.targets < 2:
            found.append(f"--targets={self.targets}: must be at least 2")
        return found


class Trial(NamedTuple):
    """A pool with its slices (kept, unlearned, then from scratch), what the first three say, and its shadows.

    `again` is one more slice that keeps the records, None where nothing is learned again; `roles` int8 [w] are those
    of the watched records; `scores` have a leading axis of the three slices.
    """

    pool: Pool
    slices: tuple[Slice, ...]
    again: Slice | None
    roles: np.ndarray
    scores: Scores
    shadows: Shadows | None


def attack(run: Run, options: Options) -> Attack:
    """Attacks a published state. Changes nothing.

    Args:
        run: an opened workdir; needs no lock.
        options: what to do.

    Raises:
        UserError: the options or the workdir do not allow it, all reasons at once; a shadow's loss was not finite;
            or a record was erased meanwhile.
    """
    unready, on_slices = targets.unready(run), bool(set(options.attacks) & set(SLICES))
    unfit = targets.problems(run, options.records, options.targets) if on_slices and not unready else []
    raise_all(options.problems() + unready + unfit)
    start = time.perf_counter()
    trials: list[Trial] = []
    made, images = 0, 0
    if on_slices:
        drawn = targets.draw(run, options.records, options.targets, options.seed)
        trials, made, images = _trials(run, drawn, options)
    findings = [(name, _finding(run, name, trials, options)) for name in options.attacks]
    pools.refuse_changed(run, [trial.pool for trial in trials])
    return Attack(
        clusters=len(trials),
        targets=sum(len(trial.pool.of(FORGOTTEN)) for trial in trials),
        outside=sum(len(trial.pool.of(OUTSIDE)) for trial in trials),
        shadows=options.shadows if set(options.attacks) & {*SHADOWED, "common"} else 0,
        slices=made,
        images=images,
        seconds=time.perf_counter() - start,
        accuracies=_accuracies(trials) if trials else None,
        findings=tuple(one for _, one in findings if one is not None),
        skipped=tuple(name for name, one in findings if one is None),
    )


def _trials(run: Run, drawn: Drawn, options: Options) -> tuple[list[Trial], int, int]:
    """Tunes everything that the attacks on slices need; also says how many slices and images that were, in all."""
    chosen, relearned = drawn.pools, "relearn" in options.attacks and not run.config.tuning.closed
    references = scratch_for(len(chosen), options.shadows) if relearned else 1
    worlds = [world for pool in chosen for world in _worlds(pool, options.seed, references, relearned)]
    rest, images = shadows.tuned(run, run.tuning_spec, worlds)
    made, images, trials, each = drawn.slices + len(rest), drawn.images + images, [], len(rest) // len(chosen)
    with progress("attacked clusters", len(chosen)) as shown:
        for place, pool in enumerate(chosen):
            own = rest[place * each : (place + 1) * each]
            slices = (load_slice(run, pool.ref), *own[: 1 + references])
            scores = shadows.scored(run, slices[:3], pool.records.take(pool.watched))
            cast = None
            if set(options.attacks) & set(SHADOWED):
                both = bool(set(options.attacks) & set(POPULATIONS))
                cast, more, passed = shadows.shadows(run, pool, options.shadows, options.seed, both)
                made, images = made + more, images + passed
            again = own[-1] if relearned else None
            trials.append(Trial(pool, slices, again, pool.roles[pool.watched], scores, cast))
            shown.advance(1)
    return trials, made, images


def _worlds(pool: Pool, seed: int, references: int, relearned: bool) -> list[Counterfactual]:
    """The cluster after the erasure, so many from scratch, and for relearning another one that keeps the records."""
    after = shadows.unlearned_world(pool)
    scratch = [Counterfactual(f"{pool.key}/scratch/{seed}/{i}", after.members) for i in range(references)]
    again = [Counterfactual(f"{pool.key}/again/{seed}", pool.of(FORGOTTEN, RETAINED))]
    return [after, *scratch, *again * relearned]


def _finding(run: Run, name: str, trials: Sequence[Trial], options: Options) -> Finding | None:
    """What one attack finds; None where there is nothing that it could attack."""
    rng, chosen = philox(options.seed, "attack", name), [trial.pool for trial in trials]
    if name in ("loss", "rmia", "lira"):
        return _membership(name, trials, rng)
    if name in POPULATIONS:
        cast = [(trial.roles, trial.shadows) for trial in trials if trial.shadows is not None]
        return ulira(cast, rng) if name == "ulira" else klom(cast, rng)
    if name == "routing":
        return routing(run, options.seed)
    if name == "common":
        return common_head(run, chosen, options.shadows, options.seed)
    again = [trial.again for trial in trials if trial.again is not None]
    return relearn(run, chosen, [trial.slices for trial in trials], again) if again else None


def _membership(name: str, trials: Sequence[Trial], rng: np.random.Generator) -> Membership:
    """Scores of the forgotten records against those outside, over all pools."""
    roles = np.concatenate([trial.roles for trial in trials])
    margins = np.concatenate([trial.scores.margins for trial in trials], axis=1)
    cast = [(trial.scores.margins, trial.shadows.shadows, trial.shadows.inside) for trial in trials if trial.shadows]
    if name == "loss":
        scores = margins  # the loss falls as the margin rises
    elif name == "lira":
        scores = np.concatenate([membership.lira(*parts) for parts in cast], axis=1)
    else:
        ratios = np.concatenate([membership.relative(*parts) for parts in cast], axis=1)
        scores = membership.rmia(ratios, ratios[:, np.isin(roles, (OUTSIDE, VALIDATION))])
    return membership.membership(name, scores[:, roles == FORGOTTEN], scores[:, roles == OUTSIDE], rng)


def _accuracies(trials: Sequence[Trial]) -> Accuracies:
    """Shares of right answers for the three slices, each record asked of its own cluster's."""
    roles = np.concatenate([trial.roles for trial in trials])
    right = np.concatenate([trial.scores.right for trial in trials], axis=1)
    groups = ((FORGOTTEN,), (RETAINED,), (OUTSIDE, VALIDATION))
    return Accuracies(*(tuple(right[:, np.isin(roles, group)].mean(axis=1).tolist()) for group in groups))
