"""The purge: everything that was made with an erased record goes, then the record itself.

What stays is what the surviving manifests point at: the current one, and older ones that no erased record
was a member or a sampled record of.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import remove_others
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.rows import Manifest
from lmeraser_jax.unlearning import receipts
from lmeraser_jax.unlearning.artifacts import slice_of, tainted, was_sampled
from lmeraser_jax.unlearning.run import Run


@dataclasses.dataclass(frozen=True)
class Survivors:
    """What survives a purge: manifests, slice digests with those they were tuned on from, clustering digests."""

    manifests: tuple[Manifest, ...]
    slices: frozenset[str]
    clusterings: frozenset[str]


def surviving(run: Run, served: Collection[str]) -> Survivors:
    """What survives the purge of the given requests. Reads only."""
    catalog, made, erased = run.catalog, run.catalog.slices(), run.catalog.erased(served)
    manifests, gone = catalog.manifests(), tainted(run, erased).all
    manifests = manifests[:1] + [
        manifest
        for manifest in manifests[1:]
        if all(name in made and name not in gone for name in _slices(manifest))
        and not was_sampled(run.layout, manifest.clustering, erased)
    ]
    return referenced(catalog, manifests)


def referenced(catalog: Catalog, manifests: Sequence[Manifest]) -> Survivors:
    """What some manifests point at; with each slice the clustering whose sample tells whether it is tainted."""
    made, names = catalog.slices(), {name for manifest in manifests for name in _slices(manifest)}
    clusterings = {manifest.clustering for manifest in manifests}
    clusterings |= {made[name].clustering for name in names if name in made} - {""}
    return Survivors(tuple(manifests), frozenset(with_parents(catalog, names)), frozenset(clusterings))


def _slices(manifest: Manifest) -> set[str]:
    return set(map(slice_of, manifest.entries.values()))


def with_parents(catalog: Catalog, names: Collection[str]) -> set[str]:
    """Slices and the slices that they were tuned on from."""
    made, found, open_ = catalog.slices(), set(), list(names)
    while open_:
        name = open_.pop()
        if name and name not in found:
            found.add(name)
            open_.append(made[name].parent if name in made else "")
    return found


def purge(run: Run) -> None:
    """Removes what no surviving manifest needs and finishes the published requests with their receipts.

    Files go first, then the catalog's rows, then the pages that held them, and only then a request counts as
    purged: a purge that was cut short is found again and repeated.
    """
    catalog = run.catalog
    served = [request for request in requests.listed(catalog, only_open=True) if request.state == "published"]
    names = [request.id for request in served]
    stays = surviving(run, names)
    remove_others(run.layout.slices, stays.slices)
    remove_others(run.layout.clusterings, stays.clusterings)
    erased = catalog.erased(names)
    if erased:
        _overwrite(run, np.array(sorted(erased.values()), np.int64))
        run.layout.picture.unlink(missing_ok=True)
    versions = {manifest.version for manifest in stays.manifests}
    with catalog.transaction():
        for manifest in catalog.manifests():
            if manifest.version not in versions:
                catalog.drop_manifest(manifest.version)
        for name in set(catalog.slices()) - stays.slices:
            catalog.drop_slice(name)
        catalog.forget(names)
    if served:
        catalog.flush()
        links = receipts.write(run, served)
        with catalog.transaction():
            requests.advance(catalog, names, "purged")
            catalog.add_receipts(links)


def _overwrite(run: Run, rows: np.ndarray) -> None:
    """Fills image rows and feature rows with zeros, and waits until they are on disk."""
    image_file(run.layout, run.catalog).overwrite(rows)
    for path in run.layout.records.glob("features-*.f32"):
        RowFile(path, (run.backbone.config.feature_size,), np.float32).overwrite(rows)


def leftovers(run: Run) -> list[str]:
    """What lies in a workdir although no kept manifest needs it: one line each."""
    stays, lines = referenced(run.catalog, run.catalog.manifests()), []
    for folder, wanted in ((run.layout.slices, stays.slices), (run.layout.clusterings, stays.clusterings)):
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        lines += [f"leftover {folder.name}/{name}" for name in sorted(there - wanted)]
        lines += [f"missing {folder.name}/{name}" for name in sorted(wanted - there)]
    lines += [f"leftover slice in the catalog {name}" for name in sorted(set(run.catalog.slices()) - stays.slices)]
    unused = run.catalog.free_rows()
    files = [image_file(run.layout, run.catalog)]
    files += [
        RowFile(p, (run.backbone.config.feature_size,), np.float32) for p in run.layout.records.glob("features-*.f32")
    ]
    for file in files:
        lines += [f"leftover row {row} of {file.path.name}" for row in file.filled(unused)]
    return lines
