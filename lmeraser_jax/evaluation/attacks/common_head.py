"""LiRA on the common head: does the formula of all private records give the forgotten ones away?

A shadow of it is solved from features in no time, over a random half of everybody. A formula has no random streams, so
the head from scratch is the head that unlearned, bit for bit; what is measured is how visible the records were in it.
"""

from collections.abc import Sequence

import numpy as np

from lmeraser_jax.evaluation.attacks import membership, pools, shadows
from lmeraser_jax.evaluation.attacks.membership import Membership
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, OUTSIDE, RETAINED, Pool
from lmeraser_jax.evaluation.attacks.shadows import Counterfactual
from lmeraser_jax.hashing import philox
from lmeraser_jax.storage.rows import SliceKind
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.run import Run


def common_head(run: Run, attacked: Sequence[Pool], count: int, seed: int) -> Membership | None:
    """Attacks the common head of all live records with the same targets and outside images as the clusters.

    Args:
        run: an opened workdir.
        attacked: the clusters' pools.
        count: shadows.
        seed: of halves and permutations.

    Returns:
        None where the published state has no common head.

    Raises:
        UserError: a record was erased meanwhile.
    """
    manifest = run.catalog.manifest()
    if manifest is None or SliceKind.COMMON not in manifest.entries:
        return None
    pool = everybody(run, manifest.entries[SliceKind.COMMON], attacked, seed)
    inside = shadows.halves(count, len(pool.roles), philox(seed, "attack", "halves", SliceKind.COMMON))
    worlds = [shadows.unlearned_world(pool)]
    worlds += [Counterfactual(SliceKind.COMMON, pool.records.take(np.flatnonzero(row))) for row in inside]
    cast, _ = shadows.tuned(run, run.common_spec, worlds)
    asked = pool.of(FORGOTTEN, OUTSIDE)
    found = shadows.scored(run, [load_slice(run, pool.ref), *cast], asked, run.common_spec).margins
    pools.refuse_changed(run, [pool])
    chosen = np.isin(pool.roles, (FORGOTTEN, OUTSIDE))
    scores = membership.lira(found[[0, 1, 1]], found[2:], inside[:, chosen])
    forgotten = pool.roles[chosen] == FORGOTTEN
    rng = philox(seed, "attack", "common")
    return membership.membership("common", scores[:, forgotten], scores[:, ~forgotten], rng)


def everybody(run: Run, ref: str, attacked: Sequence[Pool], seed: int) -> Pool:
    """All live records and the outside images of some pools, as one pool."""
    records, roles = run.catalog.live("train"), {}
    roles |= dict.fromkeys(records.ids, RETAINED)
    for pool in attacked:
        outside = pool.of(OUTSIDE)
        records = records.plus(outside)
        roles |= dict.fromkeys(outside.ids, OUTSIDE) | dict.fromkeys(pool.of(FORGOTTEN).ids, FORGOTTEN)
    return pools.make(SliceKind.COMMON, ref, records, roles, seed)
