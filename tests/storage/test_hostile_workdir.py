"""The workdir belongs to its user alone, nothing is written through a link, and the lock survives any content."""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import small_config, small_run
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import workdir as layouts
from lmeraser_jax.storage.atomic_files import remove_others
from lmeraser_jax.storage.workdir import Layout, read_config, refuse_links, writer_lock
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run


@contextlib.contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
        assert os.umask(mask) == mask  # nothing left another one behind
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir that was trained and erased from under a umask of 0, and the modes while its catalog was open."""
    root = tmp_path_factory.mktemp("open") / "runs" / "trained"
    with umask(0), small_run(root, config=small_config(tuning__epochs=1)) as run:
        build(run)
        while_open = modes(root)
        erase.request_erasure(run, [run.catalog.live("train").ids[0]])
    return root, while_open


def modes(root: Path) -> dict[str, int]:
    found = {".": stat.S_IMODE(root.stat().st_mode)}
    return found | {str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode) for path in root.rglob("*")}


# modes
def test_every_file_is_private(trained):
    root, while_open = trained
    assert {"catalog.db-wal", "catalog.db-shm"} <= while_open.keys()
    for found in (while_open, modes(root)):
        assert {"catalog.db", "lock", "config.json", "metrics.jsonl", "records/images.u8", "slices"} <= found.keys()
        assert any(name.startswith("records/features-") for name in found)
        assert sum(name.startswith("slices/") for name in found) > 50
        open_to_others = {name: oct(mode) for name, mode in found.items() if mode & 0o077}
        assert open_to_others == {}
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o777  # the user's own umask decides there


def test_the_umask_comes_back(tmp_path):
    for mask in (0, 0o022, 0o077):
        with umask(mask):
            with writer_lock(Layout(tmp_path / "w")):
                (tmp_path / "w" / f"inside{mask}").touch()
            with pytest.raises(RuntimeError), writer_lock(Layout(tmp_path / "w")):
                raise RuntimeError
            (tmp_path / f"outside{mask}").touch()
            assert stat.S_IMODE((tmp_path / f"outside{mask}").stat().st_mode) == 0o666 & ~mask
            assert stat.S_IMODE((tmp_path / "w" / f"inside{mask}").stat().st_mode) == 0o600


def test_an_open_root_is_closed(tmp_path):
    for make in (
        lambda layout: layout.prepare(),
        lambda layout: contextlib.ExitStack().enter_context(writer_lock(layout)),
    ):
        with umask(0):
            tmp_path.chmod(0o777)
            make(Layout(tmp_path))
            assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


# links
FILES = ("catalog.db", "config.json", "lock", "metrics.jsonl", "clusters.png", "catalog.db-wal")
FOLDERS = ("records", "slices", "clusterings", "receipts", "backbone", "scratch", "pretraining")
DEEPER = ("records/images.u8", "records/features-0123.f32", "slices/abc", "clusterings/abc", "slices/.abc.tmp")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, *DEEPER])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_links_are_refused(tmp_path, name, kind):
    outside, layout = tmp_path / "outside", Layout(tmp_path / "run")
    (outside / "folder" / "deep").mkdir(parents=True)
    for canary in (outside / "file", outside / "folder" / "images.u8", outside / "folder" / "deep" / "file"):
        canary.write_bytes(b"alive")
    before = content(outside)
    link = layout.root / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / kind)
    with pytest.raises(UserError, match="holds symbolic links") as caught, writer_lock(layout):
        pytest.fail("it writes")
    assert f"'{name}'" in str(caught.value) and content(outside) == before and link.is_symlink()
    assert sorted(os.listdir(outside)) == ["file", "folder"]


@pytest.mark.parametrize(
    "name", ["catalog.db", "records", "records/images.u8", "slices", "slices/{slice}", "backbone", "lock"]
)
def test_no_command_writes_through_a_link(trained, tmp_path, name):
    """A whole trained workdir with one entry moved outside and linked back: erasing is refused, reading is not."""
    root = tmp_path / "run"
    shutil.copytree(trained[0], root)
    name = name.format(slice=next((root / "slices").iterdir()).name)
    (root / name).rename(tmp_path / "canary")
    (root / name).symlink_to(tmp_path / "canary")
    canary = tmp_path / "canary"
    before = content(canary) if canary.is_dir() else canary.read_bytes()
    for command in (
        lambda: open_run(root, write=True),
        lambda: small_run(root, config=small_config(tuning__epochs=1)),
    ):
        with pytest.raises(UserError, match=f"holds symbolic links.*{name}"), command():
            pytest.fail("it writes")
    assert (content(canary) if canary.is_dir() else canary.read_bytes()) == before
    with open_run(root) as run:
        assert len(run.catalog.live("train"))


def test_a_linked_root_is_fine(trained, tmp_path):
    (tmp_path / "link").symlink_to(trained[0])
    with open_run(tmp_path / "link") as run, open_run(tmp_path / "link", write=True):
        refuse_links(run.layout)


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
        assert holder.stdout is not None and holder.stdin is not None and holder.stdout.readline() == "held\n"
        try:
            yield holder, lambda: holder.stdin.close()
        finally:
            holder.kill()


GARBAGE = [b"", b"\xff\xfe\0", b"\x1b[2J", b"x" * 1_000_000, b"process 1 on a\nb", "process ١ on ü".encode()]


def test_garbage_in_the_lock_file(tmp_path):
    """It is shown only where it is what a writer wrote; a free lock is taken whatever it says."""
    layout = Layout(tmp_path)
    for raw in GARBAGE:
        layout.lock.write_bytes(raw)
        with writer_lock(layout):
            assert layout.lock.read_text().startswith(f"process {os.getpid()} on ")
            layout.lock.write_bytes(raw)
            with pytest.raises(UserError, match="is being written by ") as caught, writer_lock(layout):
                pytest.fail("two writers")
            assert str(caught.value).isprintable() and len(str(caught.value)) < 400
        assert layout.lock.read_bytes() == b""


def test_a_folder_in_place_of_the_lock(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="lock must be a file"), writer_lock(Layout(tmp_path)):
        pass


def test_waiting_gets_the_lock(tmp_path, capsys):
    """Said once, then taken as soon as the other process is done, long before the time is over."""
    with held(tmp_path) as (holder, release):
        timer = threading.Timer(0.5, release)
        timer.start()
        start = time.monotonic()
        with writer_lock(Layout(tmp_path), wait=60):
            assert 0.3 < time.monotonic() - start < 30
            assert Layout(tmp_path).lock.read_text().startswith(f"process {os.getpid()} on ")
        timer.join()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"process {holder.pid} on " in err and "60 s at most" in err


def test_waiting_ends(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layouts, "POLL", 0.01)
    with held(tmp_path) as (holder, _):
        for wait, said in ((0, 0), (0.3, 1)):
            start = time.monotonic()
            with pytest.raises(UserError) as caught, writer_lock(Layout(tmp_path), wait=wait):
                pytest.fail("two writers")
            assert wait <= time.monotonic() - start < wait + 10
            message = str(caught.value)
            assert f"process {holder.pid} on " in message and "--wait=SECONDS" in message
            assert ("still after 0.3 s" in message) == bool(wait) and capsys.readouterr().err.count("\n") == said
    with writer_lock(Layout(tmp_path)):  # killed: the text stayed, the lock did not
        pass


# config.json
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(st.binary(max_size=60) | JSON.map(lambda tree: repr(tree).encode(errors="replace")))
def test_any_config_file(tmp_path, raw):
    layout = Layout(tmp_path)
    layout.config.write_bytes(raw)
    with contextlib.suppress(UserError):
        assert isinstance(read_config(layout), dict)


@pytest.mark.parametrize(
    "raw", [b"null", b"[1]", b"3", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'{"a": "\xff"}', b" " * (2 << 20)]
)
def test_hostile_config_files(tmp_path, raw):
    layout = Layout(tmp_path)
    layout.config.write_bytes(raw)
    with pytest.raises(UserError, match="config.json is damaged") as caught:
        read_config(layout)
    assert len(str(caught.value)) < 1000
