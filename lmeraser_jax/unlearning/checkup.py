"""The doctor's look at what was built: backbone, features, clusterings, slices, and the published state as a whole."""

import contextlib
import gc
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.errors import join_limited
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.progress import progress
from lmeraser_jax.storage.atomic_files import remove_others
from lmeraser_jax.storage.ingest import import_settings
from lmeraser_jax.storage.rows import Manifest
from lmeraser_jax.training import clustering as clusters
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.training.fingerprint import fingerprint
from lmeraser_jax.training.tune import mesh_of
from lmeraser_jax.unlearning import plan
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, slice_of
from lmeraser_jax.unlearning.doctor import Problem, Workdir, run_check
from lmeraser_jax.unlearning.purge import referenced
from lmeraser_jax.unlearning.run import Run, backbone_inputs

TRAIN = "lmeraser train makes it again"


def examine(patient: Workdir, features: int, devices: Sequence[Any] | None) -> list[Problem]:
    """Looks at everything that was built from sound records.

    Args:
        patient: with a config and a catalog that hold what they should.
        features: rows of the feature cache to compute again and compare.
        devices: all by default.
    """
    with _without_noise():
        return _examined(patient, features, devices)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """An array that cannot be read leaves the reads of its neighbours to a loop that Orbax has closed by then."""
    shown = sys.unraisablehook

    def hook(problem: Any) -> None:
        if "Event loop is closed" not in str(problem.exc_value):
            shown(problem)

    sys.unraisablehook = hook
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = shown


def _examined(patient: Workdir, features: int, devices: Sequence[Any] | None) -> list[Problem]:
    run, found = _opened(patient, devices)
    if run is None:
        return found
    checks: tuple[tuple[str, Callable[[Run, bool], Iterator[Problem]]], ...] = (
        ("config", _config),
        ("features", lambda run, fix: _features(run, fix, features)),
        ("slices", _slices),
        ("clusterings", _clusterings),
        ("slices", _unregistered),
        ("state", _contradictions),
    )
    for part, check in checks:
        found += run_check(part, lambda check=check: check(run, patient.fix))
    return found


def _opened(patient: Workdir, devices: Sequence[Any] | None) -> tuple[Run | None, list[Problem]]:
    """The workdir as a run; None where its backbone cannot be used."""
    layout, config, fix = patient.layout, patient.config, patient.fix
    try:
        backbone, inputs = backbone_lib.load(layout.backbone)
    except Exception as error:  # damaged files make Orbax raise nearly anything
        again = "converts the weights again" if config.backbone.weights else "trains it on the public images again"
        remedy = f"lmeraser train {again}: the same bits on the same program, else every slice is tuned again with it"
        if fix and layout.backbone.exists():
            aside = layout.backbone.with_name("backbone.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(layout.backbone, aside)
            remedy = f"moved to {aside.name}; {remedy}"
        return None, [Problem("backbone", str(error), remedy, "dropped" if fix else "wrong")]
    found = []
    lines = settings.differences(inputs, backbone_inputs(config))
    if lines:
        what = f"config.json differs from what the backbone was made with: {'; '.join(lines)}"
        found.append(Problem("config", what, "restore config.json"))
    run = Run(layout, config, patient.catalog, backbone, mesh_of(devices), fix)
    try:
        assert run.spec
    except ValueError as error:
        return None, [*found, Problem("backbone", str(error), "restore config.json and the backbone from a copy")]
    return run, found


def _config(run: Run, fix: bool) -> Iterator[Problem]:
    then, now = run.catalog.get("dataset")["settings"], import_settings(run.config)
    lines = settings.differences(then, now, "data.")
    if lines:
        what = f"config.json differs from what the images were imported with: {'; '.join(lines)}"
        yield Problem("config", what, "restore config.json")
    seed = run.catalog.get("rank_seed")
    if seed is not None and seed != run.config.seed:
        if fix:
            run.catalog.rank(run.config.seed)
        remedy = "ranked again" if fix else "--fix ranks them again"
        what = f"records are ranked for sampling with seed {seed}, not {run.config.seed}"
        yield Problem("records", what, remedy, "fixed" if fix else "wrong")


def _features(run: Run, fix: bool, count: int) -> Iterator[Problem]:
    """Files of another backbone or of a wrong length, rows of no record, rows that have other numbers when computed."""
    manifest, now = run.catalog.manifest(), fingerprint(run.config.tuning, run.mesh)
    programs = {now, *(row.fingerprint for row in run.catalog.slices().values())}
    programs |= {manifest.fingerprint} if manifest else set()
    known = {file.path: file for file in map(run.feature_file, sorted(programs))}
    for path in sorted(run.layout.records.glob("features-*.f32")):
        file = known.get(path)
        if file is None:
            why = "belongs to another backbone, image size or program"
        else:
            why = _unfit(run, file) or (_changed(run, file, count) if file.path == run.feature_file(now).path else "")
        if why:
            if fix:
                path.unlink()
            remedy = "removed; features are computed again when they are needed" if fix else "--fix removes it"
            yield Problem("features", f"{path.name} {why}", remedy, "fixed" if fix else "wrong")


def _unfit(run: Run, file: RowFile) -> str:
    rows = run.catalog.rows_used()
    if file.path.stat().st_size % file.row_bytes or len(file) > rows:
        return f"has {file.path.stat().st_size} bytes: no whole rows, or more than {rows}"
    owned = {row[0] for row in run.catalog.db.execute("SELECT row FROM records")}
    view = file.view() if len(file) else np.zeros((0, *file.shape), np.float32)
    stale = [row for row in range(len(view)) if row not in owned and np.nan_to_num(view[row]).any()]
    return f"holds features in rows of no record: {join_limited(stale)}" if stale else ""


def _changed(run: Run, file: RowFile, count: int) -> str:
    """Compares evenly spread rows of live records, bit for bit, with what the backbone gives now."""
    records = run.catalog.live("train", "holdout", "test", "public")
    rows = records.rows[records.rows < len(file)]
    if not count or not len(rows):
        return ""
    rows = np.unique(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)])
    rows = rows[~np.isnan(file.view()[rows]).any(axis=1)]
    if not len(rows):
        return ""
    stored, computed = file.view()[rows], run.extractor()(run.images[rows])
    other = rows[(stored.view(np.uint32) != computed.view(np.uint32)).any(axis=1)]
    return f"holds other numbers than the backbone gives, in {len(other)} of {len(rows)} rows" if len(other) else ""


def _slices(run: Run, fix: bool) -> Iterator[Problem]:
    """Every registered or published slice against its digest."""
    manifest, older = run.catalog.manifest(), run.catalog.manifests()[1:]
    current = set(manifest.entries.values()) if manifest else set()
    refs = sorted({*current, *run.catalog.slices(), *(ref for state in older for ref in state.entries.values())})
    with progress("slices", len(refs)) as shown:
        for ref in refs:
            shown.advance(1)
            try:
                load_slice(run, ref)
                continue
            except Exception as error:  # damaged files make Orbax raise nearly anything
                why = f"slice {ref[:12]} is missing or damaged: {str(error)[:300]}"
            if fix:
                _drop_slice(run, slice_of(ref), older)
            if ref in current:
                yield Problem("slices", why, f"dropped; {TRAIN}" if fix else f"--fix drops it; {TRAIN}", _dropped(fix))
            else:
                remedy = "dropped, with older states that had it" if fix else "--fix drops it: no current state has it"
                yield Problem("slices", why, remedy, "fixed" if fix else "wrong")


def _dropped(fix: bool) -> str:
    return "dropped" if fix else "wrong"


def _drop_slice(run: Run, name: str, older: Sequence[Manifest]) -> None:
    with run.catalog.transaction():
        run.catalog.drop_slice(name)
        for state in older:
            if name in {slice_of(ref) for ref in state.entries.values()}:
                run.catalog.drop_manifest(state.version)


def _clusterings(run: Run, fix: bool) -> Iterator[Problem]:
    """Every clustering that a kept state points at; the published one also against the features."""
    for number, manifest in enumerate(run.catalog.manifests()):
        why = ""
        try:
            why = _inconsistent(load_clustering(run.layout, manifest.clustering), manifest)
            why = why or ("" if number else _unlike_features(run, manifest))
        except Exception as error:  # a damaged file makes NumPy raise nearly anything
            why = str(error)
        if not why:
            continue
        if fix:
            shutil.rmtree(run.layout.clustering(manifest.clustering), ignore_errors=True)
            if number:
                run.catalog.drop_manifest(manifest.version)
        remedy = TRAIN if not number else "the older state is dropped with it"
        state = ("fixed" if number else "dropped") if fix else "wrong"
        what = f"clustering {manifest.clustering[:12]} is missing or damaged: {why}"
        yield Problem("clusterings", what, f"dropped; {remedy}" if fix else f"--fix drops it; {remedy}", state)
    wanted = referenced(run.catalog, run.catalog.manifests()).clusterings
    yield from _leftovers(run.layout.clusterings, wanted, "clusterings", fix)


def _inconsistent(clustering: Clustering, manifest: Manifest) -> str:
    """What a clustering says of itself: keys are digests of ids, labels and prototypes fit them."""
    members: dict[int, list[str]] = {}
    for name, label in zip(clustering.sample, clustering.labels.tolist(), strict=True):
        members.setdefault(label, []).append(name)
    keys = tuple(plan.digest(members[k]) for k in sorted(members))
    if not members:
        keys = clusters.shards(len(clustering.keys), 0, "").keys
    if keys != clustering.keys or members and sorted(members) != list(range(len(keys))):
        return "its keys are not the digests of its sampled ids"
    if len(clustering.prototypes) != len(keys) or not np.isfinite(clustering.prototypes).all():
        return "its prototypes are not one finite feature for each key"
    return "" if set(manifest.clusters) <= set(keys) else "the published state has clusters that it lacks"


def _unlike_features(run: Run, manifest: Manifest) -> str:
    """Makes the clustering again where that costs no pass through the backbone, on the program that made it."""
    chosen, name = plan.sampled(run)
    file = run.feature_file(manifest.fingerprint)
    here = fingerprint(run.config.tuning, run.mesh) == manifest.fingerprint
    if name != manifest.clustering or not here or not len(chosen) or len(file) <= chosen.rows.max():
        return ""
    features = np.asarray(file.view()[chosen.rows])
    if np.isnan(features).any():
        return ""
    again = clusters.cluster(chosen.ids, features, run.config.clustering, name)
    stored = load_clustering(run.layout, name)
    same = again.keys == stored.keys and np.array_equal(again.labels, stored.labels)
    same = same and again.prototypes.tobytes() == stored.prototypes.tobytes()
    return "" if same else "the cached features give other prototypes"


def _unregistered(run: Run, fix: bool) -> Iterator[Problem]:
    yield from _leftovers(run.layout.slices, set(run.catalog.slices()), "slices", fix)


def _leftovers(folder: Any, wanted: Collection[str], part: str, fix: bool) -> Iterator[Problem]:
    with contextlib.suppress(FileNotFoundError):
        extra = sorted({path.name for path in folder.iterdir()}.difference(wanted))
        if extra and fix:
            remove_others(folder, set(wanted))
        if extra:
            what = f"{part} that the catalog does not know: {join_limited([name[:12] for name in extra])}"
            yield Problem(part, what, "removed" if fix else "--fix removes them", "fixed" if fix else "wrong")


def _contradictions(run: Run, fix: bool) -> Iterator[Problem]:
    fresh, manifest = len(run.catalog.members("")), run.catalog.manifest()
    if manifest is None or fresh:
        what = f"{fresh} records are in no cluster yet" if manifest else "nothing is published yet"
        yield Problem("state", what, f"lmeraser train --workdir={run.layout.root} goes on", "note")
    for line in plan.contradictions(run):
        remedy = "restore config.json and catalog.db from a copy; if they are right, lmeraser train tunes again"
        yield Problem("state", line, remedy)
