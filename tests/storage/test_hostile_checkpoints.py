"""Checkpoints that somebody else wrote: what does not fit is refused by name, and no code of theirs runs."""

import json
import os
import pickle
import shutil
import tracemalloc

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import weight_files
from lmeraser_jax.models.vit import ViTConfig
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training.slices import Slice, as_slice

# An array that cannot be read leaves the reads of its neighbours to a loop that Orbax has closed by then.
NOISE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ARRAYS = {
    "prompt": np.arange(6, dtype=np.float32),
    "kernel": np.ones((3, 2), np.float32),
    "bias": np.zeros(2, np.float32),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "slice"
    checkpoints.save(path, ARRAYS, {"m": 1})
    return path


def damaged(whole, path, name: str, raw: bytes):
    """A copy with other content of one file."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    (path / name).write_bytes(raw)
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoints.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 5000
    return str(caught.value)


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    "notes",
    [
        b"null",
        b"[]",
        b"3",
        b"{}",
        b'{"metadata": [], "empty": {}}',
        b'{"metadata": null, "empty": {}}',
        b'{"metadata": {}, "empty": []}x',
        b'{"metadata": {}, "empty": {"a": ["float32", [10]]}}',
        b'{"metadata": {}, "empty": {"a": ["float32", [1000000000000000000000000000000, 0]]}}',
        b'{"metadata": {}, "empty": {"a": ["no dtype", [0]]}}',
        b'{"metadata": {}, "empty": {"a": 3}}',
        b"[" * 100_000,
        b"\xff\xfe",
        pickle.dumps({"metadata": {}, "empty": {}}),
    ],
)
def test_metadata_of_any_kind(whole, tmp_path, notes):
    refusal(damaged(whole, tmp_path / "c", "0/metadata/metadata", notes))


@NOISE
def test_no_pickle_is_loaded(whole, tmp_path):
    """Every file in turn holds a pickle that would leave a trace."""
    bomb = pickle.dumps(Bomb(str(tmp_path / "boom")))
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        try:
            checkpoints.load(damaged(whole, tmp_path / "c", str(path.relative_to(whole)), bomb))
        except UserError:
            pass
    assert not (tmp_path / "boom").exists()


def test_shapes_that_are_only_promised(whole, tmp_path):
    """A tree of its own with a huge array of which no value is on disk: refused before it is allocated."""
    import tensorstore as ts

    path = tmp_path / "c"
    shutil.copytree(whole, path)
    base = f"file://{path}/0/arrays/"
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": "prompt/"}}
    kind = {"metadata": {"shape": [10**12], "chunks": [1000], "dtype": "<f4"}, "create": True, "delete_existing": True}
    ts.open(spec | kind).result()
    tracemalloc.start()
    try:
        assert f"it calls for {4 * 10**12 + 32} bytes, more than its files can hold" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_what_packs_best_is_still_read(tmp_path):
    """Zeros are what compresses most: far from the limit all the same."""
    checkpoints.save(tmp_path / "c", {"a": np.zeros((4000, 1000), np.float32)}, {})
    assert checkpoints.load(tmp_path / "c")[0]["a"].shape == (4000, 1000)


def test_another_tree(tmp_path):
    """A checkpoint that Orbax wrote, but not we: nested, with a number and a text in it, or without metadata."""
    for i, tree in enumerate(({"a": {"b": np.zeros(2)}}, {"a": np.zeros(2), "b": 3}, {"a": "text"})):
        path = tmp_path / str(i)
        handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(path, item_handlers=handlers) as manager:
            notes = ocp.args.JsonSave({"metadata": {}, "empty": {}})
            manager.save(0, args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(tree), metadata=notes))
        try:
            found, _, _ = checkpoints.load(path)
        except UserError:
            continue
        with pytest.raises(UserError, match="slice x is damaged"):
            as_slice(found, "x")
    for gone in ("0/metadata", "0/arrays"):
        path = tmp_path / "gone"
        checkpoints.save(path, ARRAYS, {})
        shutil.rmtree(path / gone)
        refusal(path)


@NOISE
@settings(max_examples=40)
@given(data=st.data())
def test_any_bytes_anywhere(whole, tmp_path, data):
    """One file of the checkpoint with other bytes in it: refused, or read with arrays that the slice checks."""
    files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(files))
    raw = bytearray((whole / name).read_bytes())
    place, patch = data.draw(st.integers(0, len(raw))), data.draw(st.binary(max_size=8))
    raw[place : place + len(patch)] = patch
    try:
        found, metadata, _ = checkpoints.load(damaged(whole, tmp_path / "c", name, bytes(raw)))
        assert isinstance(metadata, dict) and all(isinstance(leaf, np.ndarray) for leaf in found.values())
        as_slice(found, "x")
    except UserError as error:
        assert len(str(error)) < 5000


# slices
def test_as_slice():
    found = as_slice(ARRAYS, "abc")
    assert isinstance(found, Slice) and all(getattr(found, name) is leaf for name, leaf in ARRAYS.items())


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"bias": None}, ["bias is missing"]),
        ({"x" * 10**6: np.zeros(1)}, ["is no part of a slice"]),
        ({"prompt": np.zeros(6)}, ["prompt must be float32 of 1 dimensions, is float64 [6]"]),
        ({"prompt": np.array([{}], object)}, ["prompt must be float32 of 1 dimensions, is object [1]"]),
        ({"kernel": np.zeros(6, np.float32)}, ["kernel must be float32 of 2 dimensions, is float32 [6]"]),
        ({"bias": np.zeros((2, 1), np.float32)}, ["bias must be float32 of 1 dimensions, is float32 [2, 1]"]),
        ({"bias": np.zeros(3, np.float32)}, ["kernel [3, 2] and bias [3] have different numbers of classes"]),
        ({"bias": None, "prompt": np.zeros(6)}, ["bias is missing", "prompt must be float32"]),
    ],
)
def test_as_slice_refuses(changes, lines):
    arrays = {name: leaf for name, leaf in (ARRAYS | changes).items() if leaf is not None}
    with pytest.raises(UserError) as caught:
        as_slice(arrays, "abc")
    message = str(caught.value)
    assert "slice abc is damaged" in message and all(line in message for line in lines) and len(message) < 500


# backbones
TINY = ViTConfig(image_size=4, patch=2, width=4, depth=1, heads=1, mlp=4, channels=1)


@pytest.fixture(scope="module")
def tiny():
    """A backbone of a few numbers: its arrays and metadata, as they are saved."""
    made = backbone_lib.make(
        TINY, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), backbone_lib.graph(TINY)[1]), (0.5,), (0.5,)
    )
    metadata = {"config": backbone_lib.describe(made.config), "mean": [0.5], "std": [0.5], "digest": made.digest}
    return checkpoints.flatten(made.params), metadata | {"inputs": {}, "provenance": {}}


def test_backbone_is_read(tiny, tmp_path):
    assert backbone_lib.restore(tmp_path, *tiny).digest == tiny[1]["digest"]


CONFIG = [
    *(("config", bad) for bad in (None, [], 3, {}, {"family": "vit"}, {"family": []}, {"family": "vit", "x": 1})),
    *(("mean", bad) for bad in (None, 3, ["x"], [float("nan")], [None])),
    *(("digest", bad) for bad in (None, 3, [], "0" * 64)),
    *(("inputs", bad) for bad in (None, [], "x")),
    ("provenance", None),
]


@pytest.mark.parametrize(("field", "bad"), CONFIG)
def test_backbone_metadata_of_any_kind(tiny, tmp_path, field, bad):
    arrays, metadata = tiny
    without = {name: value for name, value in metadata.items() if name != field}
    for changed in (metadata | {field: bad}, *([without] if field != "provenance" else [])):
        with pytest.raises(UserError, match="is damaged") as caught:
            backbone_lib.restore(tmp_path, arrays, changed)
        assert len(str(caught.value)) < 2000


@given(
    field=st.sampled_from(
        ["image_size", "patch", "width", "depth", "heads", "mlp", "channels", "feature", "gelu", "classes"]
    ),
    value=st.none() | st.integers(-2, 9) | st.sampled_from([10**9, 10**30, 0.5, "x", [], [1, [2]], {}, True]),
)
def test_backbone_of_any_architecture(tiny, tmp_path, field, value):
    """Also of a billion blocks, which would take for ever to outline."""
    arrays, metadata = tiny
    changed = metadata | {"config": metadata["config"] | {field: value}}
    if metadata["config"][field] != value:
        with pytest.raises(UserError):
            backbone_lib.restore(tmp_path, arrays, changed)


def test_backbone_with_other_arrays(tiny, tmp_path):
    arrays, metadata = tiny
    name = sorted(arrays)[0]
    others = [np.array([{}], object), arrays[name].astype(np.float64), arrays[name].astype(complex), np.zeros(9, "U4")]
    for leaf in others:
        with pytest.raises(UserError, match="is damaged"):
            backbone_lib.restore(tmp_path, arrays | {name: leaf}, metadata)
    with pytest.raises(UserError, match="is damaged"):
        backbone_lib.restore(tmp_path, {key: leaf for key, leaf in arrays.items() if key != name}, metadata)


def test_backbone_in_a_folder(tiny, tmp_path):
    arrays, metadata = tiny
    checkpoints.save(tmp_path / "good", arrays, json.loads(json.dumps(metadata)))
    assert backbone_lib.load(tmp_path / "good")[1] == {}
    checkpoints.save(tmp_path / "bad", arrays, {"config": 3})
    with pytest.raises(UserError, match="bad is damaged"):
        backbone_lib.load(tmp_path / "bad")
    with pytest.raises(UserError, match="provenance names no origin"):
        weight_files.read(str(tmp_path / "good"))
    assert sorted(os.listdir(tmp_path)) == ["bad", "good"]
