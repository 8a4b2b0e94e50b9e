"""What a run keeps in files: slices, their earlier epochs, and clusterings; and which of them are tainted.

A slice is tainted by an erased record in two ways: as a member, or as one of the sample, which decided who the members
are. The second way matters only for slices that are kept whatever the live records call for: pinned and older ones.
"""

import contextlib
import functools
import io
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmeraser_jax.data.npz import read_arrays
from lmeraser_jax.errors import Damaged
from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.storage import atomic_files, checkpoints, packed
from lmeraser_jax.storage.atomic_files import publish_folder, why_unreadable, write_bytes
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.packed import Stack
from lmeraser_jax.storage.rows import Manifest, SliceKind
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training.clustering import Clustering, key_of

if TYPE_CHECKING:
    from lmeraser_jax.training.slices import Slice
    from lmeraser_jax.unlearning.run import Run

APPROXIMATE = "approximate-"  # begins the name of a slice that stands in for an exact one
AGAIN = "; lmeraser train on the same workdir makes it again"


def reference(name: str, step: int = 0) -> str:
    """How a manifest names a slice: its digest, or "digest@step" for an earlier epoch of it."""
    return f"{name}@{step}" if step else name


def split_reference(ref: str) -> tuple[str, int]:
    """The digest and the step of a reference; step 0 is the finished slice."""
    name, _, step = ref.partition("@")
    return name, int(step or 0)


def is_approximate(ref: str) -> bool:
    """Whether a reference names an approximate slice."""
    return ref.startswith(APPROXIMATE)


def short(name: str) -> str:
    """A slice's name as messages show it."""
    return name[: len(APPROXIMATE) + 12] if is_approximate(name) else name[:12]


def slice_of(ref: str) -> str:
    """The digest of a reference."""
    return split_reference(ref)[0]


def expected_params(catalog: Catalog, ref: str) -> str | None:
    """The digest that the parameters of a slice must have; None where the catalog does not know it."""
    name, step = split_reference(ref)
    if step:
        return catalog.epochs(name).get(step)
    row = catalog.slices().get(name)
    return row.params_digest if row else None


def load_slice(run: "Run", ref: str) -> "Slice":
    """One slice from its checkpoint, checked against the digest in the catalog.

    Raises:
        Damaged: the checkpoint is missing or damaged.
        OSError: it cannot be read now.
    """
    return _as_slice(run, ref, _load_arrays(run, ref))


def _load_arrays(run: "Run", ref: str) -> dict[str, np.ndarray]:
    """The arrays of `load_slice`."""
    name, step = split_reference(ref)
    params = expected_params(run.catalog, ref)
    if params is None:
        raise Damaged(f"slice {short(name)} is not in the catalog{AGAIN}")
    try:
        arrays, _, _ = checkpoints.load(run.layout.slice(name), step or None)
    except Damaged as error:
        raise Damaged(f"{error}{AGAIN}") from error
    if arrays_digest(arrays) != params:
        raise Damaged(f"slice {short(name)} is damaged: its bytes have another digest than the catalog says{AGAIN}")
    return arrays


def _as_slice(run: "Run", ref: str, arrays: Mapping[str, np.ndarray]) -> "Slice":
    from lmeraser_jax.training.slices import as_slice  # loads JAX, which readers of clusterings do without

    row = run.catalog.slices().get(slice_of(ref))
    common = row is not None and row.cluster == SliceKind.COMMON
    return as_slice(arrays, short(ref), None if common else run.tuning_spec.own_parameters)


def load_slices(run: "Run", manifest: Manifest, refs: Collection[str]) -> Iterator[tuple[str, "Slice"]]:
    """(reference, slice) of slices of a manifest: memory-mapped from its packed file, others from their checkpoints.

    Each is checked against its digest in the catalog. Raises as `load_slice` does.
    """
    import jax

    others = set(refs)
    with contextlib.suppress(Damaged, OSError):  # then the checkpoints tell
        for stack, intact in intact_slices(run, run.layout.packed_slices(manifest.entries), others):
            form = _as_slice(run, intact[0], stack.slice(intact[0]))
            mapped = checkpoints.unflatten(stack.arrays, form)
            for ref in intact:
                yield ref, jax.tree.map(operator.itemgetter(stack.places[ref]), mapped)
                others.remove(ref)
    for ref in sorted(others):
        yield ref, load_slice(run, ref)


def intact_slices(run: "Run", path: Path, refs: Set[str]) -> Iterator[tuple[Stack, list[str]]]:
    """What a packed file has of some slices with the bytes that the catalog says; stacks without any are left out.

    Raises as `packed.read` does.
    """
    for stack in packed.read(path):
        digests = {ref: arrays_digest(stack.slice(ref)) for ref in refs & stack.places.keys()}
        intact = [ref for ref in sorted(digests) if digests[ref] == expected_params(run.catalog, ref)]
        if intact:
            yield stack, intact


def packed_fault(run: "Run", entries: Mapping[str, str]) -> str:
    """What is wrong with the packed file of a state with these entries; "" where nothing is. Raises no `Damaged`."""
    path, refs = run.layout.packed_slices(entries), frozenset(entries.values())
    try:
        intact = {ref for _, names in intact_slices(run, path, refs) for ref in names}
    except Damaged as error:
        return str(error)
    return f"{path} lacks {len(refs - intact)} of {len(refs)} slices, or has other bytes" if refs - intact else ""


def pack(run: "Run", entries: Mapping[str, str]) -> None:
    """Writes the packed file of a state with these entries, unless it is there and whole.

    What other packed files have is copied; the rest comes from the checkpoints. A slice that cannot be read is left
    out: that is told to whoever needs the slice, and must not keep an erasure from being served.
    """
    path, refs = run.layout.packed_slices(entries), frozenset(entries.values())
    slices: dict[str, Mapping[str, np.ndarray]] = {}
    others = [file for file in atomic_files.entries(run.layout.packed) if file.name[0] != "."]
    for source in (path, *others):  # what a killed writer left is written over, under whoever would have it mapped
        with contextlib.suppress(Damaged, OSError):
            for stack, intact in intact_slices(run, source, refs - slices.keys()):
                slices |= {ref: stack.slice(ref) for ref in intact}
        if source == path and len(slices) == len(refs):
            return
    for ref in sorted(refs - slices.keys()):
        with contextlib.suppress(Damaged, OSError):
            slices[ref] = _load_arrays(run, ref)
    packed.write(path, slices)


def save_clustering(layout: Layout, clustering: Clustering) -> None:
    """Writes a clustering, once it was read back. Raises `Damaged` where readers would get another one."""
    arrays, buffer, folder = _arrays(clustering), io.BytesIO(), layout.clustering(clustering.digest)
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    temporary = folder.with_name(f".{folder.name}.tmp")
    write_bytes(temporary / "clustering.npz", buffer.getvalue())
    if arrays_digest(_arrays(_read(temporary, clustering.digest))) != arrays_digest(arrays):
        raise Damaged(f"{folder} was not written: it is another clustering when it is read back")
    publish_folder(temporary, folder)


def _arrays(clustering: Clustering) -> dict[str, np.ndarray]:
    sample, keys = np.array(clustering.sample, np.str_), np.array(clustering.keys, np.str_)
    arrays = {"sample": sample, "labels": clustering.labels, "keys": keys, "prototypes": clustering.prototypes}
    return arrays | ({"owners": np.array(clustering.owners, np.str_)} if clustering.owners else {})


def load_clustering(layout: Layout, name: str) -> Clustering:
    """A saved clustering. Raises `Damaged` when it is missing or damaged, `OSError` when it cannot be read now.

    A build looks at it several times; it is read once, and again after a change or a purge.
    """
    folder = layout.clustering(name)
    with contextlib.suppress(OSError):  # which reading it explains
        file = (folder / "clustering.npz").stat()
        return _read_once(folder, name, (file.st_ino, file.st_mtime_ns, file.st_ctime_ns, file.st_size))
    return _read(folder, name)


@functools.lru_cache(maxsize=1)  # a process that follows publications holds no earlier one
def _read_once(folder: Path, name: str, _stamp: tuple[int, ...]) -> Clustering:
    return _read(folder, name)


def forget_clusterings() -> None:
    """Drops what `load_clustering` holds: after a purge, nobody may find erased ids in this process."""
    _read_once.cache_clear()


def _read(folder: Path, name: str) -> Clustering:
    try:
        arrays = read_arrays(folder / "clustering.npz")
        sample, keys = (tuple(str(x) for x in arrays[field]) for field in ("sample", "keys"))
        members: list[list[str]] = [[] for _ in keys]
        for record, label in zip(sample, arrays["labels"].tolist(), strict=True):
            members[label].append(record)
        owners = tuple(str(x) for x in arrays.get("owners", ()))
        expected = tuple(key_of(owner=x) for x in owners) if owners else tuple(map(key_of, members))
        if sample and expected != keys:
            raise ValueError("its keys are not the digests of its sampled ids or owners")
        labels, prototypes = arrays["labels"], arrays["prototypes"]
        kinds = labels.dtype, prototypes.dtype, prototypes.ndim, len(prototypes)
        if kinds != (np.int32, np.float32, 2, len(keys)):
            raise ValueError("its labels are not int32, or its prototypes no float32 row for each key")
        return Clustering(name, sample, labels, keys, prototypes, owners)
    except MemoryError:
        raise
    except Exception as error:  # see `read_arrays`
        reason = why_unreadable(folder, error)
        raise Damaged(f"{reason}{AGAIN}") if isinstance(reason, Damaged) else reason from error


class Tainted(NamedTuple):
    """Digests of slices that an erased record was a member of, and of those whose clustering had it in its sample."""

    by_member: frozenset[str]
    by_sample: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        return self.by_member | self.by_sample


def tainted(run: "Run", erased: Mapping[int, str]) -> Tainted:
    """The slices in the catalog that some erased records, {image row: id}, had a part in."""
    rows = run.catalog.slices()
    clusterings = {row.clustering for row in rows.values()} if erased else ()
    sampled = {name for name in clusterings if was_sampled(sample_of(run.layout, name), erased.values())}
    by_sample = frozenset(name for name, row in rows.items() if row.clustering in sampled)
    return Tainted(run.catalog.slices_of(erased), by_sample)


def sample_of(layout: Layout, clustering: str) -> frozenset[str] | None:
    """The ids that were sampled for a clustering; None for one that is damaged."""
    try:
        return frozenset(load_clustering(layout, clustering).sample)
    except Damaged:
        return None


def was_sampled(sample: Set[str] | None, ids: Iterable[str]) -> bool:
    """Whether one of the ids is in the sample of a clustering; for a clustering that is damaged the answer is yes."""
    return sample is None or not sample.isdisjoint(ids)
