"""Approximate slices: they answer for the clusters that a request touched until the next build has the exact ones.

An approximate slice is its exact parent plus one update by influence functions. Its name says what it is, and hashes
the parent, the settings and the records that left or joined, so it is content-addressed and the same in any order of
requests. The purge after the exact build removes it.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.record_table import RecordTable, check_pixel_hashes
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import arrays_digest, digest
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import Manifest, SliceKind
from lmeraser_jax.training.features import network_inputs, on_device
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TuningSpec, outputs_of, targets_of
from lmeraser_jax.training.tune import bucket
from lmeraser_jax.unlearning import influence
from lmeraser_jax.unlearning.artifacts import (
    APPROXIMATE,
    is_approximate,
    load_clustering,
    load_slice,
    pack,
    slice_of,
)
from lmeraser_jax.unlearning.build import remove_leftovers, tune_missing
from lmeraser_jax.unlearning.influence import Objective, Problem, Report, Rows
from lmeraser_jax.unlearning.plan import assign_members, current_plan
from lmeraser_jax.unlearning.purge import drop_packed, purge
from lmeraser_jax.unlearning.run import Run

CHUNK = 64  # images
TEXT_CHUNK = 8  # texts, whose logits are large
VERSION = 1  # of the recipe below
METHODS = ("prompt+head", "head", "lora")
LEAST_STRENGTH = 1e-3  # lambda where the tuning has no weight decay: without one the curvature is singular


@dataclasses.dataclass(frozen=True, eq=False)
class _Update:
    """An approximate slice before it is written."""

    name: str
    recipe: Mapping[str, Any]  # what the name hashes
    rows: np.ndarray  # int64 [m], image rows of the records that it was made with
    arrays: Mapping[str, np.ndarray]
    report: Report


def refuse_unless_applicable(catalog: Catalog, tuning: Tuning, calibrate: bool) -> None:
    """Raises `UserError` where no approximate slice can stand in, before anything is accepted."""
    if tuning.method not in METHODS:
        legal = f"{', '.join(METHODS)}; closed forms are exact at once"
        raise UserError(f"--mode: not for --config.tuning.method={tuning.method}; legal: {legal}")
    if calibrate and not catalog.counts().get("holdout"):
        raise UserError("--calibrate needs held-out records: none were set aside (--config.data.holdout)")
    manifest = catalog.manifest()
    if manifest is None:
        raise UserError("--mode: nothing is published yet that could be updated; run lmeraser train first")


def publish_approximate(
    run: Run, mode: str, calibrate: bool = False, force: bool = False, request: str = ""
) -> dict[str, Report]:
    """Publishes approximate slices of the clusters that a request touches: {cluster key: report}.

    By default of the clusters that any open request touches. Those in quarantine answer nothing and stay as they are.
    Whatever other open requests erase from a cluster leaves its slice, too. A corrected record joins the cluster that
    it gets under the published clustering. Clusters, prototypes and routes stay as they are until the next build. The
    common head has a closed form and becomes exact at once. One transaction registers and publishes the slices, so a
    kill leaves the old or the new state. The requests stay open: the next build replaces the slices.

    Args:
        run: opened for writing.
        mode: one of `influence.MODES`.
        calibrate: scale the step, in clusters that records only leave (`influence.update`).
        force: publish although CG did not converge.
        request: its id; empty: all open ones.

    Raises:
        UserError: CG did not converge and `force` was not given, or an update is not finite. Nothing is published then.
    """
    remove_leftovers(run)
    if any(each.state == "published" for each in requests.listed(run.catalog, only_open=True)):
        purge(run)  # their exact slices are there; a purge for nothing would drop what a killed build has tuned
    before, waiting = run.catalog.manifest(), requests.listed(run.catalog, only_open=True)
    assert before is not None
    joining = _joining(run, before)
    reached = {each.id: _reached(run, each, joining) for each in waiting}
    named = {key for each in waiting if request in ("", each.id) for key in reached[each.id]}
    touched = named & before.clusters.keys() - run.catalog.quarantined()
    entries = dict(before.entries)
    updates = {}
    for key in sorted(touched):
        update = _update(run, key, joining.get(key, RecordTable.empty()), mode, calibrate)
        if update is None:
            del entries[key]  # no member is left
        else:
            updates[key] = update
    reports = {key: update.report for key, update in updates.items()}
    _refuse_bad(reports, mode, force)
    for update in updates.values():
        facts = {"digest": update.name, "recipe": update.recipe}
        checkpoints.save(run.layout.slice(update.name), update.arrays, facts)
    if SliceKind.COMMON in entries:
        _replace_common(run, entries)
    with run.catalog.transaction():
        for key, update in updates.items():
            _register(run, key, update)
            entries[key] = update.name
        if entries != before.entries:
            constants = before.recipe_constants_digest
            run.catalog.publish(before.clustering, run.fingerprint, constants, entries, moved=())
        for each in waiting:
            _note(run, each, {key: report for key, report in reports.items() if key in reached[each.id]})
    pack(run, entries)  # not before, as in a build: the transaction registers the slices
    drop_packed(run)
    return reports


def _joining(run: Run, before: Manifest) -> dict[str, RecordTable]:
    """{cluster key: corrected versions of records that join it}, those that no build has served yet."""
    replaced, new = set(run.catalog.erased().values()), run.catalog.members("")
    new = new.take(np.flatnonzero(np.array([name in replaced for name in new.ids], bool)))
    if not len(new):
        return {}
    clustering = load_clustering(run.layout, before.clustering)
    assigned = assign_members(run, new, clustering, unchanged=True)
    return {clustering.keys[k]: new.take(np.flatnonzero(assigned == k)) for k in np.unique(assigned)}


def _reached(run: Run, request: requests.Request, joining: Mapping[str, RecordTable]) -> set[str]:
    """Keys of the clusters that a request's records leave or join."""
    names = set(run.catalog.erased([request.id]).values())
    return {*request.body["members"], *(key for key, new in joining.items() if not names.isdisjoint(new.ids))}


def _note(run: Run, request: requests.Request, reports: Mapping[str, Report]) -> None:
    """Notes in a request what answers for its clusters now; for one of an earlier call the new report replaces it."""
    if not reports:
        return
    facts = {fact["cluster"]: fact for fact in request.body["approximate"]}
    for key, report in reports.items():
        name = run.catalog.salted("cluster", key)
        facts[name] = {"cluster": name, **dataclasses.asdict(report)}
    requests.advance(run.catalog, [request.id], "approximated")
    requests.note(run.catalog, request.id, approximate=list(facts.values()))


def _register(run: Run, key: str, update: _Update) -> None:
    """Registers an approximate slice on disk with all that it was made with, once it was read back."""
    parent, known = run.catalog.slices()[slice_of(_parent(run, key))], run.catalog.slices()
    if update.name not in known:
        digests = {"digest": update.name, "params_digest": arrays_digest(update.arrays)}
        row = parent._replace(created=time.time(), images=0, **digests)
        run.catalog.add_slice(row, update.rows)
    load_slice(run, update.name)


def _refuse_bad(reports: Mapping[str, Report], mode: str, force: bool) -> None:
    """Refuses updates that are not finite, and those of a solver that did not converge."""
    later = "nothing is published; the request is accepted, and lmeraser process serves it exactly"
    if not all(np.isfinite([report.change, report.residual]).all() for report in reports.values()):
        raise UserError(f"--mode={mode}: an update is not finite; {later}")
    worst = max((report.residual for report in reports.values()), default=0.0)
    if worst > influence.LARGEST_RESIDUAL and not force:
        again = "the same command with --request=ID of the request and --force publishes it anyway"
        raise UserError(f"--mode={mode}: the solver ended at residual {worst:.2g}; {later}; {again}")


def _replace_common(run: Run, entries: dict[str, str]) -> None:
    """Makes the common head of the records that are left; without any there is none."""
    wanted = current_plan(run)
    tune_missing(run, wanted, {key: target for key, target in wanted.missing.items() if key == SliceKind.COMMON})
    del entries[SliceKind.COMMON]
    if SliceKind.COMMON in wanted.entries:
        entries[SliceKind.COMMON] = wanted.entries[SliceKind.COMMON]


def _parent(run: Run, key: str) -> str:
    """The newest exact slice of a cluster: states that came before live on until the build that serves the erasure."""
    refs = (manifest.entries.get(key, "") for manifest in run.catalog.manifests())
    return next(ref for ref in refs if ref and not is_approximate(ref))


def _update(run: Run, key: str, joining: RecordTable, mode: str, calibrate: bool) -> _Update | None:
    """Computes the approximate slice of a cluster that some records join; None where it has no member left."""
    parent = _parent(run, key)
    rows = run.catalog.rows_of(slice_of(parent))
    staying, gone = run.catalog.at(rows), run.catalog.at(rows, erased=True)
    if not len(staying) and not len(joining):
        return None
    settings, calibrate = influence.settings_of(mode, edited=bool(len(joining))), calibrate and not len(joining)
    recipe = {"version": VERSION, "parent": parent, "settings": dataclasses.asdict(settings), "calibrate": calibrate}
    for role, table in (("removed", gone), ("joining", joining)):
        recipe[role] = digest(list(zip(table.ids, table.contents, table.labels.tolist(), strict=True)))
    recipe |= {"program": run.fingerprint, "strength": LEAST_STRENGTH}
    name = APPROXIMATE + digest(recipe)[: 64 - len(APPROXIMATE)]
    heldout = run.catalog.live("holdout") if calibrate else RecordTable.empty()
    tables = staying, joining, gone, heldout
    problem, start = _problem(run, tables), load_slice(run, parent)
    problem = dataclasses.replace(problem, strength=strengths(start, run.config.tuning))
    place, (chunks, size) = np.repeat(range(len(tables)), list(map(len, tables))), problem.rows.labels.shape[:2]

    def weights(*used: int) -> np.ndarray:
        """[C, B]: 1 / the number of records in some of the tables."""
        chosen = np.isin(place, used)
        return influence.chunked((chosen / max(chosen.sum(), 1)).astype(np.float32), size, chunks)

    before, after, held = weights(0, 2), weights(0, 1), weights(3) if calibrate else None
    new, report = influence.update(problem, jax.device_put(start), before, after, settings, held)
    rows = np.concatenate([rows, joining.rows])
    return _Update(name, recipe, rows, checkpoints.flatten(jax.device_get(new)), report)


def strengths(slice_: Slice, tuning: Tuning) -> Slice:
    """The L2 strength lambda of each leaf: that of the adapters or the weight decay, `LEAST_STRENGTH` without one."""
    own = jax.tree.map(lambda _: tuning.lora_l2 or LEAST_STRENGTH, slice_.backbone)
    head = tuning.head_decay or LEAST_STRENGTH
    return Slice(tuning.prompt_decay or LEAST_STRENGTH, head, head, own)


def _problem(run: Run, tables: tuple[RecordTable, ...]) -> Problem:
    """The problem over some records one after the other, padded to a size that many clusters share; no strength yet."""
    spec, size = run.tuning_spec, TEXT_CHUNK if run.tuning_spec.is_text else CHUNK
    for table in tables:
        check_pixel_hashes(run.images, table)
    stored = run.features if spec.on_features else lambda table: run.images[table.rows]
    inputs = np.concatenate([stored(table) for table in tables if len(table)])
    labels = np.concatenate([table.labels for table in tables])
    params, chunks = on_device(run.backbone, np.dtype(np.float32), run.mesh), bucket(len(labels)) // size
    values = network_inputs(spec, params, inputs, np.arange(len(labels)), run.mesh)
    targets = np.asarray(targets_of(spec, values, labels))
    chunk = functools.partial(influence.chunked, size=size, chunks=chunks)
    return Problem(objective_of(spec), params, Rows(jax.tree.map(chunk, values), chunk(targets)), None)


@functools.lru_cache(maxsize=4)
def objective_of(tuning_spec: TuningSpec) -> Objective:
    """The loss of a slice on un-augmented images, on features, or on texts."""

    def outputs(slice_: Slice, params: Any, inputs: Any) -> jax.Array:
        if not (tuning_spec.on_features or tuning_spec.is_text):
            inputs = centred(inputs, tuning_spec.image_spec)
        return outputs_of(slice_, tuning_spec, params, inputs)

    return Objective(outputs)
