"""SIGTERM: a long command ends between two calls, keeps what is finished, publishes nothing and exits with 0."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from helpers import SMALL, small_config, small_run, small_source

from lmeraser_jax import interrupt
from lmeraser_jax.cli import main as command
from lmeraser_jax.models import pretrain
from lmeraser_jax.models.pretrain import PublicSet
from lmeraser_jax.storage import checkpoints, ingest
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.purge import leftovers

RESUME = "stopped as asked; resume with: lmeraser "


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def sigterm_before(patch, owner, name: str, call: int) -> list:
    """Sends SIGTERM at the start of the so many-th call of a function; returns the list that its calls join."""
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            send_sigterm()
        return function(*args, **kwargs)

    patch.setattr(owner, name, wrapper)
    return calls


def test_a_stopped_build_keeps_its_finished_slices_and_resumes_with_the_same_bits(tmp_path, monkeypatch):
    config = small_config(tuning__scan_steps=1)
    with small_run(tmp_path / "whole", config=config) as run:
        build(run)
        expected = state(run)
    with small_run(tmp_path / "run", config=config) as run:
        with monkeypatch.context() as patch, pytest.raises(interrupt.Stopped), interrupt.handle_sigterm():
            saved = sigterm_before(patch, Catalog, "add_slice", call=1)
            build(run)
        assert run.catalog.manifest() is None
        assert 0 < len(saved) == len(run.catalog.slices()) < len(expected["slices"])
        assert {path.name for path in run.layout.slices.iterdir()} == set(run.catalog.slices())
    with small_run(tmp_path / "run", config=config) as run:
        assert build(run).reused == len(saved)
        assert differences(state(run), expected) == [] and leftovers(run) == []


def test_the_publish_and_the_purge_are_finished(tmp_path, monkeypatch):
    sigterm_before(monkeypatch, Catalog, "publish", call=1)
    with interrupt.handle_sigterm(), small_run(tmp_path / "run") as run:
        assert build(run).published and leftovers(run) == []
        assert interrupt.stop_requested()
    assert not interrupt.stop_requested(), "the next command of this process was not told to stop"


def test_an_import_and_the_features_stop_between_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "PIECE", 64)
    whole, reads = small_source(), []

    def read(positions):
        reads.append(positions[0])
        send_sigterm()
        return whole.read(positions)

    source = dataclasses.replace(whole, read=read)
    with interrupt.handle_sigterm(), pytest.raises(interrupt.Stopped), small_run(tmp_path / "run", source):
        pass
    assert reads == [0]
    with small_run(tmp_path / "run") as run, interrupt.handle_sigterm():
        records = run.catalog.live("train")
        send_sigterm()
        with pytest.raises(interrupt.Stopped):
            run.features(records)


def test_pretraining_writes_a_checkpoint_first(tmp_path, monkeypatch):
    config = small_config(pretraining__epochs=4, pretraining__checkpoint_epochs=100, pretraining__batch=16)
    source, mesh = small_source(), mesh_of(jax.devices()[:1])
    rows = [i for i, item in enumerate(source.items) if item.split == "public"]
    labels = np.array([source.items[i].label for i in rows], np.int32)
    public = PublicSet(source.read(range(len(source.items))).rows[rows], labels, 10)
    folder = Layout(tmp_path / "run").pretraining
    epochs = sigterm_before(monkeypatch, pretrain, "_epoch_rows", call=2)
    with interrupt.handle_sigterm(), pytest.raises(interrupt.Stopped):
        pretrain.pretrain(folder, public, config, mesh)
    assert checkpoints.load(folder)[2] == 2
    pretrain.pretrain(folder, public, config, mesh)
    assert [epoch for _, epoch, *_ in epochs] == [0, 1, 2, 3], "it resumes there"


def test_waiting_for_another_writer_ends_too(tmp_path):
    layout = Layout(tmp_path / "run")
    with writer_lock(layout), interrupt.handle_sigterm():
        threading.Timer(0.2, send_sigterm).start()
        with pytest.raises(interrupt.Stopped), writer_lock(layout, wait=60):
            pass


def test_outside_the_main_thread_nothing_is_installed():
    handlers = []

    def work():
        with interrupt.handle_sigterm():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


def test_main_says_how_to_resume_and_exits_with_0(monkeypatch, capsys, tmp_path):
    flags = ["rollback", f"--workdir={tmp_path}/a b", "--cluster", "f00d"]
    monkeypatch.setattr("lmeraser_jax.cli.rollback.run", lambda _: (send_sigterm(), interrupt.raise_if_stopped()))
    assert command.main(flags) == 0
    assert capsys.readouterr().err == f"{RESUME}{shlex.join(flags)}\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_ctrl_c_ends_with_a_line_and_130():
    code = """
import atexit, os, signal, sys
from lmeraser_jax.cli import keys, main
def ctrl_c(*_): os.kill(os.getpid(), signal.SIGINT)
atexit.register(ctrl_c)
keys.run, sys.argv = ctrl_c, ["lmeraser", "keys"]
sys.exit(main.console())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.splitlines() == [command.RESUMES] * 2, done.stderr


@pytest.mark.slow
def test_a_train_killed_by_sigterm_is_resumed_by_the_line_that_it_prints(tmp_path):
    flags = [f"--config.{group}.{name}={value}" for group, values in SMALL.items() for name, value in values.items()]
    flags += ["--config.tuning.scan_steps=1", "--config.tuning.epochs=20", f"--workdir={tmp_path / 'run'}"]
    flags += ["--config.data.train_limit=100", "--config.data.test_limit=20"]
    start = [sys.executable, "-m", "lmeraser_jax.cli.main"]
    process = subprocess.Popen([*start, "train", *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    layout = Layout(tmp_path / "run")
    while process.poll() is None and not (layout.slices.is_dir() and list(layout.slices.iterdir())):
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith(RESUME)]
    with writer_lock(layout), contextlib.closing(Catalog(layout.catalog)) as catalog:
        finished = len(catalog.slices())
        assert catalog.manifest() is None and finished > 0
    again = [*start, *shlex.split(line.removeprefix(RESUME))]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"reused {finished}:" in done.stdout, (done.stdout, done.stderr)
