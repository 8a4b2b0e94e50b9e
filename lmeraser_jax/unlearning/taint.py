"""Which slices an erased record had a part in.

As a member, whose pixels the slice has seen; or as one of the sample, which decided who the members are. A slice that
the live records call for has no erased member, and its members follow from their own clustering; so the second kind
matters only for slices that are kept against that: pinned ones, and those of older states.
"""

import dataclasses
from collections.abc import Collection, Mapping

from lmeraser_jax.errors import UserError
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.run import Run


@dataclasses.dataclass(frozen=True)
class Tainted:
    """Digests of slices that an erased record was a member of, and of those whose clustering had it in its sample."""

    by_member: frozenset[str]
    by_sample: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        return self.by_member | self.by_sample


def tainted(run: Run, erased: Mapping[str, int]) -> Tainted:
    """The slices in the catalog that some records had a part in.

    Args:
        run: an opened workdir.
        erased: {id: image row} of the records.
    """
    if not erased:
        return Tainted(frozenset(), frozenset())
    made = run.catalog.slices()
    clusterings = {row.clustering for row in made.values()}
    shaped = {name for name in clusterings if sampled_for(run, name, erased)}
    by_sample = frozenset(name for name, row in made.items() if row.clustering in shaped)
    return Tainted(run.catalog.slices_of(erased.values()), by_sample)


def sampled_for(run: Run, clustering: str, ids: Collection[str]) -> bool:
    """Whether one of the ids was sampled for a clustering; of one that cannot be read nobody knows, so it counts."""
    try:
        return not set(load_clustering(run.layout, clustering).sample).isdisjoint(ids)
    except UserError:
        return True
