"""Which records an attack erases in memory, and which images it compares them with.

Targets are not sampled, so erasing them changes no prototype. Unless they are named, slices that never saw them answer
them worst: a record that others explain leaves no trace of its own and hides a leak (Naderloui et al., 2025).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lmeraser_jax.data.record_table import RecordTable, check_pixel_hashes
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.attacks import shadows
from lmeraser_jax.evaluation.attacks.options import eligible, unseen_images
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION, Pool
from lmeraser_jax.hashing import philox
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.plan import assign_clusters
from lmeraser_jax.unlearning.run import Run

PROBES = 8  # slices of each cluster that say how hard a record is, each tuned on half of the records


def draw(run: Run, ids: Sequence[str], targets: int, seed: int) -> list[Pool]:
    """The pools of an attack on so many targets, or on those with the given ids, sorted by key.

    Drawn targets are compared with unseen images that are as hard as these; named targets with all unseen images.

    Raises:
        UserError: fewer than two such images are routed to the targets' clusters, or a stored image is damaged.
    """
    manifest, live = run.catalog.manifest(), run.catalog.live("train")
    assert manifest is not None
    candidates = frozenset(eligible(run.layout, run.catalog, ids or live.ids)[0])
    keys = {key for name, key in zip(live.ids, live.clusters, strict=True) if name in candidates}
    members, unseen = _by_cluster(live, keys), _by_cluster(_routed(run, manifest.clustering, len(live), seed), keys)
    tables = {key: members[key].plus(unseen[key]) for key in sorted(keys)}
    for table in tables.values():
        check_pixel_hashes(run.images, table)
    hardness, forgotten = {}, candidates
    if not ids:
        hardness = _hardness(run, tables, seed)
        hardest_first = sorted(live.ids, key=lambda name: (hardness.get(name, 0.0), name))
        forgotten = frozenset(eligible(run.layout, run.catalog, hardest_first)[0][:targets])
    limit = max(hardness.get(name, 0.0) for name in forgotten)
    pools = []
    for key, table in tables.items():
        roles = {name: FORGOTTEN if name in forgotten else RETAINED for name in members[key].ids}
        roles |= {name: OUTSIDE if hardness.get(name, 0.0) <= limit else VALIDATION for name in unseen[key].ids}
        kinds = np.array([roles[name] for name in table.ids], np.int8)
        if FORGOTTEN in kinds:
            pools.append(Pool(key, manifest.entries[key], table, kinds))
    if sum(len(pool.of(OUTSIDE)) for pool in pools) < 2:
        raise UserError(
            f"fewer than two test or hold-out records are routed to the {len(pools)} clusters of the targets and as"
            " hard as these; raise --targets"
        )
    return pools


def _by_cluster(records: RecordTable, keys: set[str]) -> dict[str, RecordTable]:
    clusters = np.array(records.clusters, np.str_)
    return {key: records.take(np.flatnonzero(clusters == key)) for key in keys}


def _routed(run: Run, clustering: str, count: int, seed: int) -> RecordTable:
    """At most so many unseen images, with the clusters that they would be members of."""
    unseen, partition = unseen_images(run.catalog), load_clustering(run.layout, clustering)
    unseen = unseen.take(np.sort(philox(seed, "attack", "never").permutation(len(unseen))[:count]))
    clusters = tuple(partition.keys[k] for k in assign_clusters(run, unseen, partition))
    return dataclasses.replace(unseen, clusters=clusters)


def _hardness(run: Run, tables: Mapping[str, RecordTable], seed: int) -> dict[str, float]:
    """{id: mean margin under probe models that were not tuned on it}; hard ones are low.

    A probe model is a slice of the record's cluster that is tuned on a random half of the table.
    """
    masks, probes = {}, []
    for key, table in tables.items():
        masks[key] = shadows.halves(PROBES, len(table), philox(seed, "attack", "scouts", key))
        masks[key][~masks[key].any(axis=1), 0] = True
        probes += shadows.on_draws(table, masks[key], f"{key}/scout/{seed}")
    slices = shadows.tune_counterfactuals(run, shadows.with_lanes(run.tuning_spec), probes)
    hardness: dict[str, float] = {}
    for place, (key, table) in enumerate(tables.items()):
        margins, _ = shadows.score(run, slices[place * PROBES : (place + 1) * PROBES], table)
        means = np.average(margins, axis=0, weights=~masks[key])
        hardness |= dict(zip(table.ids, means.tolist(), strict=True))
    return hardness


def refuse_changed(run: Run, pools: Iterable[Pool]) -> None:
    """Raises `UserError` if a record's pixels are gone: another process erased it during the attack."""
    try:
        for pool in pools:
            check_pixel_hashes(run.images, pool.records)
    except UserError as error:
        message = "records were erased while they were attacked, so the result is void; run the attack again"
        raise UserError(message) from error
