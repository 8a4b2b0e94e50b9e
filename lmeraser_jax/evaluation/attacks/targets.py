"""Which records an attack erases in memory, and which images it tells them from.

Targets are drawn among records that were not sampled for the clustering: erasing them changes no prototype and no
membership, so "the unlearned model" is their cluster tuned without them. Unless they are named, those are taken that
slices which never saw them answer worst: a record that others explain leaves no trace of its own, and an average over
such records hides a leak (Naderloui et al., 2025).
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lmeraser_jax.data.record_table import RecordTable, check_pixel_hashes
from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.evaluation.attacks import pools, shadows
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION, Pool
from lmeraser_jax.hashing import philox
from lmeraser_jax.storage import requests
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.plan import assign_clusters
from lmeraser_jax.unlearning.run import Run

LEFT = 4  # members that a cluster keeps at least
SCOUTS = 8  # slices of each cluster that say how hard a record is, each tuned on half of the records


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """The pools of an attack, sorted by key; slices tuned and images passed to draw them."""

    pools: tuple[Pool, ...]
    slices: int
    images: int


def unready(run: Run) -> list[str]:
    """Why a workdir cannot be attacked at all, a line each."""
    root, manifest = run.layout.root, run.catalog.manifest()
    if manifest is None or not manifest.clusters:
        return [f"--workdir={root} has no published state to attack; run: lmeraser train --workdir={root}"]
    open_ = requests.any_open(run.catalog)
    return [f"an erasure is not finished; finish it with: lmeraser process --workdir={root}"] if open_ else []


def problems(run: Run, named: Sequence[str], targets: int) -> list[str]:
    """What of a published state makes an attack on these ids, or on so many records, impossible; a line each."""
    if run.config.tuning.one_head:
        text = "all clusters are one slice, so that every shadow would be a whole system; legal: --attacks=routing"
        return [f"--config.tuning.method={run.config.tuning.method}: {text}"]
    found = []
    if not len(_never(run)):
        found.append(
            f"--workdir={run.layout.root} has no test or hold-out images to compare with; set --config.data.test_share"
            " when the workdir is made"
        )
    able, refused = _able(run, named or run.catalog.live("train").ids)
    if named:
        found += [f"--records={join_limited(names)}: {reason}" for reason, names in refused.items()]
    elif targets > len(able):
        found.append(f"--targets={targets}: must be at most {len(able)}, the records that can be targets")
    return found


def _able(run: Run, names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Those of some ids, in their order, that can be targets together, and the others by reason."""
    manifest, live, pinned = run.catalog.manifest(), run.catalog.live("train"), run.catalog.pins()
    assert manifest is not None
    sampled = set(load_clustering(run.layout, manifest.clustering).sample)
    cluster, content = (dict(zip(live.ids, column, strict=True)) for column in (live.clusters, live.contents))
    copies, left = Counter(live.contents), Counter(live.clusters)
    able: list[str] = []
    refused: dict[str, list[str]] = {}

    def why_not(name: str) -> str:
        if name not in cluster:
            return "no live training record"
        if name in sampled:
            return "sampled for the clustering, so that erasing it re-clusters (the attack routing is about these)"
        if cluster[name] in pinned or cluster[name] not in manifest.entries:
            return "in a cluster that is pinned or not published"
        if copies[content[name]] > 1:
            return "another record has the same pixels"
        return f"its cluster would keep fewer than {LEFT} members" if left[cluster[name]] <= LEFT else ""

    for name in dict.fromkeys(names):
        reason = why_not(name)
        if reason:
            refused.setdefault(reason, []).append(name)
        else:
            left[cluster[name]] -= 1
            able.append(name)
    return able, refused


def _never(run: Run) -> RecordTable:
    """Test and hold-out images that are no copy of a training image."""
    found, known = run.catalog.live("test", "holdout"), set(run.catalog.live("train").contents)
    return found.take(np.array([i for i, content in enumerate(found.contents) if content not in known], np.int64))


def draw(run: Run, named: Sequence[str], targets: int, seed: int) -> Drawn:
    """The pools of an attack on so many targets, or on those that are named.

    Images that no model saw play against the targets where they are as hard as these; against named ones, all do.

    Raises:
        UserError: fewer than two such images are routed to the targets' clusters, or a stored image is damaged.
    """
    manifest, live = run.catalog.manifest(), run.catalog.live("train")
    assert manifest is not None
    candidates = frozenset(_able(run, named or live.ids)[0])
    keys = {key for name, key in zip(live.ids, live.clusters, strict=True) if name in candidates}
    members, never = _by_cluster(live, keys), _by_cluster(_routed(run, manifest.clustering, len(live), seed), keys)
    tables = {key: members[key].plus(never[key]) for key in sorted(keys)}
    for table in tables.values():
        check_pixel_hashes(run.images, table)
    hardness, slices, images = ({}, 0, 0) if named else _scouted(run, tables, seed)
    order = sorted(live.ids, key=lambda name: (hardness.get(name, 0.0), name))
    chosen = _able(run, named or order)[0]
    forgotten = frozenset(chosen if named else chosen[:targets])
    limit = max(hardness.get(name, 0.0) for name in forgotten)
    made = []
    for key, table in tables.items():
        inside = set(members[key].ids)
        roles = {name: FORGOTTEN if name in forgotten else RETAINED for name in inside}
        roles |= {name: OUTSIDE if hardness.get(name, 0.0) <= limit else VALIDATION for name in never[key].ids}
        if not forgotten.isdisjoint(inside):
            made.append(pools.make(key, manifest.entries[key], table, roles, seed))
    if sum(len(pool.of(OUTSIDE)) for pool in made) < 2:
        raise UserError(
            f"fewer than two test or hold-out images are routed to the {len(made)} clusters of the targets and as hard"
            " as these; raise --targets"
        )
    return Drawn(tuple(made), slices, images)


def _by_cluster(records: RecordTable, keys: set[str]) -> dict[str, RecordTable]:
    assign_clusters = np.array(records.clusters, np.str_)
    return {key: records.take(np.flatnonzero(assign_clusters == key)) for key in keys}


def _routed(run: Run, clustering: str, count: int, seed: int) -> RecordTable:
    """At most so many images that no model saw, with the clusters that they would be members of."""
    never, where = _never(run), load_clustering(run.layout, clustering)
    never = never.take(np.sort(philox(seed, "attack", "never").permutation(len(never))[:count]))
    return dataclasses.replace(never, clusters=tuple(where.keys[k] for k in assign_clusters(run, never, where)))


def _scouted(run: Run, tables: Mapping[str, RecordTable], seed: int) -> tuple[dict[str, float], int, int]:
    """{id: mean margin under slices of its cluster that were not tuned on it}, slices tuned, images passed."""
    masks, worlds = {}, []
    for key, table in tables.items():
        masks[key] = shadows.halves(SCOUTS, len(table), philox(seed, "attack", "scouts", key))
        masks[key][~masks[key].any(axis=1), 0] = True
        names = (f"{key}/scout/{seed}/{i}" for i in range(SCOUTS))
        parts = (table.take(np.flatnonzero(row)) for row in masks[key])
        worlds += [shadows.Counterfactual(*world) for world in zip(names, parts, strict=True)]
    slices, images = shadows.tuned(run, shadows.with_lanes(run.tuning_spec), worlds)
    found: dict[str, float] = {}
    for place, (key, table) in enumerate(tables.items()):
        margins = shadows.scored(run, slices[place * SCOUTS : (place + 1) * SCOUTS], table).margins
        outside = ~masks[key]
        found |= dict(zip(table.ids, ((margins * outside).sum(axis=0) / outside.sum(axis=0)).tolist(), strict=True))
    return found, len(slices), images
