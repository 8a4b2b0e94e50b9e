"""Slices on disk: written by a few threads while the next ones are tuned, and loaded again after a kill.

A slice's folder holds its parameters, the snapshots of its earlier epochs, and the facts that the catalog needs.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.errors import Damaged
from lmeraser_jax.hashing import arrays_digest, canonical_json
from lmeraser_jax.interrupt import Stopped
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.atomic_files import is_there
from lmeraser_jax.storage.rows import SliceRow
from lmeraser_jax.training import closed_form
from lmeraser_jax.training.jobs import Target
from lmeraser_jax.training.slices import as_slice
from lmeraser_jax.training.tasks import TuningSpec
from lmeraser_jax.training.tune import Tuned

WRITERS = 4  # slices written at a time: a write is mostly waiting for the disk


@dataclasses.dataclass(frozen=True, eq=False)
class WrittenSlice:
    """A slice that was tuned and, where its numbers are finite, written to its folder."""

    row: SliceRow  # what the catalog is to know of it
    rows: np.ndarray  # int32 [m], image rows of its members
    epochs: dict[int, str]  # {step: digest of the parameters' bytes} of its snapshots
    failed_at: int | None  # step at which the loss was no longer finite; nothing was written then


def write_slices(
    folder: Path, targets: Sequence[Target], results: Iterator[Tuned], fingerprint: str, tuning: Tuning
) -> Generator[WrittenSlice, None, None]:
    """Writes each slice of `targets`, with its snapshots, as soon as it is finished; yields what is on disk, in order.

    In `results` the snapshots of a slice come before it. Closing the generator waits for what is being written: the
    writer lock must not be given up before. Raises `Stopped` where the process was asked to stop; what was finished is
    written and was yielded before.
    """
    by_key = {target.job.key: target for target in targets}
    snapshots: dict[str, list[Tuned]] = {key: [] for key in by_key}
    pending: deque[Future[WrittenSlice]] = deque()
    with ThreadPoolExecutor(WRITERS) as threads:
        try:
            for tuned in results:
                key = tuned.job.key
                if not tuned.final:
                    snapshots[key].append(tuned)
                    continue
                earlier = snapshots.pop(key)
                pending.append(threads.submit(write_slice, folder, by_key[key], tuned, earlier, fingerprint, tuning))
                while pending and (pending[0].done() or len(pending) == WRITERS):
                    yield pending.popleft().result()
        except Stopped:
            yield from (write.result() for write in pending)
            raise
        yield from (write.result() for write in pending)


def write_slice(
    folder: Path, target: Target, tuned: Tuned, snapshots: Sequence[Tuned], fingerprint: str, tuning: Tuning
) -> WrittenSlice:
    """Writes a slice and its snapshots to disk, with all that `load_orphan` has to know."""
    arrays = checkpoints.flatten(tuned.slice)
    earlier = {snapshot.step: checkpoints.flatten(snapshot.slice) for snapshot in snapshots}
    epochs = {step: arrays_digest(tree) for step, tree in earlier.items()}
    measured = {"loss": tuned.loss, "seconds": tuned.seconds, "created": time.time()}
    row = _row(target, arrays_digest(arrays), fingerprint, tuning, measured)
    if tuned.failed_at is None:
        facts = {"digest": row.digest, "cluster": row.cluster, "params_digest": row.params_digest}
        facts |= measured | {"fingerprint": fingerprint, "epochs": {str(step): epochs[step] for step in epochs}}
        checkpoints.save(folder / target.digest, arrays, facts, tuned.step, earlier)
        if tuned.sums is not None:
            closed_form.save_sums(folder / target.digest, tuned.sums)
    return WrittenSlice(row, tuned.job.rows, epochs, tuned.failed_at)


def load_orphan(folder: Path, target: Target, fingerprint: str, tuning_spec: TuningSpec) -> WrittenSlice | None:
    """The slice that an earlier command wrote for a target and did not register any more, read and checked.

    None where there is none, or one that is torn, damaged or of another program than this `fingerprint`'s.
    """
    path, job = folder / target.digest, target.job
    if not is_there(path):
        return None
    try:
        arrays, facts, step = checkpoints.load(path)
        as_slice(arrays, target.digest[:12], tuning_spec.own_parameters)
        epochs = {snapshot: arrays_digest(checkpoints.load(path, snapshot)[0]) for snapshot in job.snapshots}
    except Damaged:
        return None
    row = _row(target, arrays_digest(arrays), fingerprint, tuning_spec.tuning, facts)
    expected = {"digest": row.digest, "params_digest": row.params_digest, "fingerprint": fingerprint}
    expected |= {"epochs": {str(step): epochs[step] for step in epochs}}  # JSON has only text for keys
    if step != job.steps or any(facts.get(name) != value for name, value in expected.items()):
        return None
    if not all(isinstance(number, float) for number in (row.loss, row.seconds, row.created)):
        return None
    return WrittenSlice(row, job.rows, epochs, None)


def _row(target: Target, params_digest: str, fingerprint: str, tuning: Tuning, measured: Mapping[str, Any]) -> SliceRow:
    """What the catalog is to know of a slice."""
    return SliceRow(
        digest=target.digest,
        cluster=target.job.key,
        params_digest=params_digest,
        size=len(target.job.rows),
        images=target.job.images,
        steps=target.job.steps,
        loss=measured.get("loss"),
        seconds=measured.get("seconds", math.nan),
        fingerprint=fingerprint,
        created=measured.get("created", math.nan),
        tuning=canonical_json(dataclasses.asdict(tuning)),
    )
