"""The purge: removes everything that was made with an erased record, then the record itself.

What the surviving manifests refer to is kept: the current manifest, and older ones that hold no approximate slice and
that no erased record was a member or a sampled record of.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import entries, remove_others
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.rows import Manifest
from lmeraser_jax.unlearning import receipts
from lmeraser_jax.unlearning.artifacts import (
    forget_clusterings,
    is_approximate,
    sample_of,
    slice_of,
    tainted,
    was_sampled,
)
from lmeraser_jax.unlearning.run import Run


@dataclasses.dataclass(frozen=True)
class Survivors:
    """Manifests that survive a purge, and the digests of the slices and clusterings that they refer to."""

    manifests: tuple[Manifest, ...]
    slices: frozenset[str]
    clusterings: frozenset[str]


def surviving(run: Run, served: Collection[str]) -> Survivors:
    """What survives the purge of the given requests. Reads only."""
    catalog, erased = run.catalog, run.catalog.erased(served)
    sound_slices = {name for name in catalog.slices() if not is_approximate(name)} - tainted(run, erased).all
    newest_first = catalog.manifests()
    manifests = newest_first[:1]
    for manifest in newest_first[1:]:
        if not _slices(manifest) <= sound_slices:
            continue
        if not was_sampled(sample_of(run.layout, manifest.clustering), erased.values()):
            manifests.append(manifest)
    return referenced(catalog, manifests)


def referenced(catalog: Catalog, manifests: Sequence[Manifest]) -> Survivors:
    """What some manifests refer to; with each slice the clustering whose sample tells whether the slice is tainted."""
    rows, names = catalog.slices(), {name for manifest in manifests for name in _slices(manifest)}
    clusterings = {manifest.clustering for manifest in manifests}
    clusterings |= {rows[name].clustering for name in names if name in rows} - {""}
    return Survivors(tuple(manifests), frozenset(names), frozenset(clusterings))


def _slices(manifest: Manifest) -> set[str]:
    return {slice_of(reference) for reference in manifest.entries.values()}


def purge(run: Run) -> None:
    """Removes what no surviving manifest refers to, and finishes the published requests with their receipts.

    Files go first, then the catalog's rows, then the pages that held them, and only then a request counts as
    purged: a purge that was cut short is repeated by the next command that writes.
    """
    catalog = run.catalog
    published = [request for request in requests.listed(catalog, only_open=True) if request.state == "published"]
    names = [request.id for request in published]
    survivors, erased = surviving(run, names), catalog.erased(names)
    remove_others(run.layout.slices, survivors.slices)
    remove_others(run.layout.clusterings, survivors.clusterings)
    forget_clusterings()
    drop_packed(run)
    if erased:
        for file in _row_files(run):
            file.overwrite(np.array(sorted(erased), np.int64))
        run.layout.picture.unlink(missing_ok=True)
    with catalog.transaction():
        for version in dropped_versions(catalog, survivors):
            catalog.drop_manifest(version)
        for name in set(catalog.slices()) - survivors.slices:
            catalog.drop_slice(name)
        catalog.forget(names)
    if published:
        catalog.flush()
        links = receipts.write(run, published)
        with catalog.transaction():
            requests.advance(catalog, names, "purged")
            catalog.add_receipts(links)
    if run.signing_key is not None:
        receipts.sign(run, run.signing_key)


def drop_packed(run: Run) -> None:
    """Removes the packed slices of all states but the published one: nobody reads them, and a rollback packs anew."""
    remove_others(run.layout.packed, _packed_names(run))


def _packed_names(run: Run) -> set[str]:
    manifest = run.catalog.manifest()
    return {run.layout.packed_slices(manifest.entries).name} if manifest else set()


def dropped_versions(catalog: Catalog, survivors: Survivors) -> list[int]:
    """Versions of the manifests that do not survive."""
    surviving_versions = {manifest.version for manifest in survivors.manifests}
    return sorted({manifest.version for manifest in catalog.manifests()} - surviving_versions)


def _row_files(run: Run) -> list[RowFile]:
    """The files with a row for each record: images and features."""
    shape = (run.backbone.config.feature_size,)
    features = [RowFile(path, shape, np.float32) for path in run.layout.feature_files()]
    return [image_file(run.layout, run.catalog), *features]


def leftovers(run: Run) -> list[str]:
    """Compares a workdir with what its manifests refer to: one line for each thing too many or missing."""
    survivors, lines = referenced(run.catalog, run.catalog.manifests()), []
    for folder, names in ((run.layout.slices, survivors.slices), (run.layout.clusterings, survivors.clusterings)):
        on_disk = {path.name for path in entries(folder)}
        lines += [f"leftover {folder.name}/{name}" for name in sorted(on_disk - names)]
        lines += [f"missing {folder.name}/{name}" for name in sorted(names - on_disk)]
    on_disk = {path.name for path in entries(run.layout.packed)}
    lines += [f"leftover packed/{name}" for name in sorted(on_disk - _packed_names(run))]
    unregistered = sorted(set(run.catalog.slices()) - survivors.slices)
    lines += [f"leftover slice in the catalog {name}" for name in unregistered]
    free_rows = run.catalog.free_rows()
    for file in _row_files(run):
        lines += [f"leftover row {row} of {file.path.name}" for row in file.filled(free_rows)]
    return lines
