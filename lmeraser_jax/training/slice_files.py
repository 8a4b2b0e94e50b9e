"""Work that the processes of a team share: features of images, and slices.

A task holds all that its share needs but for the images and the backbone, which lie in the workdir that every process
sees. Each process works on its own devices alone. A slice is written by the process that tuned it, at process 0 where
slices lie, elsewhere into a folder of scratch; only process 0, which has the catalog, moves it from there and registers
it. With one process the same functions run, and nothing is sent.
"""

import dataclasses
import functools
import math
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import arrays_digest, canonical_json
from lmeraser_jax.interrupt import Stopped
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.progress import silence
from lmeraser_jax.storage import checkpoints, scratch
from lmeraser_jax.storage.rows import SliceRow
from lmeraser_jax.storage.workdir import PRIVATE, Layout
from lmeraser_jax.training import closed_form
from lmeraser_jax.training.features import PIECE, Extractor, compute_dtype
from lmeraser_jax.training.fingerprint import fingerprint
from lmeraser_jax.training.jobs import Target, pack
from lmeraser_jax.training.making import make
from lmeraser_jax.training.slices import as_slice
from lmeraser_jax.training.team import Failed, Finished, Team
from lmeraser_jax.training.tracking import Tuned
from lmeraser_jax.training.tune import TuningSpec, mesh_of

FAILED = 1
WRITERS = 4  # slices written at a time: a write is mostly waiting for the disk


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A slice that was tuned and, where its numbers are finite, written to its folder.

    Attributes:
        row: what the catalog is to know of it.
        rows: int32 [m], image rows of its members.
        epochs: {step: digest of the parameters' bytes} of its snapshots.
        failed_at: step at which the loss was no longer finite; nothing was written then.
    """

    row: SliceRow
    rows: np.ndarray
    epochs: dict[int, str]
    failed_at: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class SliceTask:
    """Slices to tune.

    Attributes:
        root: the workdir.
        folder: where they are written.
        problem: the static part of the program.
        backbone: digest of the frozen backbone.
        program: fingerprint that every process's program must have.
        features: the file of the features that the slices are made of; None where they are made of images.
        labels: int32 [N], of the image file's rows.
        targets: the slices; where a job carries on from another slice, it holds that.
        starts: {cluster key: those slices' arrays}, in place of what the jobs hold, while the task is on its way.
    """

    root: Path
    folder: Path
    problem: TuningSpec
    backbone: str
    program: str
    features: Path | None
    labels: np.ndarray
    targets: tuple[Target, ...]
    starts: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def packed(self, folder: Path) -> "SliceTask":
        """The task as it is sent to a process that is to write into a folder."""
        starts = {one.job.key: checkpoints.flatten(one.job.start) for one in self.targets if one.job.start is not None}
        bare = tuple(dataclasses.replace(one, job=dataclasses.replace(one.job, start=None)) for one in self.targets)
        return dataclasses.replace(self, folder=folder, targets=bare, starts=starts)

    def unpacked(self) -> "SliceTask":
        """The inverse, for a folder that is held. Raises `UserError` where a start or the folder is none."""
        kind = (self.problem.own_architecture, self.problem.tuning.one_head)
        slices = {key: as_slice(arrays, f"of {key[:12]}", *kind) for key, arrays in self.starts.items()}
        jobs = [dataclasses.replace(one.job, start=slices.get(one.job.key)) for one in self.targets]
        targets = tuple(dataclasses.replace(one, job=job) for one, job in zip(self.targets, jobs, strict=True))
        return dataclasses.replace(self, folder=scratch.held(self.folder), targets=targets, starts={})


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTask:
    """Features to compute, of image rows int64 [k]: the part of a whole that begins at `place`. `count` is N."""

    root: Path
    spec: ImageSpec
    backbone: str
    program: str
    tuning: Tuning
    batch: int
    count: int
    rows: np.ndarray
    place: int


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """float32 [k, D], the part of the features wanted that begins at `place`."""

    place: int
    values: np.ndarray


# what each process does


def make_slices(task: SliceTask, backbone: Backbone, inputs: np.ndarray, mesh: Mesh) -> Generator[Made, None, None]:
    """Makes a task's slices, writes each, with its snapshots, as soon as it is finished, and yields what is written.

    Closing the generator waits for what is being written: nobody may give up the writer lock before.

    Args:
        task: what to tune.
        backbone: the frozen network.
        inputs: uint8 [N, h, w, c], the rows of the image file; float32 [N, D], those of the task's feature file.
        mesh: this process's devices.

    Raises:
        Stopped: the process was asked to stop; what was finished is written and was yielded before.
    """
    targets = {target.job.key: target for target in task.targets}
    earlier: dict[str, list[Tuned]] = {key: [] for key in targets}

    def writes() -> Iterator[Callable[[], Made]]:
        jobs = [target.job for target in task.targets]
        for done in make(task.problem, backbone, jobs, inputs, task.labels, mesh):
            if done.final:
                yield functools.partial(written, task, targets[done.job.key], done, earlier.pop(done.job.key))
            else:
                earlier[done.job.key].append(done)

    if targets:
        yield from _side_by_side(writes())


def _side_by_side(writes: Iterator[Callable[[], Made]]) -> Generator[Made, None, None]:
    """Does a few writes at a time while the next slices are made; yields their results in order."""
    stopped = None
    with ThreadPoolExecutor(WRITERS) as threads:
        begun: deque[Future[Made]] = deque()
        try:
            for write in writes:
                begun.append(threads.submit(write))
                while begun and (begun[0].done() or len(begun) == WRITERS):
                    yield begun.popleft().result()
        except Stopped as asked:
            stopped = asked
        while begun:
            yield begun.popleft().result()
    if stopped is not None:
        raise stopped


def written(task: SliceTask, target: Target, done: Tuned, earlier: Sequence[Tuned]) -> Made:
    """Writes a slice and its snapshots to disk, with all that `load_orphan` has to know."""
    arrays = checkpoints.flatten(done.slice)
    snapshots = {part.step: checkpoints.flatten(part.slice) for part in earlier}
    epochs = {step: arrays_digest(tree) for step, tree in snapshots.items()}
    measured = {"loss": done.loss, "seconds": done.seconds, "created": time.time()}
    row = _row(target, arrays_digest(arrays), task.program, task.problem.tuning, measured)
    if done.failed_at is None:
        notes = {"digest": row.digest, "cluster": row.cluster, "params": row.params_digest, "program": row.fingerprint}
        notes |= measured | {"epochs": {str(step): params for step, params in epochs.items()}}
        checkpoints.save(task.folder / target.digest, arrays, notes, done.step, snapshots)
    if done.tally is not None and done.failed_at is None:
        closed_form.save_sums(task.folder / target.digest, done.tally)
    return Made(row, done.job.rows, epochs, done.failed_at)


def load_orphan(root: Path, target: Target, program: str, problem: TuningSpec) -> Made | None:
    """The slice that a process wrote for a target and that was not registered any more, read and checked.

    Args:
        root: the workdir.
        target: what is wanted.
        program: fingerprint that the slice must have been made with.
        problem: the static part of that program.

    Returns:
        None where there is none, or one that is torn, damaged or of another program.
    """
    folder, job = Layout(root).slice(target.digest), target.job
    if not folder.is_dir():
        return None
    try:
        arrays, notes, step = checkpoints.load(folder)
        as_slice(arrays, target.digest[:12], problem.own_architecture, problem.tuning.one_head)
        epochs = {earlier: arrays_digest(checkpoints.load(folder, earlier)[0]) for earlier in job.snapshots}
    except UserError:
        return None
    row = _row(target, arrays_digest(arrays), program, problem.tuning, notes)
    wanted: dict[str, Any] = {"digest": row.digest, "params": row.params_digest, "program": program}
    wanted["epochs"] = {str(earlier): params for earlier, params in epochs.items()}
    numbers = [row.loss, row.seconds, row.created]
    if step != job.steps or any(notes.get(name) != value for name, value in wanted.items()):
        return None
    return Made(row, job.rows, epochs, None) if all(isinstance(number, float) for number in numbers) else None


def _row(target: Target, params: str, program: str, tuning: Tuning, measured: Mapping[str, Any]) -> SliceRow:
    """What the catalog is to know of a slice."""
    return SliceRow(
        digest=target.digest,
        cluster=target.job.key,
        params_digest=params,
        size=len(target.job.rows),
        images=target.job.images,
        steps=target.job.steps,
        loss=measured.get("loss"),
        seconds=measured.get("seconds", math.nan),
        fingerprint=program,
        created=measured.get("created", math.nan),
        parent=target.parent,
        tuning=canonical_json(dataclasses.asdict(tuning)),
    )


@functools.lru_cache(maxsize=1)
def _backbone(root: Path, digest: str) -> Backbone:
    backbone, _ = backbone_lib.load(Layout(root).backbone)
    if backbone.digest != digest:
        raise UserError(f"{Layout(root).backbone} is not the backbone of process 0; is the workdir shared?")
    return backbone


@functools.lru_cache(maxsize=1)
def _extractor(root: Path, digest: str, spec: ImageSpec, batch: int, dtype: str) -> Extractor:
    mesh = mesh_of()
    return Extractor(_backbone(root, digest), spec, batch, mesh, compute_dtype(dtype, mesh))


def _inputs(task: SliceTask) -> np.ndarray:
    """What a task's slices are made of."""
    if task.features is None:
        return _images(task.root, task.problem.spec, len(task.labels))
    return _rows(RowFile(task.features, (task.problem.architecture.feature_size,), np.float32), len(task.labels))


def _images(root: Path, spec: ImageSpec, count: int) -> np.ndarray:
    """uint8 [N, h, w, c]: the first rows of the image file."""
    return _rows(RowFile(Layout(root).images, (spec.height, spec.width, spec.channels), np.uint8), count)


def _rows(file: RowFile, count: int) -> np.ndarray:
    if len(file) < count:
        raise UserError(f"{file.path} holds {len(file)} of {count} rows; is the workdir shared?")
    return file.view()[:count]


def _same_program(wanted: str, tuning: Tuning) -> None:
    """Bits of another program must not be mixed in unseen."""
    found = fingerprint(tuning, mesh_of())
    if found != wanted:
        raise UserError(f"its program or devices are not those of process 0: {found}, not {wanted}")


# process 0


def share_slices(
    team: Team, task: SliceTask, backbone: Backbone, inputs: np.ndarray, mesh: Mesh
) -> Generator[Made, None, None]:
    """Deals a task's slices to the processes, longest first, and yields each that is finished, here or elsewhere.

    When it ends, or is closed, every process has written its last slice, and can write no more.

    Raises:
        UserError: a process was lost or failed.
        Stopped: some process was asked to stop.
    """
    layout, parts = Layout(task.root), _dealt(team, task)
    own = make_slices(parts[0], backbone, inputs, mesh)
    others = {peer: part for peer, part in enumerate(parts) if peer and part.targets}
    folder = scratch.begin(layout) if others else layout.slices
    wanted, at_hand = ({target.digest for target in targets} for targets in (task.targets, parts[0].targets))
    made = set()
    try:
        for one in team.share({peer: part.packed(folder) for peer, part in others.items()}, own, Made):
            if one.row.digest not in wanted:
                raise UserError("a process made another slice than those that it was to make")
            if one.failed_at is None and one.row.digest not in at_hand:
                scratch.take(layout, folder, one.row.digest)
            made.add(one.row.digest)
            yield one
    finally:
        own.close()
        scratch.settle(layout)  # also what a process wrote that was lost before it could say so
    assert made == wanted, "whoever goes on publishes"


def _dealt(team: Team, task: SliceTask) -> list[SliceTask]:
    """A part of the task for each process, some without targets: longest slices first, so that all end together."""
    dealt = pack([target.job.steps for target in task.targets], team.size)
    return [dataclasses.replace(task, targets=tuple(task.targets[index] for index in sorted(share))) for share in dealt]


def share_features(team: Team, task: FeatureTask, extract: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Features of a task's rows, computed by so many processes as get a batch each: float32 [k, D].

    Args:
        team: the processes.
        task: the whole, with place 0.
        extract: rows int64 [k] -> float32 [k, D], on this process's devices.
    """
    parts, place = [], 0
    for rows in np.array_split(task.rows, min(team.size, max(1, len(task.rows) // task.batch))):
        parts.append(dataclasses.replace(task, rows=rows, place=place))
        place += len(rows)
    own = (Found(0, extract(part.rows)) for part in parts[:1])
    found = sorted(team.share(dict(enumerate(parts[1:], 1)), own, Found), key=lambda part: part.place)
    if [(part.place, len(part.values)) for part in found] != [(part.place, len(part.rows)) for part in parts]:
        raise UserError("the processes computed other features than those that they were to compute")
    return np.concatenate([part.values for part in found])


def piece(team: Team) -> int:
    """Rows whose features are computed between two writes of the cache."""
    return PIECE * team.size


# the others


def serve(team: Team) -> int:
    """Does the tasks of process 0 until there are no more; returns the exit code.

    A task that fails is told to process 0, which then ends the command with that message.

    Raises:
        UserError: process 0 was lost.
    """
    silence()
    os.umask(PRIVATE)  # as the writer lock does at process 0
    for task in team.tasks(SliceTask, FeatureTask):
        try:
            for result in _results(task):
                team.report(result)
            team.report(Finished(stopped=False))
        except Stopped:
            team.report(Finished(stopped=True))
        except (UserError, OSError) as error:
            team.report(Failed(str(error)))
        except Exception as error:
            print(f"process {team.index}: {traceback.format_exc()}", file=sys.stderr, end="", flush=True)
            team.report(Failed(f"{type(error).__name__}: {error} (its standard error has more)"))
    return 0 if team.end is not None and team.end.ok else FAILED


def _results(task: SliceTask | FeatureTask) -> Iterator[Made | Found]:
    """What this process, which has no catalog, makes of a task."""
    if isinstance(task, SliceTask):
        _same_program(task.program, task.problem.tuning)
        backbone = _backbone(task.root, task.backbone)
        yield from make_slices(task.unpacked(), backbone, _inputs(task), mesh_of())
        return
    _same_program(task.program, task.tuning)
    extract = _extractor(task.root, task.backbone, task.spec, task.batch, task.tuning.dtype)
    yield Found(task.place, extract(_images(task.root, task.spec, task.count)[task.rows]))
