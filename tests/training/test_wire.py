"""Messages: what comes back is what was sent, and nothing but what was expected is ever read."""

import dataclasses
import json
import pickle
from multiprocessing import Pipe
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st

from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import ViTConfig
from lmeraser_jax.storage import scratch
from lmeraser_jax.storage.catalog import SliceRow
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training import slice_files, wire
from lmeraser_jax.training.jobs import Job, Target
from lmeraser_jax.training.slices import Slice, init_slice
from lmeraser_jax.training.team import Asked, End, Failed, Finished, Hello, Stop
from lmeraser_jax.training.tune import TuningSpec

VIT = ViTConfig(image_size=8, patch=4, width=16, depth=1, heads=2, mlp=32, epsilon=1e-12, gelu="tanh")
SWIN = SwinConfig(image_size=8, patch=2, width=8, depths=(1, 1), heads=(1, 2), window=2)
SPEC = ImageSpec(28, 28, 1, 8, 9, 3, (0.1, 0.2, 0.3), (0.5,), "flip")
ROW = SliceRow("d" * 64, "k", "p", 3, 12, 4, float("nan"), 0.1, "program", 1e9, tuning='{"a": 1}')


def there_and_back(message, *kinds):
    one, other = Pipe()
    with one, other:
        wire.send(one, message)
        return wire.receive(other).open(*kinds or (type(message),))


def same(one, other) -> bool:
    """Equal in types, values and bits."""
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


def slice_task(architecture, what="prompt+head", features: Path | None = None) -> slice_files.SliceTask:
    tuning = small_config(tuning__method=what).tuning
    problem = TuningSpec(architecture, SPEC, tuning, 10, 7, (3, 1) if what == "prompt" else ())
    jobs = [Job("k1", np.arange(5, dtype=np.int32), 2, 4), Job("k2", np.arange(3, dtype=np.int32), 3, 4, (1, 2), 2)]
    targets = tuple(Target(str(i) * 64, "p" * 64, job) for i, job in enumerate(jobs))
    labels = np.arange(9, dtype=np.int32)
    return slice_files.SliceTask(
        Path("/w d"), Path("/w d/scratch/team-x"), problem, "b", "f", features, labels, targets
    )


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, 3, "hö st", 8),
        Finished(True),
        Failed("näh\n"),
        Asked(),
        Stop(),
        End(False),
        slice_task(VIT),
        slice_task(SWIN, "prompt", Path("/f")),
        slice_task(VIT, "backbone"),
        slice_files.FeatureTask(Path("/w"), SPEC, "b", "f", small_config().tuning, 16, 9, np.arange(4), 3),
        slice_files.Found(3, np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)),
        slice_files.Found(0, np.zeros((0, 4), np.float32)),
        slice_files.Made(ROW, np.arange(3, dtype=np.int32), {4: "a", 8: "b"}, None),
        slice_files.Made(ROW._replace(loss=None), np.arange(0, dtype=np.int32), {}, 7),
    ],
    ids=lambda message: type(message).__name__,
)
def test_round_trip(message):
    back = there_and_back(message, Hello, type(message), End)
    assert same(message, back) and isinstance(hash(getattr(back, "problem", 0)), int), "programs are cached by it"


@pytest.mark.parametrize("own", [False, True])
def test_a_start_travels_as_arrays(tmp_path, own):
    task = slice_task(VIT, "backbone" if own else "prompt+head")
    start = jax.tree.map(np.asarray, init_slice(jax.random.key(0), task.problem.tuning, VIT, 10))
    if own:
        from lmeraser_jax.models import backbone as backbone_lib

        params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), backbone_lib.graph(VIT)[1])
        start = start._replace(backbone=params)
    jobs = [dataclasses.replace(task.targets[0].job, start=start), task.targets[1].job]
    targets = tuple(dataclasses.replace(one, job=job) for one, job in zip(task.targets, jobs, strict=True))
    folder = scratch.begin(Layout(tmp_path))
    back = there_and_back(dataclasses.replace(task, targets=targets).packed(folder)).unpacked()
    (found, none) = (target.job.start for target in back.targets)
    assert none is None and isinstance(found, Slice) and jax.tree.structure(found) == jax.tree.structure(start)
    assert all(map(same, jax.tree.leaves(found), jax.tree.leaves(start)))
    assert back.folder.samefile(folder) and back.starts == {}


def test_a_pickle_is_no_message(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    one, other = Pipe()
    with one, other:
        one.send_bytes(pickle.dumps(1))
        one.send(Evil())
        for _ in range(2):
            with pytest.raises(wire.Malformed):
                wire.receive(other)
    assert not (tmp_path / "ran").exists()


def head(value, *arrays) -> bytes:
    return json.dumps([value, list(arrays)]).encode()


HELLO = {"Hello": {"index": 1, "size": 3, "host": "h", "pid": 2}}
MANY, NONE = ["float32", [1 << 40]], ["int32", [0]]
MADE = {"row": wire._plain(ROW, []), "rows": {"array": 0}, "epochs": {}, "failed_at": None}


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xff\xfe"],
        [b"[" * 100_000],
        [b"3"],
        [b"null"],
        [b"[1, 2, 3]"],
        [head(None)],
        [head({})],
        [head({"Hello": 3})],
        [head({**HELLO, "End": {"ok": True}})],
        [head({"Hello": {"index": 1, "size": 3, "host": "h"}})],
        [head({"Hello": HELLO["Hello"] | {"more": 1}})],
        [head({"Hello": HELLO["Hello"] | {"index": True}})],
        [head({"Hello": HELLO["Hello"] | {"index": "1"}})],
        [head({"Hello": HELLO["Hello"] | {"index": 1.0}})],
        [head({"Hello": HELLO["Hello"] | {"host": None}})],
        [head({"__import__": {"name": "os"}})],
        [head({"End": {"ok": 1}})],
        [head(HELLO, 3)],
        [head(HELLO, ["float32"])],
        [head(HELLO, ["float32", 3])],
        [head(HELLO, ["float32", [-1, -1]]), b""],
        [head(HELLO, ["float32", [True]]), b"1234"],
        [head(HELLO, ["float64", [1]]), b"12345678"],
        [head(HELLO, ["object", [1]]), b"12345678"],
        [head(HELLO, ["O", [1]]), b"12345678"],
        [head(HELLO, [["i4"], [1]]), b"1234"],
        [head(HELLO, MANY)],
        [head(HELLO, ["float32", [2]]), b"1234"],
        [head({"Found": {"place": 0, "values": {"array": 0}}})],
        [head({"Found": {"place": 0, "values": {"array": -1}}}, ["float32", [1]]), b"1234"],
        [head({"Found": {"place": 0, "values": {"array": True}}}, *[["float32", [1]]] * 2), b"1234", b"1234"],
        [head({"Found": {"place": 0, "values": [1.0]}})],
        [head({"Made": MADE | {"epochs": {"x": "a"}}}, NONE), b""],
        [head({"Made": MADE | {"epochs": {"1" * 5000: "a"}}}, NONE), b""],
        [head({"Made": MADE | {"row": []}}, NONE), b""],
        [head({"Made": MADE | {"row": {"Row": MADE["row"]["SliceRow"]}}}, NONE), b""],
    ],
    ids=lambda frames: repr(frames[0][:40]),
)
def test_what_is_no_message_is_refused(frames):
    one, other = Pipe()
    with one, other:
        for frame in frames:
            one.send_bytes(frame)
        one.close()
        with pytest.raises(wire.Malformed, match="is the same version installed everywhere"):
            wire.receive(other).open(Hello, End, slice_files.Found, slice_files.Made)


@pytest.mark.parametrize("limit", ["head", "array"])
def test_longer_frames_than_said_end_the_connection(monkeypatch, limit):
    monkeypatch.setattr(wire, "HEAD_BYTES", 1000)
    one, other = Pipe()
    with one, other:
        one.send_bytes(b" " * 1001 if limit == "head" else head(HELLO, ["uint8", [3]]))
        one.send_bytes(b"1234")
        with pytest.raises(OSError, match="bad message length"):
            wire.receive(other)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "array", "d" * 64, "7"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["array", "Hello", "7"]), inner),
)


def leaves(value):
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(value, name) for name, _ in parts] + [leaf for _, part in parts for leaf in leaves(part)]


@given(data=st.data(), value=PLAIN)
def test_a_message_with_any_value_put_in_is_refused_or_of_the_right_types(data, value):
    arrays = []
    tree = wire._plain(slice_task(SWIN), arrays)
    where, name = data.draw(st.sampled_from(leaves(tree["SliceTask"])))
    where[name] = value
    try:
        task = wire.Sealed(tree, arrays).open(slice_files.SliceTask)
    except wire.Malformed:
        return
    assert isinstance(task.problem.tuning.epochs, int) and isinstance(task.root, Path)
    assert all(isinstance(target.digest, str) and target.job.rows.dtype == np.int32 for target in task.targets)
    there_and_back(task)
