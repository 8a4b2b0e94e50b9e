"""Audit: build the state again from the live records, in a temporary place, and compare every bit.

If an erased record had left a trace in what is served, a build that never saw it would differ. Files and catalog are
also searched for leftovers: anything that no manifest refers to.
"""

import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import Item, content_hash
from lmeraser_jax.errors import Damaged, UserError
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.atomic_files import is_there
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import Manifest
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training import tune
from lmeraser_jax.training.jobs import make_job
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.unlearning.artifacts import is_approximate, load_clustering, load_slice, slice_of, split_reference
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.run import Run

PIECE = 4096  # images copied at a time
TOLERANCE = 1e-2  # of a slice's largest number, where another program made it

State = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of an audit."""

    checked: int  # clusters that were rebuilt
    clusters: int  # clusters in all
    identical: int  # rebuilt slices with the same bits
    near: int  # slices that another program (library, device kind, lanes) made and whose numbers agree within TOLERANCE
    differences: tuple[str, ...]  # a line for everything that differs or should not be there

    @property
    def ok(self) -> bool:
        return not self.differences

    def text(self) -> str:
        """The verdict in words."""
        lines = [f"bit-identical: {self.identical} of {self.checked} slices"]
        if self.checked < self.clusters:
            lines[0] += f" (a sample; {self.clusters} clusters in all)"
        if self.near:
            lines.append(f"made by another program, and equal within {TOLERANCE:g}: {self.near} slices")
        return "\n".join(lines + [f"differs: {line}" for line in self.differences])


def state(run: Run, keys: Collection[str] | None = None) -> State:
    """{section: {name: value}}: everything that is stored or served as a function of the live records.

    Free of row numbers and times. Parameters of the clusters `keys` only, None: of all.
    """
    manifest = run.catalog.manifest()
    assert manifest is not None, "state() needs a published manifest"
    clustering = load_clustering(run.layout, manifest.clustering)
    records, entries = run.catalog.live("train"), manifest.entries
    contents = zip(records.labels.tolist(), records.owners, records.contents, strict=True)
    return {
        "records": dict(zip(records.ids, contents, strict=True)),
        "clustering": {"digest": manifest.clustering},
        "sample": dict(zip(clustering.sample, clustering.labels.tolist(), strict=True)),
        "prototypes": {key: row.tobytes() for key, row in zip(clustering.keys, clustering.prototypes, strict=True)},
        "assignment": dict(zip(records.ids, records.clusters, strict=True)),
        "slices": dict(entries),
        "parameters": {key: _read_leaves(run, entries[key]) for key in entries if keys is None or key in keys},
    }


def _read_leaves(run: Run, ref: str) -> dict[str, bytes] | str:
    """The leaves of a slice; a message when it cannot be read, which differs from any slice."""
    try:
        return leaves(load_slice(run, ref))
    except Damaged as error:
        return str(error)


def leaves(slice_: Slice) -> dict[str, bytes]:
    """The arrays of a slice as bytes, by name."""
    return {name: array.tobytes() for name, array in checkpoints.flatten(slice_).items()}


def differences(published: State, rebuilt: State) -> list[str]:
    """One line for every entry of two states that is not the same, bit for bit."""
    lines = []
    for section, name in _differing(published, rebuilt):
        value = published[section].get(name)
        reason = f": {value}" if section == "parameters" and isinstance(value, str) else ""
        lines.append(f"{section} {name}{reason}")
    return lines


def _differing(published: State, rebuilt: State) -> Iterator[tuple[str, str]]:
    """(section, name) of every entry that is not the same."""
    for section, values in published.items():
        for name in sorted(values.keys() | rebuilt[section].keys()):
            if values.get(name) != rebuilt[section].get(name):
                yield section, name


def audit(run: Run, sample: int = 0) -> Verdict:
    """Rebuilds from scratch in a temporary place and compares; also looks for leftovers of erased records.

    Args:
        run: opened for writing.
        sample: rebuild the slices of so many clusters only, drawn anew each time; 0: all.

    Raises:
        UserError: nothing is published yet, or an erasure is not finished.
    """
    root, manifest = run.layout.root, run.catalog.manifest()
    if manifest is None:
        raise UserError(f"{root} has nothing to audit; run: lmeraser train {run.layout.flag}")
    if requests.any_open(run.catalog):
        count = sum(map(is_approximate, manifest.entries.values()))
        served = f"; until then {count} clusters answer with approximate slices" if count else ""
        raise UserError(f"an erasure is not finished{served}; finish it with: lmeraser process {run.layout.flag}")
    keys = sorted(manifest.entries)
    chosen = frozenset(random.sample(keys, min(sample, len(keys))) if sample else keys)
    rebuilt = _rebuild(run, chosen if sample else None)
    _rebuild_pinned(run, rebuilt, chosen)
    published = state(run, chosen)
    identical = sum(published["parameters"][key] == rebuilt["parameters"].get(key) for key in chosen)
    near = [place for place in _differing(published, rebuilt) if _is_near(run, manifest, published, rebuilt, *place)]
    for section, key in near:
        rebuilt[section][key] = published[section][key]
    near_slices = sum(section == "parameters" for section, _ in near)
    lines = differences(published, rebuilt) + leftovers(run)
    return Verdict(len(chosen), len(keys), identical, near_slices, tuple(lines))


def _rebuild(run: Run, only: frozenset[str] | None) -> State:
    """The state that the live records give when nothing but them, the config and the backbone is known."""
    run.layout.scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="audit-", dir=run.layout.scratch, ignore_cleanup_errors=True) as folder:
        layout = Layout(folder)
        with contextlib.closing(Catalog(layout.catalog)) as catalog:
            scratch = dataclasses.replace(run, layout=layout, catalog=catalog, writable=True)
            _copy_live(run, scratch)
            build(scratch, only)
            return state(scratch, only)


def _rebuild_pinned(run: Run, rebuilt: State, chosen: Collection[str]) -> None:
    """Puts slices that a rollback chose, made again from their own settings, in place of those of the recipes."""
    for key, ref in run.catalog.pins().items():
        if key in rebuilt["slices"]:
            rebuilt["slices"][key] = ref
        if key in chosen:
            slice_ = rebuild_slice(run, ref)
            rebuilt["parameters"][key] = leaves(slice_) if slice_ is not None else {}


def rebuild_slice(run: Run, ref: str) -> Slice | None:
    """Tunes a slice, or an earlier epoch of it, again from its own members and settings; None where a member left."""
    name, step = split_reference(ref)
    row, records = run.catalog.slices().get(name), run.catalog.at(run.catalog.rows_of(name))
    if row is None or len(records) != row.size:
        return None
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, tuning=Tuning(**json.loads(row.tuning))))
    tuning_spec = run.tuning_spec
    labels = np.zeros(run.catalog.rows_used(), np.int32)
    labels[records.rows] = records.labels
    job = make_job(row.cluster, records.rows, tuning_spec.tuning)
    job = dataclasses.replace(job, snapshots=(step,) if step else ())
    inputs = run.training_data(records, tuning_spec)
    for tuned in tune.make_slices(tuning_spec, run.backbone, [job], inputs, labels, run.mesh):
        if tuned.step == step or tuned.final:
            return tuned.slice
    return None


def _is_near(run: Run, manifest: Manifest, published: State, rebuilt: State, section: str, key: str) -> bool:
    """Whether another program made these numbers, and they agree with the rebuilt ones within the tolerance."""
    if section not in ("prototypes", "parameters"):
        return False
    fingerprint = manifest.fingerprint
    if section == "parameters":
        row = run.catalog.slices().get(slice_of(published["slices"].get(key, "")))
        fingerprint = row.fingerprint if row is not None else run.fingerprint
    numbers, others = (_numbers(state_[section].get(key, "")) for state_ in (published, rebuilt))
    if fingerprint == run.fingerprint or numbers.shape != others.shape:
        return False
    return bool(np.abs(numbers - others).max(initial=0) <= TOLERANCE * np.abs(others).max(initial=0))


def _numbers(value: bytes | dict[str, bytes] | str) -> np.ndarray:
    """float32 [n]: the numbers of a prototype or of a slice's leaves; NaN where there is none that can be read."""
    if isinstance(value, str):
        return np.full(1, np.nan, np.float32)
    return np.frombuffer(b"".join(value.values()) if isinstance(value, dict) else value, np.float32)


def _copy_live(run: Run, scratch: Run) -> None:
    """Copies live private and public records in the order of their ids: rows get new numbers."""
    catalog, images = scratch.catalog, run.images
    catalog.set("dataset", run.catalog.get("dataset"))
    if is_there(run.layout.public):
        shutil.copytree(run.layout.public, scratch.layout.public)
    file = RowFile(scratch.layout.images, images.shape[1:], images.dtype)
    for split in ("train", "public"):
        records, start, contents = run.catalog.live(split), len(file), []
        with progress("copy", len(records)) as shown:
            for first in range(0, len(records), PIECE):
                piece = np.asarray(images[records.rows[first : first + PIECE]])
                contents += [content_hash(image) for image in piece]  # a rotten image row shows as a difference
                file.append(piece)
                shown.advance(len(piece))
        items = map(Item, records.ids, itertools.repeat(split), records.labels.tolist(), records.owners)
        with catalog.transaction():
            catalog.add_records(items, range(start, len(file)), contents)
            catalog.set("rows", len(file))
