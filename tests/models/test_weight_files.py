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
from flax.serialization import msgpack_serialize
from published import VIT, flax_tree, hub_folder, hugging_face_vit, settings_of

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import convert, weight_files, zoo

FLAG = "--config.backbone.weights"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever a test here reads, it must not open a connection."""

    class Local(socket.socket):
        def __init__(self, family=-1, *arguments, **options):
            assert family == socket.AF_UNIX, "a socket was opened"  # Orbax runs an event loop, which has one
            super().__init__(family, *arguments, **options)

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


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "npz"])
def test_a_damaged_file_is_refused_by_name(tmp_path, folder, kind):
    """Cut short anywhere, replaced by text, or with bits flipped where the format would notice."""
    path = folder / {"safetensors": "model.safetensors", "msgpack": "flax_model.msgpack", "npz": "weights.npz"}[kind]
    if kind == "msgpack":
        path.write_bytes(msgpack_serialize(flax_tree(hugging_face_vit())))
    if kind == "npz":
        np.savez(path, **hugging_face_vit())
    if kind != "safetensors":
        (folder / "model.safetensors").unlink()
    whole = path.read_bytes()
    stand_ins = {
        b"": "it is empty",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n": "git lfs pull",
        b"\n<!DOCTYPE html><html>": "HTML",
        b'{"error": "Repository not found"}': "Repository not found",
    }
    halves = dict.fromkeys((whole[:200], whole[: len(whole) // 2], whole[:-100]), "cut short")
    for content, words in {whole[:4]: "", **halves, **stand_ins}.items():
        path.write_bytes(content)
        for where in (path,) if kind == "npz" else (folder, path):
            message = refusal(where)
            assert message.startswith(f"{FLAG}={where}: {path} is not a readable .{kind}"), len(content)
            assert words in message, (content[:50], message)


def test_files_that_hold_no_arrays_by_name(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(np.zeros(3)))
    assert "it holds a ndarray, not a tree of arrays" in refusal(tmp_path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "it holds a single array" in refusal(tmp_path / "array.npz")


def test_damaged_json_is_refused_by_name(folder):
    config, lfs = folder / "config.json", "version https://git-lfs.github.com/spec/v1"
    whole, processor = config.read_bytes(), folder / "preprocessor_config.json"
    for path, text in [(processor, "x"), *((config, text) for text in ("{", "[1]", "\xff", lfs))]:
        path.write_text(text, encoding="latin-1")
        message = refusal(folder)
        assert str(path) in message and "JSON" in message and ("git lfs pull" in message) == (text == lfs), text
        config.write_bytes(whole)
        processor.unlink(missing_ok=True)


def test_other_kinds_of_files_and_folders_without_weights(tmp_path):
    message = refusal(tmp_path)
    assert FLAG in message and "must hold one of model.safetensors" in message and "it holds nothing" in message
    for name in ("tf_model.h5", "weights"):
        (tmp_path / name).write_bytes(b"\x89HDF\r\n")
        message = refusal(tmp_path / name)
        assert ".safetensors, .npz, .msgpack" in message and repr(Path(name).suffix) in message
        message = refusal(tmp_path)
        assert "must hold one of model.safetensors" in message and name in message


def test_two_files_of_which_either_could_be_meant(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    for path in (folder, folder / "one.safetensors"):  # a single one is meant; config.json beside it counts
        assert convert.load(Backbone(weights=str(path)))[0].config == dataclasses.replace(VIT, classes=0)
    shutil.copy(folder / "one.safetensors", folder / "other.safetensors")
    message = refusal(folder)
    assert "one.safetensors" in message and "other.safetensors" in message


def test_missing_shards_are_all_named_and_the_index_must_be_one(tmp_path):
    hub_folder(tmp_path, hugging_face_vit(), settings_of(VIT), shards=4)
    for shard in ("model-00002-of-00004.safetensors", "model-00004-of-00004.safetensors"):
        (tmp_path / shard).unlink()
    message = refusal(tmp_path)
    assert message.count("is missing; model.safetensors.index.json names it") == 2
    assert "model-00002-of" in message and "model-00004-of" in message
    for index in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}):
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


def test_a_pickle_is_refused_and_not_read(tmp_path, malicious):
    content, owned = malicious
    for suffix in weight_files.PICKLES:
        for name in (f"weights{suffix}", f"WEIGHTS{suffix.upper()}"):
            (tmp_path / name).write_bytes(content)
            message = refusal(tmp_path / name)
            assert FLAG in message and "is a pickle, which can run any code" in message
            assert "model.safetensors" in message and "weights_only=True" in message
    for name in ("pytorch_model.bin", "model.PTH"):  # alone in a folder
        (tmp_path / name[:3]).mkdir()
        (tmp_path / name[:3] / name).write_bytes(content)
        message = refusal(tmp_path / name[:3])
        assert f"{name} is a pickle" in message and "weights_only=True" in message
    assert not owned.exists()


def test_a_pickle_under_another_name_or_inside_another_file_is_not_read(tmp_path, malicious):
    content, owned = malicious
    for name in ("weights.npz", "model.safetensors", "flax_model.msgpack"):
        (tmp_path / name).write_bytes(content)
        assert "is not a readable" in refusal(tmp_path / name) and not owned.exists()
    np.savez(tmp_path / "weights.npz", cls=np.array([Malicious(owned)], dtype=object))
    assert "is not a readable .npz" in refusal(tmp_path / "weights.npz") and not owned.exists()
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "shard.bin").write_bytes(content)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard.bin"}}))
    assert "shard.bin is a pickle" in refusal(folder) and not owned.exists()


# -- names and the hub --


def test_a_missing_file_of_a_named_backbone_says_what_to_download(tmp_path):
    message = refusal(tmp_path / "absent", name="swin-b-22k")
    assert message.startswith(f"{FLAG}={tmp_path / 'absent'}: no such file or folder")
    expected = ("microsoft/swin-base-patch4-window7-224-in22k", "model.safetensors, config.json", f"{FLAG}=hub")
    assert all(words in message for words in (*expected, f"{FLAG}=FOLDER"))
    message = refusal(tmp_path / "absent")
    assert "no such file or folder" in message and ".safetensors, .npz, .msgpack" in message and "hub:OWNER" in message


@pytest.fixture
def hub(monkeypatch, original):
    """The hub's client, recorded; it answers with the folder, or raises what is put into `error`."""
    import huggingface_hub

    client = types.SimpleNamespace(calls=[], error=None, folder=original)

    def snapshot_download(repo_id, **options):
        client.calls.append((repo_id, options))
        if client.error:
            raise client.error
        return str(client.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return client


def test_a_hub_id_is_fetched_at_its_revision(hub, monkeypatch):
    named = {name: zoo.ZOO[name] for name in ("vit-b-22k", "swin-b-1k")}
    cases = [
        ("hub:OWNER/NAME", "", "OWNER/NAME", "main"),
        ("hub:OWNER/NAME@1f2e", "", "OWNER/NAME", "1f2e"),
        ("hub:OWNER/NAME@1f2e", "vit-b-22k", "OWNER/NAME", "1f2e"),
        *(("hub", name, entry.hub, entry.revision) for name, entry in named.items()),
    ]
    for name, entry in named.items():
        monkeypatch.setitem(zoo.ZOO, name, dataclasses.replace(entry, architecture=VIT))
    for given, name, repository, revision in cases:
        hub.calls.clear()
        backbone, provenance = convert.load(Backbone(weights=given, name=name))
        assert backbone.config == dataclasses.replace(VIT, classes=0)
        assert [(call, options["revision"]) for call, options in hub.calls] == [(repository, revision)]
        patterns = hub.calls[0][1]["allow_patterns"]
        assert "config.json" in patterns and not any(pattern.endswith((".bin", "*")) for pattern in patterns)
        assert provenance.name == str(hub.folder / "model.safetensors")


def test_of_a_hub_repository_without_safetensors_the_flax_file_is_fetched(hub, tmp_path):
    hub.folder = tmp_path
    (tmp_path / "config.json").write_text(json.dumps(settings_of(VIT)))
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(flax_tree(hugging_face_vit())))
    assert convert.load(Backbone(weights="hub:OWNER/NAME"))[0].config.width == VIT.width
    assert [repo for repo, _ in hub.calls] == ["OWNER/NAME"] * 2
    assert "*.msgpack" in hub.calls[1][1]["allow_patterns"]


def test_a_hub_that_does_not_answer(hub):
    for error in (OSError("no network\nat all"), RuntimeError()):
        hub.error = error
        message = refusal("hub", name="vit-b-1k")
        assert "google/vit-base-patch16-224 could not be fetched from the hub" in message
        assert type(error).__name__ in message and f"{FLAG}=FOLDER" in message
        assert len(message.splitlines()) == 1


def test_ids_of_another_form_never_reach_the_hub(hub):
    for given in ("hub", "hub:", "hub:NAME", "hub:A/B/C"):
        message = refusal(given)
        assert f"{FLAG}={given}: the hub's names are OWNER/NAME" in message and not hub.calls
