"""The workdir: foreign folders and links are refused, files change in one step, all is the user's own, one writes."""

import contextlib
import itertools
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import fast_fakes
from helpers import small_run

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import workdir as workdir_module
from lmeraser_jax.storage.atomic_files import disk_use, publish_folder, remove_others, write_bytes, write_json
from lmeraser_jax.storage.workdir import Layout, current_writer, read_config, refuse_links, writer_lock
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.audit import audit
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.run import open_run
from lmeraser_jax.unlearning.verify import verify_all


@contextlib.contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
        assert os.umask(mask) == mask  # nothing left another one behind
    finally:
        os.umask(before)


def modes(root: Path) -> dict[str, int]:
    paths = {".": root} | {str(path.relative_to(root)): path for path in root.rglob("*")}
    return {name: stat.S_IMODE(path.lstat().st_mode) for name, path in paths.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir that was trained and erased from under a umask of 0, and the modes while its catalog was open."""
    root = tmp_path_factory.mktemp("open") / "runs" / "trained"
    with pytest.MonkeyPatch.context() as patch, umask(0):
        fast_fakes(patch)
        with small_run(root) as run:
            build(run)
            while_open = modes(root)
            erase.request_erasure(run, [run.catalog.live("train").ids[0]])
    return root, while_open


# folders and files
def test_a_workdir_may_lie_in_any_folder(fast_workdir, tmp_path):
    root = tmp_path / "[!a] * ? \\ %41#é&:;|~$'\"<>{}\n" / "old [v1]"
    shutil.move(fast_workdir, root)
    with small_run(root) as run:
        erase.request_erasure(run, run.catalog.live("train").ids[:1])
        assert audit(run).ok and all(verdict.ok for verdict in verify_all(run.layout, run.catalog))
        assert leftovers(run) == []


def test_a_foreign_folder_is_refused_and_a_workdir_is_made_once(tmp_path):
    layout = Layout(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="does not exist; make one with: lmeraser train --workdir="):
        layout.require()
    layout.prepare()
    with pytest.raises(UserError, match="is no workdir"):
        layout.require()
    assert list(layout.root.iterdir()) == []
    with writer_lock(layout):
        layout.prepare()  # killed before it had a catalog: the lock file alone is no reason to refuse
    layout.catalog.touch()
    layout.prepare()
    layout.require()
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files and is no workdir"):
        Layout(tmp_path).prepare()
    with pytest.raises(UserError, match="cannot be made"):
        Layout("/proc/none/run").prepare()
    with pytest.raises(UserError, match="is a file, not a folder"):
        Layout(tmp_path / "thesis.tex").prepare()


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
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
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["config.json"]


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    """At no moment does the final name stand for a part of a folder."""
    final, states = tmp_path / "final", []
    for text in ("old", "new"):
        (tmp_path / text / "deep").mkdir(parents=True)
        for name in ("a", "deep/b"):
            (tmp_path / text / name).write_text(text)
    publish_folder(tmp_path / "old", final)

    def watched(function):
        removes = function is shutil.rmtree

        def call(path, *args, **options):
            assert not (removes and path == final), "removing file by file is no single step"
            function(path, *args, **options)
            states.append([(final / name).read_text() for name in ("a", "deep/b") if (final / name).exists()])

        return call

    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    publish_folder(tmp_path / "new", final)
    assert all(state in (["old"] * 2, ["new"] * 2, []) for state in states) and states[-1] == ["new"] * 2
    assert os.listdir(tmp_path) == ["final"]


def test_a_hostile_config_file_is_refused(tmp_path):
    layout = Layout(tmp_path)
    texts = [b"", b"null", b"[1]", b"3", b"1" * 5000, b'{"a": "\xff"}', b" " * (2 << 20)]
    for raw in (*texts, b"[" * 100_000, b'{"a":' * 100_000):
        layout.config.write_bytes(raw)
        with pytest.raises(UserError, match="config.json is damaged") as caught:
            read_config(layout)
        assert len(str(caught.value)) < 1000


# whose it is
def test_every_file_is_private(trained):
    root, while_open = trained
    assert {"catalog.db-wal", "catalog.db-shm"} <= while_open.keys()
    for found in (while_open, modes(root)):
        assert {"catalog.db", "lock", "config.json", "metrics.jsonl", "records/images.u8", "slices"} <= found.keys()
        assert any(name.startswith("records/features-") for name in found)
        assert sum(name.startswith("slices/") for name in found) > 50
        assert {name: oct(mode) for name, mode in found.items() if mode & 0o077} == {}
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o777  # the user's own umask decides there


def test_an_open_folder_is_closed_and_the_umask_comes_back(tmp_path):
    for mask in (0, 0o022, 0o077):
        with umask(mask):
            tmp_path.chmod(0o777)
            with pytest.raises(RuntimeError), writer_lock(Layout(tmp_path)):
                (tmp_path / f"inside{mask}").touch()
                raise RuntimeError
            (tmp_path / f"outside{mask}").touch()
        assert modes(tmp_path)["."] == 0o700 and modes(tmp_path)[f"inside{mask}"] == 0o600
        assert modes(tmp_path)[f"outside{mask}"] == 0o666 & ~mask


LINKS = ("catalog.db", "config.json", "lock", "catalog.db-wal", "records", "slices", "receipts", "backbone", "scratch")
LINKS += ("records/images.u8", "records/features-0123.f32", "slices/abc", "clusterings/abc", "slices/.abc.tmp")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_links_are_refused(tmp_path):
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    for canary in (outside / "file", outside / "folder" / "images.u8"):
        canary.write_bytes(b"alive")
    before = content(outside)
    for number, (name, kind) in enumerate(itertools.product(LINKS, ("file", "folder", "nothing"))):
        layout = Layout(tmp_path / f"run-{number}")
        link = layout.root / name
        link.parent.mkdir(parents=True)
        link.symlink_to(outside / kind)
        with pytest.raises(UserError, match=f"holds symbolic links.*'{name}'"), writer_lock(layout):
            pytest.fail("it writes")
        assert content(outside) == before and link.is_symlink()


@pytest.mark.parametrize("name", ["pipe", "packed/pipe"])
def test_a_writer_refuses_pipes_and_does_not_wait_for_them(tmp_path, name):
    pipe = tmp_path / "run" / name
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"holds pipes.*'{name}'"), writer_lock(Layout(tmp_path / "run")):
        pytest.fail("it writes")


def test_no_command_writes_through_a_link(trained, tmp_path):
    """A whole trained workdir with one entry moved outside and linked back: writing is refused, reading is not."""
    for number, name in enumerate(("catalog.db", "records/images.u8", "slices/*", "backbone", "lock")):
        root, outside = tmp_path / f"run-{number}", tmp_path / f"outside-{number}"
        shutil.copytree(trained[0], root)
        outside.mkdir()
        path = next(root.glob(name))
        path.rename(outside / "entry")
        path.symlink_to(outside / "entry")
        before = content(outside)
        for command in (lambda root=root: open_run(root, write=True), lambda root=root: small_run(root)):
            with pytest.raises(UserError, match=f"holds symbolic links.*{path.relative_to(root)}"), command():
                pytest.fail("it writes")
        assert content(outside) == before
        with open_run(root) as run:
            assert len(run.catalog.live("train"))
    (tmp_path / "link").symlink_to(trained[0])
    with open_run(tmp_path / "link") as run, open_run(tmp_path / "link", write=True):
        refuse_links(run.layout)  # the workdir itself may be reached through a link


def test_a_removal_does_not_follow_links(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_text("alive")
    inside = tmp_path / "inside" / "slice"
    inside.mkdir(parents=True)
    for link in (inside / "deep", inside.parent / "flat"):
        link.symlink_to(tmp_path / "outside")
    remove_others(inside.parent, set())
    assert list(inside.parent.iterdir()) == [] and (tmp_path / "outside" / "canary").read_text() == "alive"


# the lock
HOLD = """
import sys
from lmeraser_jax.storage.workdir import Layout, writer_lock
with writer_lock(Layout(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def held(root: Path):
    """Another process that holds the lock; `release()` lets it end."""
    command = [sys.executable, "-c", HOLD, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder, lambda: holder.stdin.close()
        finally:
            holder.kill()


def test_the_lock_is_taken_whatever_its_file_says(tmp_path):
    """Its text is shown only where it is what a writer wrote."""
    layout, own = Layout(tmp_path), f"process {os.getpid()} on "
    for raw in (b"", b"\xff\xfe\0", b"\x1b[2J", b"x" * 1_000_000, b"process 1 on a\nb", "process ١ on ü".encode()):
        layout.lock.write_bytes(raw)
        with writer_lock(layout):
            assert layout.lock.read_text().startswith(own) and current_writer(layout).startswith(own)
            layout.lock.write_bytes(raw)
            with pytest.raises(UserError, match="is being written by ") as caught, writer_lock(layout):
                pytest.fail("two writers")
            assert str(caught.value).isprintable() and len(str(caught.value)) < 400
        assert layout.lock.read_bytes() == b"" and current_writer(layout) == ""


def test_waiting_gets_the_lock(tmp_path, capsys):
    """It is said once, and the lock is taken as soon as the other process is done, long before the time is over."""
    with held(tmp_path) as (holder, release):
        timer = threading.Timer(0.3, release)
        timer.start()
        start = time.monotonic()
        with writer_lock(Layout(tmp_path), wait=60):
            assert 0.2 < time.monotonic() - start < 30
        timer.join()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"process {holder.pid} on " in err and "60 s at most" in err


def test_waiting_ends_and_the_lock_of_a_killed_process_is_free(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workdir_module, "POLL", 0.01)
    layout = Layout(tmp_path)
    with held(tmp_path) as (holder, _):
        for wait, said in ((0, 0), (0.3, 1)):
            start = time.monotonic()
            with pytest.raises(UserError) as caught, writer_lock(layout, wait=wait):
                pytest.fail("two writers")
            assert wait <= time.monotonic() - start < wait + 10
            message = str(caught.value)
            assert f"process {holder.pid} on " in message and "--wait=SECONDS" in message
            assert ("still after 0.3 s" in message) == bool(wait) and capsys.readouterr().err.count("\n") == said
    assert f"process {holder.pid} " in layout.lock.read_text()  # killed: the text stayed, the lock did not
    with writer_lock(layout):
        assert layout.lock.read_text().startswith(f"process {os.getpid()} on ")
