"""Reading weights: what cannot be used is refused with one message, nothing is unpickled, no network is touched."""

import dataclasses
import json
import os
import pickle
import shutil
import socket
import types
from pathlib import Path

import numpy as np
import pytest
from published import (
    VIT,
    flax_tree,
    hub_folder,
    hugging_face_vit,
    settings_of,
)

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, weight_files, zoo

FLAG = "--config.backbone.weights"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever a test here reads, it must not open a connection."""

    class Local(socket.socket):
        def __init__(self, family=-1, *more, **named):
            assert family == socket.AF_UNIX, "a socket was opened"  # Orbax runs an event loop, which has one
            super().__init__(family, *more, **named)

    monkeypatch.setattr(socket, "socket", Local)
    with pytest.raises(AssertionError, match="a socket was opened"):
        socket.create_connection(("127.0.0.1", 9))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return hub_folder(tmp_path_factory.mktemp("weights") / "vit", hugging_face_vit(), settings_of(VIT))


@pytest.fixture
def folder(tmp_path, original) -> Path:
    """A copy to spoil."""
    return shutil.copytree(original, tmp_path / "vit")


def refusal(path, image_size: int = 0, **chosen) -> str:
    with pytest.raises(UserError) as caught:
        convert.load(Backbone(weights=str(path), **chosen), image_size)
    return str(caught.value)


def test_a_good_folder_is_read_without_a_network(folder):
    assert convert.load(Backbone(weights=str(folder)))[0].config == dataclasses.replace(VIT, classes=0)


# -- files that are not what they should be --


@pytest.mark.parametrize("kept", [0, 4, 200, -100], ids=["empty", "4 bytes", "200 bytes", "all but 100 bytes"])
@pytest.mark.parametrize("kind", ["safetensors", "msgpack"])
def test_a_truncated_file(tmp_path, folder, kind, kept):
    if kind == "msgpack":
        from flax.serialization import msgpack_serialize

        (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(flax_tree(hugging_face_vit())))
        (folder / "model.safetensors").unlink()
    path = folder / {"safetensors": "model.safetensors", "msgpack": "flax_model.msgpack"}[kind]
    path.write_bytes(path.read_bytes()[:kept])
    for where in (folder, path):
        message = refusal(where)
        assert message.startswith(f"{FLAG}={where}: {path} is not a readable") and "cut short" in message


def test_a_msgpack_without_a_tree(tmp_path):
    from flax.serialization import msgpack_serialize

    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(np.zeros(3)))
    assert "it holds a ndarray, not a tree of arrays" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "weights.npz"])
def test_another_kind_of_file_under_the_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    assert f"{name} is not a readable" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", "{"), ("config.json", "[1]"), ("preprocessor_config.json", "nothing"), ("config.json", "\xff")],
)
def test_damaged_json(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    message = refusal(folder)
    assert str(folder / name) in message and "JSON" in message


@pytest.mark.parametrize("mean", [0.5, ["a"], [[1]]])
def test_a_mean_that_is_no_list_of_numbers(folder, mean):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": [1, 1, 1]}))
    assert "mean and std beside the weights must be lists of numbers" in refusal(folder)


def test_a_normalisation_for_other_channels(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 1], "image_std": [1, 1, 1]}))
    assert "(0.0, 1.0): the backbone has 3 channels" in refusal(folder)


@pytest.mark.parametrize("name", ["tf_model.h5", "model.onnx", "weights"])
def test_kinds_that_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89HDF\r\n")
    message = refusal(tmp_path / name)
    assert FLAG in message and ".safetensors, .npz, .msgpack" in message and repr(Path(name).suffix) in message
    message = refusal(tmp_path)  # and a folder that holds nothing else
    assert "must hold one of model.safetensors" in message and name in message


def test_an_empty_folder(tmp_path):
    message = refusal(tmp_path)
    assert FLAG in message and "must hold one of model.safetensors" in message and "it holds nothing" in message


def test_two_files_of_which_either_could_be_meant(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    assert convert.load(Backbone(weights=str(folder)))  # a single one is meant
    shutil.copy(folder / "one.safetensors", folder / "other.safetensors")
    message = refusal(folder)
    assert "one.safetensors" in message and "other.safetensors" in message


def test_missing_shards_are_all_named(tmp_path):
    hub_folder(tmp_path, hugging_face_vit(), settings_of(VIT), shards=4)
    for shard in ("model-00002-of-00004.safetensors", "model-00004-of-00004.safetensors"):
        (tmp_path / shard).unlink()
    message = refusal(tmp_path)
    assert message.count("is missing; model.safetensors.index.json names it") == 2
    assert "model-00002-of" in message and "model-00004-of" in message


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}], ids=str)
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json is damaged: weight_map" in refusal(tmp_path)


# -- pickles --


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def malicious(tmp_path) -> tuple[bytes, Path]:
    """A pickle and the folder that appears when somebody reads it."""
    content = pickle.dumps(Malicious(tmp_path / "owned"))
    pickle.loads(content)
    (tmp_path / "owned").rmdir()  # it works
    return content, tmp_path / "owned"


@pytest.mark.parametrize("suffix", weight_files.PICKLES)
def test_a_pickle_is_refused_and_not_read(tmp_path, malicious, suffix):
    content, owned = malicious
    for name in (f"weights{suffix}", f"WEIGHTS{suffix.upper()}"):
        path = tmp_path / name
        path.write_bytes(content)
        message = refusal(path)
        assert FLAG in message and "is a pickle, which can run any code" in message
        assert "model.safetensors" in message and "weights_only=True" in message
    assert not owned.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.PTH"])
def test_a_folder_of_pickles_only(tmp_path, malicious, name):
    content, owned = malicious
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / name).write_bytes(content)
    (tmp_path / "hub" / "config.json").write_text(json.dumps(settings_of(VIT)))
    message = refusal(tmp_path / "hub")
    assert f"{name} is a pickle" in message and "weights_only=True" in message and not owned.exists()


@pytest.mark.parametrize("name", ["weights.npz", "model.safetensors", "flax_model.msgpack"])
def test_a_pickle_under_another_name_is_not_read(tmp_path, malicious, name):
    content, owned = malicious
    (tmp_path / name).write_bytes(content)
    assert "is not a readable" in refusal(tmp_path / name) and not owned.exists()


def test_pickled_objects_in_an_npz_are_not_read(tmp_path, malicious):
    _, owned = malicious
    np.savez(tmp_path / "weights.npz", cls=np.array([Malicious(owned)], dtype=object))
    assert "is not a readable .npz" in refusal(tmp_path / "weights.npz") and not owned.exists()


def test_a_shard_that_is_a_pickle(tmp_path, malicious):
    content, owned = malicious
    (tmp_path / "shard.bin").write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard.bin"}}))
    assert "shard.bin is a pickle" in refusal(tmp_path) and not owned.exists()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_arrays_that_are_not_floating_point(folder, dtype):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    for name in ("layernorm.bias", "layernorm.weight"):
        arrays[name] = arrays[name].astype(dtype)
    if dtype != "complex64":  # which safetensors cannot hold
        save_file(arrays, folder / "model.safetensors")
        assert refusal(folder).count(f"must be floating point, is {dtype}") == 2
    np.savez(folder / "weights.npz", **arrays)
    assert refusal(folder / "weights.npz").count(f"must be floating point, is {dtype}") == 2


# -- names and the hub --


def test_a_name_that_does_not_exist(folder):
    message = refusal(folder, name="vit-b-22")
    assert "--config.backbone.name=vit-b-22: unknown; did you mean vit-b-22k?" in message
    assert all(name in refusal(folder, name="x") for name in zoo.ZOO)


def test_a_missing_file_of_a_named_backbone_says_what_to_download(tmp_path):
    message = refusal(tmp_path / "absent", name="swin-b-22k")
    assert message.startswith(f"{FLAG}={tmp_path / 'absent'}: no such file or folder")
    for needle in (
        "microsoft/swin-base-patch4-window7-224-in22k",
        "model.safetensors, config.json",
        f"{FLAG}=FOLDER",
        f"{FLAG}=hub",
    ):
        assert needle in message
    message = refusal(tmp_path / "absent")
    assert "no such file or folder" in message and ".safetensors, .npz, .msgpack" in message and "hub:OWNER" in message


@pytest.fixture
def hub(monkeypatch, original):
    """The hub's client, recorded; it answers with the folder, or raises what is put into `error`."""
    import huggingface_hub

    found = types.SimpleNamespace(calls=[], error=None, folder=original)

    def snapshot_download(repo_id, **more):
        found.calls.append((repo_id, more))
        if found.error:
            raise found.error
        return str(found.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


@pytest.mark.parametrize(
    ("given", "name", "wanted", "revision"),
    [
        ("hub:OWNER/NAME", "", "OWNER/NAME", "main"),
        ("hub:OWNER/NAME@1f2e", "", "OWNER/NAME", "1f2e"),
        ("hub:OWNER/NAME@1f2e", "vit-b-22k", "OWNER/NAME", "1f2e"),
        ("hub", "vit-b-22k", zoo.ZOO["vit-b-22k"].hub, zoo.ZOO["vit-b-22k"].revision),
        ("hub", "swin-b-1k", zoo.ZOO["swin-b-1k"].hub, zoo.ZOO["swin-b-1k"].revision),
    ],
)
def test_a_hub_id_is_fetched_at_its_revision(hub, monkeypatch, given, name, wanted, revision):
    if name:
        monkeypatch.setitem(zoo.ZOO, name, dataclasses.replace(zoo.ZOO[name], architecture=VIT))
    made, provenance = convert.load(Backbone(weights=given, name=name))
    assert made.config == dataclasses.replace(VIT, classes=0)
    assert [(repo, more["revision"]) for repo, more in hub.calls] == [(wanted, revision)]
    patterns = hub.calls[0][1]["allow_patterns"]
    assert "config.json" in patterns and not any(pattern.endswith((".bin", "*")) for pattern in patterns)
    assert provenance.name == str(hub.folder / "model.safetensors")


def test_a_hub_repository_without_safetensors_is_asked_for_its_flax_file(hub, tmp_path):
    from flax.serialization import msgpack_serialize

    hub.folder = tmp_path
    (tmp_path / "config.json").write_text(json.dumps(settings_of(VIT)))
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(flax_tree(hugging_face_vit())))
    assert convert.load(Backbone(weights="hub:OWNER/NAME"))[0].config.width == VIT.width
    assert [repo for repo, _ in hub.calls] == ["OWNER/NAME"] * 2
    assert "*.msgpack" in hub.calls[1][1]["allow_patterns"]


@pytest.mark.parametrize("error", [OSError("no network\nat all"), ValueError("no such name"), RuntimeError()])
def test_a_hub_that_does_not_answer(hub, error):
    hub.error = error
    message = refusal("hub", name="vit-b-1k")
    assert "google/vit-base-patch16-224 could not be fetched from the hub" in message
    assert type(error).__name__ in message and f"{FLAG}=FOLDER" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("given", ["hub", "hub:", "hub:NAME", "hub:A/B/C"])
def test_ids_that_are_none_are_not_asked_for(hub, given):
    message = refusal(given)
    assert f"{FLAG}={given}: the hub's names are OWNER/NAME" in message and not hub.calls


def test_a_path_never_asks_the_hub(hub, folder, tmp_path):
    convert.load(Backbone(weights=str(folder)))
    refusal(tmp_path / "absent")
    refusal(tmp_path / "absent", name="vit-b-22k")
    assert not hub.calls


# -- folders that lmeraser backbone wrote --


@pytest.fixture(scope="module")
def saved(tmp_path_factory, original) -> Path:
    made, provenance = convert.load(Backbone(weights=str(original)))
    folder = tmp_path_factory.mktemp("saved") / "own"
    backbone_lib.save(folder, made, {}, dataclasses.asdict(provenance))
    return folder


# After a failed read Orbax leaves coroutines of a closed event loop to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_changed_parameters_of_a_folder_of_ours_are_noticed(tmp_path, saved):
    from lmeraser_jax.storage import checkpoints

    arrays, metadata, _ = checkpoints.load(saved)
    arrays["norm/bias"] = arrays["norm/bias"] + np.float32(1e-3)
    checkpoints.save(tmp_path / "own", arrays, metadata)
    message = refusal(tmp_path / "own")
    assert FLAG in message and "its contents have the digest" in message


def test_another_checkpoint_of_ours_is_no_backbone(tmp_path):
    from lmeraser_jax.storage import checkpoints

    checkpoints.save(tmp_path / "slice", {"bias": np.zeros(3, np.float32)}, {"digest": "1"})
    assert "is no backbone that lmeraser backbone wrote" in refusal(tmp_path / "slice")
