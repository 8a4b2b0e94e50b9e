"""The workdir: foreign folders are refused, files change in one step, and one writer holds the lock."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.atomic_files import disk_use, publish_folder, write_bytes, write_json
from lmeraser_jax.storage.workdir import Layout, writer_lock


# workdirs and files
def test_prepare(tmp_path):
    layout = Layout(tmp_path / "a" / "b")
    layout.prepare()
    layout.prepare()
    assert layout.root.is_dir() and list(layout.root.iterdir()) == []
    with writer_lock(layout):
        layout.prepare()
    layout.prepare()  # killed before it had a catalog: the lock file alone is no reason to refuse
    layout.catalog.touch()
    layout.prepare()


def test_prepare_refuses_foreign(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files and is no workdir"):
        Layout(tmp_path).prepare()
    with pytest.raises(UserError, match="is a file, not a folder"):
        Layout(tmp_path / "thesis.tex").prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_require(tmp_path):
    with pytest.raises(UserError, match="does not exist; make one with: lmeraser train --workdir="):
        Layout(tmp_path / "absent").require()
    with pytest.raises(UserError, match="is no workdir"):
        Layout(tmp_path).require()
    Layout(tmp_path).catalog.touch()
    Layout(tmp_path).require()


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "config.json"
    write_json(path, {"b": 1, "a": 2})
    old = path.read_bytes()
    assert old == b'{\n  "a": 2,\n  "b": 1\n}\n' and disk_use(tmp_path) == disk_use(path) == len(old)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            write_bytes(path, b"new")
    assert path.read_bytes() == old
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_publish_folder_replaces_whole(tmp_path, monkeypatch):
    """At no moment does the final name stand for a part of a folder."""
    final, states, removed = tmp_path / "final", [], []
    for text in ("old", "new"):
        (tmp_path / text / "deep").mkdir(parents=True)
        for name in ("a", "deep/b"):
            (tmp_path / text / name).write_text(text)
    publish_folder(tmp_path / "old", final)
    replace, rmtree = os.replace, shutil.rmtree

    def look() -> None:
        states.append([(final / name).read_text() for name in ("a", "deep/b") if (final / name).exists()])

    def replace_and_look(*args):
        replace(*args)
        look()

    def remove_and_look(path, **options):
        removed.append(path)
        rmtree(path, **options)
        look()

    monkeypatch.setattr(os, "replace", replace_and_look)
    monkeypatch.setattr(shutil, "rmtree", remove_and_look)
    publish_folder(tmp_path / "new", final)
    assert all(state in (["old"] * 2, ["new"] * 2, []) for state in states) and states[-1] == ["new"] * 2
    assert final not in removed  # removing file by file is no single step
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# the lock
HOLD = """
import sys, time
from lmeraser_jax.storage.workdir import Layout, writer_lock
with writer_lock(Layout(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_refuses_a_second_writer(tmp_path):
    layout = Layout(tmp_path)
    with writer_lock(layout):
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "), writer_lock(layout):
            pytest.fail("two writers")
    with writer_lock(layout):
        pass
    with pytest.raises(RuntimeError), writer_lock(layout):
        raise RuntimeError
    with writer_lock(layout):
        assert layout.lock.read_text().startswith(f"process {os.getpid()} on ")
    assert layout.lock.read_text() == ""


def test_lock_of_a_killed_process_is_free(tmp_path):
    layout = Layout(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"process {holder.pid} on "), writer_lock(layout):
                pytest.fail("two writers")
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    assert f"process {holder.pid} " in layout.lock.read_text()  # stale text, no lock
    with writer_lock(layout):
        assert layout.lock.read_text().startswith(f"process {os.getpid()} on ")
