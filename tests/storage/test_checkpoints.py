"""Checkpoints: what comes back is what was saved, bit for bit; damaged and foreign ones are refused and run no code."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lmeraser_jax.errors import Damaged, UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import weight_files
from lmeraser_jax.models.lora import LoraSpec
from lmeraser_jax.models.vit import ViTConfig
from lmeraser_jax.storage import atomic_files, checkpoints
from lmeraser_jax.training.slices import Slice, as_slice

SLICE = {
    "prompt": np.arange(6, dtype=np.float32),
    "kernel": np.ones((3, 2), np.float32),
    "bias": np.zeros(2, np.float32),
}
TINY = ViTConfig(image_size=4, patch=2, width=4, depth=1, heads=1, mlp=4, channels=1)


def arrays_of_many_kinds(rng) -> dict:
    return {
        "prompt": rng.normal(size=(3, 4)).astype(np.float32),
        "blocks/0/kernel": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "special": np.array([np.nan, -0.0, np.inf, 1e-45, np.nextafter(1, 2)], np.float32),
        "step": np.array(7, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "bytes": np.arange(5, dtype=np.uint8),
    }


def bits(arrays) -> dict:
    return {name: (leaf.dtype, leaf.shape, leaf.tobytes()) for name, leaf in arrays.items()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "slices" / "abc"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a slice, to be copied and damaged."""
    path = tmp_path_factory.mktemp("whole") / "slice"
    checkpoints.save(path, SLICE, {"m": 1})
    return path


def files_of(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def with_other_bytes(whole, path, name: str, raw: bytes):
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


# what is saved
def test_round_trip(folder, rng):
    saved, metadata = arrays_of_many_kinds(rng), {"cluster": "k", "deep": {"x": [1, None, 0.1]}}
    checkpoints.save(folder, saved, metadata, step=12)
    loaded, loaded_metadata, step = checkpoints.load(folder)
    assert bits(loaded) == bits(saved) and all(type(leaf) is np.ndarray for leaf in loaded.values())
    assert (loaded_metadata, step) == (metadata, 12) and os.listdir(folder.parent) == ["abc"]
    checkpoints.save(folder, {"b": np.ones(3, np.float32)}, {"m": 2}, step=4)  # it is replaced
    loaded, loaded_metadata, step = checkpoints.load(folder)
    assert loaded.keys() == {"b"} and loaded_metadata == {"m": 2} and step == 4


def test_what_is_read_is_what_orbax_itself_restores(folder, rng):
    saved = {name: leaf for name, leaf in arrays_of_many_kinds(rng).items() if leaf.size}
    checkpoints.save(folder, saved, {"m": 1}, 7, {2: {"a": np.arange(3)}})
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        for step in (7, 2):
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(), metadata=ocp.args.JsonRestore())
            restored = manager.restore(step, args=args)
            loaded, metadata, _ = checkpoints.load(folder, step)
            assert bits(loaded) == bits({name: np.asarray(leaf) for name, leaf in restored["arrays"].items()})
            assert metadata == restored["metadata"]["metadata"]
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load(folder, 3)


def test_reading_loads_neither_jax_nor_orbax(whole):
    code = "import sys\nfrom pathlib import Path\nfrom lmeraser_jax.storage import checkpoints\n"
    code += "checkpoints.load(Path(sys.argv[1]))\nassert not {'jax', 'orbax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, str(whole)], check=True)


def test_flatten_round_trip(rng):
    tree = {"blocks": {i: {"w": rng.normal(size=2)} for i in (0, 1, 10)}, "head": (jnp.ones(3), [np.int32(4)])}
    flat = checkpoints.flatten(tree)
    assert set(flat) == {"blocks/0/w", "blocks/1/w", "blocks/10/w", "head/0", "head/1/0"}
    back = checkpoints.unflatten(flat, tree)
    assert set(back["blocks"]) == {0, 1, 10} and isinstance(back["head"], tuple)
    assert bits(checkpoints.flatten(back)) == bits(flat)
    with pytest.raises(KeyError, match="b"):
        checkpoints.unflatten({"a": np.zeros(1)}, {"a": 0, "b": 0})


def test_a_save_is_all_or_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "publish_folder", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(folder, {"a": np.zeros(2)}, {})
    assert os.listdir(folder.parent) == []  # neither a checkpoint nor the space it took
    checkpoints.save(folder, {"a": np.arange(2)}, {"m": 1})
    write = checkpoints._write
    for owner, name in ((checkpoints, "_write"), (atomic_files, "publish_folder")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space"):
                checkpoints.save(folder, {"a": np.zeros(2)}, {"m": 2})
        assert checkpoints.load(folder)[0]["a"].tolist() == [0, 1] and checkpoints.load(folder)[1] == {"m": 1}
    for other in (np.zeros(2, np.float32), np.zeros(3), np.array([0, 1e-320])):  # what the library wrote instead
        with monkeypatch.context() as patch:
            patch.setattr(
                checkpoints, "_write", lambda manager, step, _, notes, a=other: write(manager, step, {"a": a}, notes)
            )
            with pytest.raises(Damaged, match="other arrays when it is read back"):
                checkpoints.save(folder, {"a": np.zeros(2)}, {}, 1, {0: {"a": other}})
        assert checkpoints.load(folder)[1] == {"m": 1} and os.listdir(folder.parent) == ["abc"]


def test_any_folder_will_do(tmp_path):
    for name in ("old [v1]", "a*b?", "\\", "\udcff", "[!a]%5B#é&:;|~$'\"<>{} \n\x7f"):
        folder = tmp_path / name / "run"
        checkpoints.save(folder, SLICE, {"m": 1}, 3, {1: SLICE})
        assert bits(checkpoints.load(folder, 1)[0]) == bits(checkpoints.load(folder)[0]) == bits(SLICE), name
    checkpoints.save_step(tmp_path / "[v1]" / "steps", SLICE, {}, 2)
    assert bits(checkpoints.load(tmp_path / "[v1]" / "steps")[0]) == bits(SLICE)


def test_an_error_of_the_library_is_cut_to_its_cause(folder, monkeypatch):
    place = 'Error writing "a/0" in OCDBT database at local file "/d: e/": Failed writing: "/d/5f": Failed to write: '
    notes = " [os_error_code='24'] [source locations='a.cc:1\\nb.cc:2']"
    errors = [(f"RESOURCE_EXHAUSTED: {place}Too many open files{notes}", OSError, "Too many open files")]
    errors += [(f"INTERNAL: {place}the cause [source locations='x']\nmore", UserError, "the cause")]
    errors += [('FAILED_PRECONDITION: Error opening "zarr" driver: the cause', UserError, ": the cause")]
    for text, kind, cause in errors:

        def fail(*_, text=text, **__):
            raise ValueError(text)

        monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises(kind) as caught:
            checkpoints.save(folder, SLICE, {})
        message = str(caught.value)
        assert cause in message and not any(
            word in message for word in ("Error ", "source", "os_error", "INTERNAL", "\n")
        )


def test_leftovers_of_a_kill_do_not_hinder(folder):
    for name in (".abc.tmp", ".abc.old"):
        checkpoints.save(folder.with_name(name), {"a": np.zeros(2)}, {}, step=9)
    checkpoints.save(folder, {"a": np.arange(2)}, {}, step=3)
    assert checkpoints.load(folder)[2] == 3 and os.listdir(folder.parent) == ["abc"]


def test_steps_keep_two(folder):
    for step in (2, 4, 10):
        checkpoints.save_step(folder, {"a": np.full(3, step)}, {"epoch": step}, step)
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"4", "10"}
    loaded, metadata, step = checkpoints.load(folder)
    assert loaded["a"].tolist() == [10, 10, 10] and metadata == {"epoch": 10} and step == 10


# what is refused
def test_what_is_missing_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "holds no checkpoint" in refusal(tmp_path)
    for missing in ("0/metadata", "0/arrays"):  # TensorStore takes the second for an empty database
        checkpoints.save(tmp_path / "c", SLICE, {})
        shutil.rmtree(tmp_path / "c" / missing)
        refusal(tmp_path / "c")


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_damage_to_any_file_is_refused_or_does_not_matter_and_no_pickle_is_loaded(whole, tmp_path):
    wanted, refused = bits(checkpoints.load(whole)[0]), set()
    bomb = pickle.dumps(Bomb(str(tmp_path / "boom")))
    for name in files_of(whole):
        content = (whole / name).read_bytes()
        for raw in (b"", content[: len(content) // 2], bytes(byte ^ 85 for byte in content), bomb):
            path = with_other_bytes(whole, tmp_path / "c", name, raw)
            try:
                loaded, metadata, _ = checkpoints.load(path)
                assert bits(loaded) == wanted and metadata == {"m": 1}, name
            except UserError as error:
                assert str(path) in str(error) and "OCDBT" not in str(error) and "\n" not in str(error)
                refused.add(name)
    assert "0/metadata/metadata" in refused and any(name.startswith("0/arrays/") for name in refused)
    assert not (tmp_path / "boom").exists()


def test_files_that_cannot_be_read_now_are_no_damage(whole, tmp_path, monkeypatch):
    path = with_other_bytes(whole, tmp_path / "c", "0/metadata/metadata", b"{}")
    refusal(path)

    def fail(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(path), "read_bytes", fail)
    with pytest.raises(PermissionError):
        checkpoints.load(path)


def test_metadata_of_any_kind_is_refused(whole, tmp_path):
    texts = [b"null", b"[]", b"3", b"{}", b'{"metadata": [], "empty": {}}', b'{"metadata": null, "empty": {}}']
    texts += [b'{"metadata": {}, "empty": []}x', b'{"metadata": {}, "empty": {"a": ["float32", [10]]}}']
    texts += [b'{"metadata": {}, "empty": {"a": ["float32", [1000000000000000000000000000000, 0]]}}']
    texts += [b'{"metadata": {}, "empty": {"a": ["no dtype", [0]]}}', b'{"metadata": {}, "empty": {"a": 3}}']
    texts += [b"[" * 100_000, b"\xff\xfe", pickle.dumps({"metadata": {}, "empty": {}})]
    for text in texts:
        refusal(with_other_bytes(whole, tmp_path / "c", "0/metadata/metadata", text))


def test_shapes_that_are_only_promised_are_refused_before_memory_is_taken(whole, tmp_path):
    import tensorstore as ts

    path = tmp_path / "c"
    shutil.copytree(whole, path)
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{path}/0/arrays/", "path": "prompt/"}}
    kind = {"metadata": {"shape": [10**12], "chunks": [1000], "dtype": "<f4"}, "create": True, "delete_existing": True}
    ts.open(spec | kind).result()
    tracemalloc.start()
    try:
        assert f"it calls for {4 * 10**12 + 32} bytes, more than its files can hold" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    checkpoints.save(tmp_path / "zeros", {"a": np.zeros((4000, 1000), np.float32)}, {})  # what packs best is read
    assert checkpoints.load(tmp_path / "zeros")[0]["a"].shape == (4000, 1000)


def test_arrays_that_are_no_slice_are_refused_with_all_reasons():
    assert all(getattr(as_slice(SLICE, "abc"), name) is leaf for name, leaf in SLICE.items())
    assert isinstance(as_slice(SLICE, "abc"), Slice)
    cases = [
        ({"bias": None}, ["bias is missing"]),
        ({"x" * 10**6: np.zeros(1)}, ["is no part of a slice"]),
        ({"prompt": np.array([{}], object)}, ["prompt must be float32 of 1 dimensions, is object [1]"]),
        ({"kernel": np.zeros(6, np.float32)}, ["kernel must be float32 of 2 dimensions, is float32 [6]"]),
        ({"bias": np.zeros(3, np.float32)}, ["kernel [3, 2] and bias [3] have different numbers of classes"]),
        ({"bias": None, "prompt": np.zeros(6)}, ["bias is missing", "prompt must be float32"]),
    ]
    for changes, lines in cases:
        with pytest.raises(UserError, match="slice abc is damaged") as caught:
            as_slice({name: leaf for name, leaf in (SLICE | changes).items() if leaf is not None}, "abc")
        message = str(caught.value)
        assert all(line in message for line in lines) and len(message) < 500


def test_adapters_that_do_not_fit_the_backbone_are_named():
    shapes = backbone_lib.graph(TINY, LoraSpec(2, 1.0))[2]
    adapters = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    arrays = checkpoints.flatten(Slice(**SLICE, backbone=adapters))
    chex.assert_trees_all_equal(as_slice(arrays, "abc", shapes).backbone, adapters)
    name = "backbone/blocks/0/attention/qkv/lora_a"
    cases = [(None, "missing: blocks/0/attention/qkv/lora_a"), (arrays[name].astype("f8"), f"{name} must be float32")]
    cases.append((arrays[name][:, :1], "blocks/0/attention/qkv/lora_a: the file has"))
    for leaf, line in cases:
        changed = {field: value for field, value in (arrays | {name: leaf}).items() if value is not None}
        with pytest.raises(UserError, match=line):
            as_slice(changed, "abc", shapes)
    with pytest.raises(UserError, match="is no part of a slice"):
        as_slice(arrays, "abc")


def test_a_backbone_of_other_metadata_or_arrays_is_refused(tmp_path):
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), backbone_lib.graph(TINY)[1])
    backbone = backbone_lib.make(TINY, params, (0.5,), (0.5,))
    arrays, metadata = checkpoints.flatten(backbone.params), {"mean": [0.5], "std": [0.5], "digest": backbone.digest}
    metadata |= {"config": backbone_lib.describe(backbone.config), "inputs": {}, "provenance": {}}
    assert backbone_lib.restore(tmp_path, arrays, metadata).digest == backbone.digest
    changes = [("config", value) for value in (None, [], 3, {}, {"family": "vit"}, {"family": []})]
    changes += [("config", metadata["config"] | {"depth": value}) for value in (-1, 30, 10**9, "x", 0.5, None)]
    changes += [("mean", value) for value in (None, 3, ["x"], [float("nan")])]
    changes += [("digest", value) for value in (None, 3, "0" * 64)] + [("inputs", None), ("inputs", "x")]
    for field, value in changes:
        with pytest.raises(UserError, match="is damaged") as caught:
            backbone_lib.restore(tmp_path, arrays, metadata | {field: value})
        assert len(str(caught.value)) < 2000
    name = sorted(arrays)[0]
    for leaf in (np.array([{}], object), arrays[name].astype(np.float64), np.zeros(9, "U4")):
        with pytest.raises(UserError, match="is damaged"):
            backbone_lib.restore(tmp_path, arrays | {name: leaf}, metadata)
    checkpoints.save(tmp_path / "backbone", arrays, metadata)
    assert backbone_lib.load(tmp_path / "backbone")[1] == {}
    with pytest.raises(UserError, match="provenance names no origin"):
        weight_files.read(str(tmp_path / "backbone"))
