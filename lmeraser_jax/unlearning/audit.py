"""Audit: build everything again from the live records, somewhere else, and compare every leaf.

This is the product's proof: if an erased record had left a trace in what is served, a build that never saw
it would differ. What is merely stored is searched for leftovers: anything that no kept manifest needs.
"""

import contextlib
import dataclasses
import json
import random
import shutil
import tempfile
from typing import Any

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import Item, content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training import tune
from lmeraser_jax.training.jobs import make_job
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, parts_of, slice_of
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.run import Run

PIECE = 4096  # images copied at a time
TOLERANCE = 1e-2  # of a slice's largest number, where another program made it


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an audit found.

    Attributes:
        checked: clusters that were rebuilt.
        clusters: clusters in all.
        identical: rebuilt slices with the same bits.
        near: rebuilt slices that another program made (library, device kind, lanes): their bits cannot be
            made here, but all numbers agree within `TOLERANCE` of the slice's largest.
        differences: a line for everything that differs or should not be there.
    """

    checked: int
    clusters: int
    identical: int
    near: int
    differences: tuple[str, ...]

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


def state(run: Run, keys: frozenset[str] | None = None) -> dict[str, Any]:
    """Everything that is stored or served as a function of the live records, free of row numbers and times.

    Args:
        run: an opened workdir with a published manifest.
        keys: clusters whose parameters are read; None: all.
    """
    manifest = run.catalog.manifest()
    assert manifest is not None, "state() needs a published manifest"
    clustering = load_clustering(run.layout, manifest.clustering)
    records = run.catalog.live("train")
    found: dict[str, Any] = {
        "records": dict(
            zip(records.ids, zip(records.labels.tolist(), records.owners, records.contents, strict=True), strict=True)
        ),
        "clustering": manifest.clustering,
        "sample": dict(zip(clustering.sample, clustering.labels.tolist(), strict=True)),
        "prototypes": {key: row.tobytes() for key, row in zip(clustering.keys, clustering.prototypes, strict=True)},
        "assignment": dict(zip(records.ids, records.clusters, strict=True)),
        "slices": dict(manifest.entries),
    }
    wanted = [key for key in manifest.entries if keys is None or key in keys]
    found["parameters"] = {key: _bytes(run, manifest.entries[key]) for key in wanted}
    return found


def _bytes(run: Run, name: str) -> dict[str, bytes] | str:
    """The leaves of a slice as bytes; a message when it cannot be read, which differs from any slice."""
    try:
        return leaves(load_slice(run, name))
    except UserError as error:
        return str(error)


def leaves(part: Slice) -> dict[str, bytes]:
    """The arrays of a slice as bytes, by name."""
    return {name: array.tobytes() for name, array in checkpoints.flatten(part).items()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """One line for every entry of two states that is not the same, bit for bit."""
    lines = []
    for part in one:
        if not isinstance(one[part], dict):
            lines += [part] * (one[part] != other[part])
            continue
        for key in sorted(set(one[part]) | set(other[part])):
            a, b = one[part].get(key), other[part].get(key)
            if a != b:
                detail = f": {a}" if part == "parameters" and isinstance(a, str) else ""
                lines.append(f"{part} {key}{detail}")
    return lines


def audit(run: Run, sample: int = 0) -> Verdict:
    """Rebuilds from scratch in a temporary place and compares; also looks for leftovers of erased records.

    Args:
        run: a workdir opened for writing, with a published state and no open request.
        sample: rebuild the slices of so many clusters only, drawn anew each time; 0: all.

    Raises:
        UserError: nothing is published yet, or an erasure is not finished.
    """
    manifest = run.catalog.manifest()
    if manifest is None:
        raise UserError(f"{run.layout.root} has nothing to audit; run: lmeraser train --workdir={run.layout.root}")
    if requests.any_open(run.catalog):
        raise UserError(
            "an erasure is not finished; finish it with: lmeraser process --workdir=" + str(run.layout.root)
        )
    keys = sorted(manifest.entries)
    chosen = frozenset(random.sample(keys, min(sample, len(keys))) if sample else keys)
    run.layout.scratch.mkdir(exist_ok=True)
    folder = tempfile.mkdtemp(prefix="audit-", dir=run.layout.scratch)
    try:
        rebuilt = _rebuild(run, Layout(folder), chosen if sample else None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = state(run, chosen)
    _put_pins(run, rebuilt, chosen)
    near = _made_elsewhere(run, found, rebuilt)
    lines = [line for line in differences(found, rebuilt) if line not in near]
    same = [key for key in chosen if found["parameters"][key] == rebuilt["parameters"].get(key)]
    near_slices = sum(line.startswith("parameters") for line in near)
    return Verdict(len(chosen), len(keys), len(same), near_slices, tuple(lines + leftovers(run)))


def _put_pins(run: Run, rebuilt: dict[str, Any], chosen: frozenset[str]) -> None:
    """Puts what a rollback chose in the place of what the recipes call for, made again from its own settings."""
    for key, ref in run.catalog.pins().items():
        if key in rebuilt["slices"]:
            rebuilt["slices"][key] = ref
        if key in chosen:
            part = remade(run, ref)
            rebuilt["parameters"][key] = leaves(part) if part is not None else {}


def remade(run: Run, ref: str) -> Slice | None:
    """Tunes one slice again, on its own members and with its own settings; None where a member is no longer live.

    Args:
        run: a workdir that holds the slice.
        ref: its reference; with a step, the earlier epoch.
    """
    name, step = parts_of(ref)
    row, records = run.catalog.slice(name), run.catalog.at(run.catalog.rows_of(name))
    if row is None or len(records) != row.size:
        return None
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, tuning=Tuning(**json.loads(row.tuning))))
    problem, inputs = run.tuning_spec, run.training_data(records, run.tuning_spec)
    labels = np.zeros(run.catalog.rows_used(), np.int32)
    labels[records.rows] = records.labels
    job = dataclasses.replace(make_job(row.cluster, records.rows, problem.tuning), snapshots=(step,) if step else ())
    for tuned in tune.make_slices(problem, run.backbone, [job], inputs, labels, run.mesh):
        if tuned.step == step or tuned.final:
            return tuned.slice
    return None


def _made_elsewhere(run: Run, found: dict[str, Any], rebuilt: dict[str, Any]) -> set[str]:
    """Difference lines of numbers that another program made and that agree within the tolerance."""
    manifest = run.catalog.manifest()
    assert manifest is not None
    near = set()
    if manifest.fingerprint != run.fingerprint:
        for key, one in found["prototypes"].items():
            if _close({"": one}, {"": rebuilt["prototypes"].get(key, b"")}):
                near.add(f"prototypes {key}")
    for key, one in found["parameters"].items():
        row, other = run.catalog.slice(slice_of(found["slices"][key])), rebuilt["parameters"].get(key)
        if row is not None and row.fingerprint != run.fingerprint and isinstance(one, dict) and isinstance(other, dict):
            if _close(one, other):
                near.add(f"parameters {key}")
    return near & set(differences(found, rebuilt))


def _close(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether float32 numbers agree within the tolerance, relative to the largest of them."""
    a, b = (np.frombuffer(b"".join(leaves.values()), np.float32) for leaves in (one, other))
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= TOLERANCE * np.abs(b).max(initial=0))


def _rebuild(run: Run, layout: Layout, only: frozenset[str] | None) -> dict[str, Any]:
    """The state that the live records give when nothing but them, the config and the backbone is known."""
    layout.root.mkdir(exist_ok=True)
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        scratch = dataclasses.replace(run, layout=layout, catalog=catalog, writable=True)
        _copy_live(run, scratch)
        build(scratch, only)
        return state(scratch, only)


def _copy_live(run: Run, scratch: Run) -> None:
    """Copies live private and public records in the order of their ids: rows get new numbers."""
    catalog = scratch.catalog
    catalog.set("dataset", run.catalog.get("dataset"))
    images = run.images
    file = RowFile(scratch.layout.images, images.shape[1:], np.uint8)
    for split in ("train", "public"):
        records, start, contents = run.catalog.live(split), len(file), []
        with progress("copy", len(records)) as shown:
            for first in range(0, len(records), PIECE):
                piece = np.asarray(images[records.rows[first : first + PIECE]])
                contents += [content_hash(image) for image in piece]  # a rotten image row shows as a difference
                file.append(piece)
                shown.advance(len(piece))
        splits = [split] * len(records)
        items = [Item(*item) for item in zip(records.ids, splits, records.labels.tolist(), records.owners, strict=True)]
        with catalog.transaction():
            catalog.add_records(items, range(start, start + len(items)), contents)
            catalog.set("rows", start + len(items))
