"""SIGTERM: a long command ends between two calls, keeps what is finished, publishes nothing and exits with 0."""

import contextlib
import dataclasses
import functools
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
from lmeraser_jax.storage import checkpoints, ingest
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.training import tune
from lmeraser_jax.training.tune import mesh_of
from lmeraser_jax.unlearning import build as build_module
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.purge import leftovers


def ask() -> None:
    """What `kill` does to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_train_that_is_asked_to_stop_keeps_what_its_calls_have_finished(tmp_path, monkeypatch):
    config = small_config(tuning__scan_steps=1)
    with small_run(tmp_path / "wanted", config=config) as run:
        build(run)
        wanted = state(run)
    keep, compiled, saved, handed = build_module._keep, tune.compiled, [], []

    def keep_and_ask(*args):
        saved.append(keep(*args))
        ask()

    def counting(problem, mesh):
        def program(*inputs):
            handed.append(int((np.asarray(inputs[5].slot) < problem.slots).sum()))
            return compiled(problem, mesh)(*inputs)

        return program

    with small_run(tmp_path / "run", config=config) as run:
        with monkeypatch.context() as patch, pytest.raises(interrupt.Stopped), interrupt.handle_sigterm():
            patch.setattr(build_module, "_keep", keep_and_ask)
            patch.setattr(tune, "compiled", counting)
            build(run)
        assert run.catalog.manifest() is None
        assert 0 < sum(handed) == len(saved) == len(run.catalog.slices()) < len(wanted["slices"])
        assert {path.name for path in run.layout.slices.iterdir()} == set(run.catalog.slices())
    with small_run(tmp_path / "run", config=config) as run:
        assert build(run).reused == len(saved)
        assert differences(state(run), wanted) == [] and leftovers(run) == []


def test_nobody_looks_during_the_publish_and_the_purge(tmp_path, monkeypatch):
    publish = Catalog.publish

    def ask_and_publish(*args):
        ask()
        return publish(*args)

    monkeypatch.setattr(Catalog, "publish", ask_and_publish)
    with interrupt.handle_sigterm(), small_run(tmp_path / "run") as run:
        assert build(run).published and leftovers(run) == []
        assert interrupt.stop_requested()
    assert not interrupt.stop_requested(), "the next command of this process was not asked"


def test_an_import_and_the_features_stop_between_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "PIECE", 64)
    whole, reads = small_source(), []

    def read(start, stop):
        reads.append(start)
        ask()
        return whole.read(start, stop)

    source = dataclasses.replace(whole, read=read)
    with interrupt.handle_sigterm(), pytest.raises(interrupt.Stopped), small_run(tmp_path / "run", source):
        pass
    assert reads == [0]
    with small_run(tmp_path / "run") as run, interrupt.handle_sigterm():
        records = run.catalog.live("train")
        ask()
        with pytest.raises(interrupt.Stopped):
            run.features(records)


def test_pretraining_writes_a_checkpoint_first(tmp_path, monkeypatch):
    config = small_config(pretraining__epochs=4, pretraining__checkpoint_epochs=100, pretraining__batch=16)
    source, mesh = small_source(), mesh_of(jax.devices()[:1])
    rows = [i for i, item in enumerate(source.items) if item.split == "public"]
    images, labels = source.read(0, len(source.items)).images[rows], np.array([source.items[i].label for i in rows])
    real, began = pretrain._epoch_rows, []
    function, tx = pretrain._epoch_function, pretrain.optimizer(config, 12)
    compiled = functools.lru_cache(lambda vit, spec, mesh: function(vit, spec, tx, mesh))
    monkeypatch.setattr(pretrain, "_epoch_function", lambda vit, spec, _, mesh: compiled(vit, spec, mesh))

    def epoch_rows(seed, epoch, *rest):
        began.append(epoch)
        if len(began) == 2:
            ask()
        return real(seed, epoch, *rest)

    monkeypatch.setattr(pretrain, "_epoch_rows", epoch_rows)
    with interrupt.handle_sigterm(), pytest.raises(interrupt.Stopped):
        pretrain.pretrain(Layout(tmp_path / "run"), images, labels, 10, config, mesh)
    assert checkpoints.load(Layout(tmp_path / "run").pretraining)[2] == 2
    resumed, _ = pretrain.pretrain(Layout(tmp_path / "run"), images, labels, 10, config, mesh)
    assert began == [0, 1, 2, 3]
    whole, _ = pretrain.pretrain(Layout(tmp_path / "whole"), images, labels, 10, config, mesh)
    assert resumed.digest == whole.digest


def test_waiting_for_another_writer_ends_too(tmp_path):
    layout = Layout(tmp_path / "run")
    with writer_lock(layout), interrupt.handle_sigterm():
        threading.Timer(0.2, ask).start()
        with pytest.raises(interrupt.Stopped), writer_lock(layout, wait=60):
            pass


def test_outside_the_main_thread_nothing_is_installed():
    found = []

    def work():
        with interrupt.handle_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_main_says_how_to_resume_and_exits_with_0(monkeypatch, capsys, tmp_path):
    flags = ["rollback", f"--workdir={tmp_path}/a b", "--cluster=f00d"]
    monkeypatch.setattr("lmeraser_jax.cli.rollback.run", lambda _: (ask(), interrupt.raise_if_stopped()))
    assert command.main(flags) == 0
    assert capsys.readouterr().err == f"stopped as asked; resume with: lmeraser {shlex.join(flags)}\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_train_killed_by_sigterm_is_resumed_by_the_line_that_it_prints(tmp_path):
    pytest.importorskip("ml_collections", reason="the command line needs ml_collections")
    flags = [f"--config.{group}.{name}={value}" for group, values in SMALL.items() for name, value in values.items()]
    flags += ["--config.tuning.scan_steps=1", "--config.tuning.epochs=20", f"--workdir={tmp_path / 'run'}"]
    flags += ["--config.data.train_limit=100", "--config.data.test_limit=20"]
    start = [sys.executable, "-m", "lmeraser_jax.cli.main", "train"]
    process = subprocess.Popen([*start, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    layout = Layout(tmp_path / "run")
    while process.poll() is None and not (layout.slices.is_dir() and list(layout.slices.iterdir())):
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("stopped as asked; resume with: lmeraser ")]
    with writer_lock(layout), contextlib.closing(Catalog(layout.catalog)) as catalog:
        kept = len(catalog.slices())
        assert catalog.manifest() is None and kept > 0
    again = [*start[:3], *shlex.split(line.partition("lmeraser ")[2])]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"reused {kept}:" in done.stdout, (done.stdout, done.stderr)
