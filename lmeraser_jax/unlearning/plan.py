"""What state the live records call for, and which slices are missing for it. A pure function of a `LiveState`.

`live_state` reads the catalog, the clustering and the features beforehand. Under the published clustering it holds
touched clusters only, so the cost of a plan follows the request and not the number of records.
"""

import dataclasses
from collections.abc import Mapping

from lmeraser_jax.config import Checkpoints
from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage.rows import Manifest, SliceKind, SliceRow, images_of
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.training.jobs import Target, make_job, snapshot_steps
from lmeraser_jax.training.slices import RecipeConstants, recipe
from lmeraser_jax.unlearning.artifacts import Tainted, slice_of


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LiveState:
    """Everything that a plan depends on, of one moment."""

    manifest: Manifest | None  # the published state
    slices: Mapping[str, SliceRow]  # {digest: row} of the slices in the catalog
    on_disk: frozenset[str]  # digests of those whose folder exists
    pins: Mapping[str, str]  # {cluster key: slice reference}
    tainted: Tainted  # slices that were made with a record that is leaving
    clustering: Clustering  # that the live records call for
    clustering_unchanged: bool  # it is the published one and lies on disk
    members: Mapping[str, RecordTable]  # {cluster key: its live records} of the clusters to look at
    untouched: Mapping[str, int]  # {cluster key: number of members} of the others
    moved: list[tuple[str, str]]  # (record id, cluster key) of records in another cluster than published
    private: RecordTable | None  # all live private records where there is a common head
    constants: RecipeConstants  # what every recipe depends on beside its members
    common_constants: RecipeConstants  # the same of the common head
    checkpoints: Checkpoints  # which earlier epochs are kept
    requests: tuple[str, ...]  # ids of the open erasure requests that are taken into account


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """The state that some live records call for, and what is missing for it."""

    clustering: Clustering
    clustering_unchanged: bool
    recipe_constants_digest: str
    entries: Mapping[str, str]  # {cluster key: slice reference} of clusters with members, and of the common head
    targets: Mapping[str, Target]  # {cluster key: the slice that its records call for} of the clusters looked at
    missing: Mapping[str, Target]  # those of the targets that do not exist yet
    members: Mapping[str, RecordTable]  # {cluster key: its records} of what is missing
    slices: Mapping[str, SliceRow]  # {digest: row} of the slices in the catalog
    moved: list[tuple[str, str]]
    pinned: frozenset[str]  # clusters that stay at the slice they are pinned to
    unpinned: tuple[str, ...]  # clusters whose pin ends
    requests: tuple[str, ...]
    images_full: int  # images to pass forward and backward for a full re-tune of every cluster

    @property
    def required_slices(self) -> set[str]:
        """Digests of the slices that the live records call for, pinned clusters left out."""
        unpinned = {slice_of(ref) for key, ref in self.entries.items() if key not in self.pinned}
        return unpinned | {target.digest for target in self.targets.values()}

    @property
    def images_missing(self) -> int:
        """Images to pass forward and backward to make what is missing."""
        return sum(target.job.images for target in self.missing.values())


def plan(state: LiveState) -> Plan:
    """What state the live private records call for."""
    targets = {key: _target(state, key, records) for key, records in state.members.items()}
    entries = {key: target.digest for key, target in targets.items()}
    if state.manifest is not None:
        entries |= {key: state.manifest.entries[key] for key in state.untouched}
    pinned = _surviving_pins(state, entries)
    images_full = sum(target.job.images for target in targets.values())
    images_full += sum(images_of(state.slices, entries[key]) for key in state.untouched)
    entries |= pinned
    members = dict(state.members)
    if state.private is not None and len(state.private):
        targets[SliceKind.COMMON] = _target(state, SliceKind.COMMON, state.private)
        entries[SliceKind.COMMON] = targets[SliceKind.COMMON].digest
        members[SliceKind.COMMON] = state.private
    missing = {
        key: target for key, target in targets.items() if key not in pinned and target.digest not in state.on_disk
    }
    return Plan(
        clustering=state.clustering,
        clustering_unchanged=state.clustering_unchanged,
        recipe_constants_digest=constants_digest(state.constants),
        entries=entries,
        targets=targets,
        missing=missing,
        members={key: members[key] for key in missing},
        slices=state.slices,
        moved=state.moved,
        pinned=frozenset(pinned),
        unpinned=tuple(sorted(set(state.pins) - set(pinned))),
        requests=state.requests,
        images_full=images_full,
    )


def _target(state: LiveState, key: str, records: RecordTable) -> Target:
    """The slice of a cluster, or the common head, with these members."""
    constants = state.common_constants if key == SliceKind.COMMON else state.constants
    job = make_job(key, records.rows, constants.tuning)
    if key != SliceKind.COMMON:
        steps = snapshot_steps(job, state.checkpoints.every_epochs, state.checkpoints.keep)
        job = dataclasses.replace(job, snapshots=steps)
    return Target(recipe_digest(key, records, constants), job)


def recipe_digest(key: str, records: RecordTable, constants: RecipeConstants) -> str:
    """The digest of the slice of a cluster with these members."""
    members = list(zip(records.ids, records.contents, records.labels.tolist(), strict=True))
    return digest(recipe(key, members, constants))


def constants_digest(constants: RecipeConstants) -> str:
    """Digest of everything but the members that a recipe depends on."""
    return recipe_digest("", RecordTable.empty(), constants)


def _surviving_pins(state: LiveState, entries: Mapping[str, str]) -> dict[str, str]:
    """The pins that hold, {cluster key: slice reference}, given what the live records call for.

    A pin ends with its cluster, with its slice's checkpoint, and when a record leaves that was a member of the slice,
    or was sampled for the clustering that decided its members; unless the slice is called for all the same.
    """
    surviving = {}
    for key, ref in state.pins.items():
        name = slice_of(ref)
        if key not in entries or name not in state.on_disk or name in state.tainted.by_member:
            continue
        if name in state.tainted.by_sample and entries[key] != name:
            continue
        surviving[key] = ref
    return surviving
