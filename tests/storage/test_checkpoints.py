"""Checkpoints: what comes back is what was saved, bit for bit; what is damaged or half written is never served."""

import errno

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import atomic_files, checkpoints


def arrays(rng) -> dict:
    special = np.array([np.nan, -0.0, np.inf, 1e-45, np.nextafter(1, 2)], np.float32)
    return {
        "prompt": rng.normal(size=(3, 4)).astype(np.float32),
        "blocks/0/kernel": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "special": special,
        "step": np.array(7, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "bytes": np.arange(5, dtype=np.uint8),
    }


def same(one, other) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in one.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in other.items()
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "slices" / "abc"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of one array, to be copied and damaged."""
    path = tmp_path_factory.mktemp("whole") / "one"
    checkpoints.save(path, {"a": np.arange(64, dtype=np.float32)}, {"m": 1})
    return path


def test_round_trip(folder, rng):
    saved = arrays(rng)
    checkpoints.save(folder, saved, {"cluster": "k", "deep": {"x": [1, None, 0.1]}}, step=12)
    found, metadata, step = checkpoints.load(folder)
    assert same(found, saved) and all(type(leaf) is np.ndarray for leaf in found.values())
    assert (metadata, step) == ({"cluster": "k", "deep": {"x": [1, None, 0.1]}}, 12)
    assert [path.name for path in folder.parent.iterdir()] == ["abc"]


def test_replace_existing(folder):
    checkpoints.save(folder, {"a": np.zeros(2)}, {"m": 1}, step=9)
    checkpoints.save(folder, {"b": np.ones(3, np.float32)}, {"m": 2}, step=4)
    found, metadata, step = checkpoints.load(folder)
    assert found.keys() == {"b"} and metadata == {"m": 2} and step == 4


def test_flatten_round_trip(rng):
    tree = {
        "blocks": {0: {"w": rng.normal(size=2)}, 1: {"w": rng.normal(size=2)}, 10: {"w": rng.normal(size=2)}},
        "head": (jnp.ones(3), [np.int32(4)]),
    }
    flat = checkpoints.flatten(tree)
    assert set(flat) == {"blocks/0/w", "blocks/1/w", "blocks/10/w", "head/0", "head/1/0"}
    assert all(type(leaf) is np.ndarray for leaf in flat.values())
    back = checkpoints.unflatten(flat, tree)
    assert set(back["blocks"]) == {0, 1, 10} and isinstance(back["head"], tuple)
    for block in (0, 1, 10):
        np.testing.assert_array_equal(back["blocks"][block]["w"], tree["blocks"][block]["w"])
    assert same(checkpoints.flatten(back), flat)


def test_unflatten_needs_every_leaf():
    with pytest.raises(KeyError, match="b"):
        checkpoints.unflatten({"a": np.zeros(1)}, {"a": 0, "b": 0})


def test_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("damage", ["emptied", "halved", "flipped"])
def test_damage_is_a_user_error(whole, tmp_path, damage):
    """Each file in turn: the checkpoint is refused or, where the file does not matter, read as it was."""
    wanted, _, _ = checkpoints.load(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    refused = []
    for i, name in enumerate(files):
        copy = tmp_path / str(i)
        for other in files:
            content = (whole / other).read_bytes()
            if other == name:
                content = {"emptied": b"", "halved": content[: len(content) // 2]}.get(
                    damage, bytes(c ^ 85 for c in content)
                )
            (copy / other).parent.mkdir(parents=True, exist_ok=True)
            (copy / other).write_bytes(content)
        try:
            found, metadata, _ = checkpoints.load(copy)
            assert same(found, wanted) and metadata == {"m": 1}, name
        except UserError as error:
            assert str(copy) in str(error)
            refused.append(name.as_posix())
    assert "0/metadata/metadata" in refused and any(name.startswith("0/arrays/") for name in refused)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_save_is_all_or_nothing(folder, monkeypatch):
    monkeypatch.setattr(atomic_files, "publish_folder", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(folder, {"a": np.zeros(2)}, {})
    assert list(folder.parent.iterdir()) == []  # neither a checkpoint nor the space it took


def test_failed_replacement_keeps_the_old(folder, monkeypatch):
    checkpoints.save(folder, {"a": np.arange(2)}, {"m": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_write", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(folder, {"a": np.zeros(2)}, {"m": 2})
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "publish_folder", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(folder, {"a": np.zeros(2)}, {"m": 2})
    found, metadata, _ = checkpoints.load(folder)
    assert found["a"].tolist() == [0, 1] and metadata == {"m": 1}


def test_leftovers_of_a_kill_do_not_hinder(folder):
    for name in (".abc.tmp", ".abc.old"):
        checkpoints.save(folder.with_name(name), {"a": np.zeros(2)}, {}, step=9)
    checkpoints.save(folder, {"a": np.arange(2)}, {}, step=3)
    assert checkpoints.load(folder)[2] == 3 and [path.name for path in folder.parent.iterdir()] == ["abc"]


def test_steps_keep_two(folder):
    for step in (2, 4, 10):
        checkpoints.save_step(folder, {"a": np.full(3, step)}, {"epoch": step}, step)
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"4", "10"}
    found, metadata, step = checkpoints.load(folder)
    assert found["a"].tolist() == [10, 10, 10] and metadata == {"epoch": 10} and step == 10


def test_what_is_read_is_what_orbax_itself_restores(folder, rng):
    import orbax.checkpoint as ocp

    saved = {name: leaf for name, leaf in arrays(rng).items() if leaf.size}
    checkpoints.save(folder, saved, {"m": 1}, 7, {2: {"a": np.arange(3)}})
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        for step in (7, 2):
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(), metadata=ocp.args.JsonRestore())
            restored = manager.restore(step, args=args)
            found, metadata, _ = checkpoints.load(folder, step)
            assert same(found, {name: np.asarray(leaf) for name, leaf in restored["arrays"].items()})
            assert metadata == restored["metadata"]["metadata"]
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load(folder, 3)
