"""Many processes on JAX's runtime: the bits of one, one line when a process is lost, nothing left by a late one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from text_problem import experiment, text_config, text_folder, text_run
from tuning_problem import GROUPS, same_bits, small_backbone, small_data, small_spec

from lmeraser_jax.interrupt import Stopped
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.training import multihost, tune, waves
from lmeraser_jax.training.jobs import make_job
from lmeraser_jax.training.multihost import Processes
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.erase import request_erasure

CONFIG = """
from lmeraser_jax.config import default_config

def get_config():
    config = default_config()
    config.data.train_limit, config.data.test_limit = 90, 10
    config.pretraining.epochs = 0
    config.clustering.sample_size, config.clustering.cut = 40, "auto:12"  # two waves of two processes
    config.clustering.max_members, config.clustering.min_members = 4, 1
    config.tuning.epochs, config.tuning.min_steps, config.tuning.scan_steps = EPOCHS, 8, 4
    return config
"""


# ---- without processes: what is sent, and how a wave is shared


def test_a_message_arrives_as_it_was_sent(rng):
    arrays = {
        "a/b": rng.standard_normal((3, 2)),
        "rows": np.arange(5, dtype=np.int32),
        "none": np.zeros((0, 4), np.float32),
    }
    for extra in (0, 1, 1000):
        sent = multihost._padded(multihost._pack(arrays), 2000 + extra)
        received = multihost._unpack(sent)
        assert received.keys() == arrays.keys()
        assert all(np.array_equal(received[name], arrays[name]) for name in arrays)
        assert {name: leaf.dtype for name, leaf in received.items()} == {n: leaf.dtype for n, leaf in arrays.items()}
    assert len({len(multihost._padded(multihost._pack(arrays), size)) for size in range(2100, 3000, 100)}) == 1


class Together:
    """The collectives of so many processes that are threads here: each gets what all have passed."""

    def __init__(self, count: int):
        self.barrier, self.values = threading.Barrier(count), {}

    def exchange(self, index: int, arrays) -> list:
        self.values[index] = arrays
        self.barrier.wait(60)
        results = [self.values[i] for i in sorted(self.values)]
        self.barrier.wait(60)
        return results


def share(monkeypatch, count: int, tune_own) -> list[list]:
    """Every thread's results of one wave over the small problem's clusters; a thread that stopped has None last."""
    together, local, spec = Together(count), threading.local(), small_spec()
    monkeypatch.setattr(multihost, "exchange", lambda arrays: together.exchange(local.index, arrays))
    wave = [make_job(key, rows, spec.tuning) for key, rows in GROUPS.items()]
    shares = [list(range(len(wave)))[index::count] for index in range(count)]
    results: list[list] = [[] for _ in range(count)]

    def work(index: int) -> None:
        local.index = index
        try:
            for tuned in waves.do_share(Processes(index, count), shares, spec, wave, lambda jobs: tune_own(spec, jobs)):
                results[index].append(tuned)
        except Stopped:
            results[index].append(None)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def tune_really(spec, jobs):
    mesh = mesh_of(jax.devices()[:1])
    return tune.make_slices(spec, small_backbone(), jobs, *small_data(), mesh)


def test_every_process_gets_the_slices_of_all_with_the_bits_of_one(monkeypatch):
    alone, shared = share(monkeypatch, 1, tune_really)[0], share(monkeypatch, 2, tune_really)
    by_key = {tuned.job.key: tuned for tuned in alone}
    for results in shared:
        assert sorted(tuned.job.key for tuned in results) == sorted(GROUPS)
        assert all(same_bits(tuned.slice, by_key[tuned.job.key].slice) for tuned in results)
        assert all(
            (tuned.step, tuned.loss) == (by_key[tuned.job.key].step, by_key[tuned.job.key].loss) for tuned in results
        )


def test_a_process_that_is_asked_to_stop_stops_all_and_loses_nothing_that_is_finished(monkeypatch):
    def stopping(spec, jobs):
        for position, tuned in enumerate(tune_really(spec, jobs)):
            if position == 1 and jobs[0].key == "c0":
                raise Stopped
            yield tuned

    for results in share(monkeypatch, 2, stopping):
        assert results[-1] is None and len(results) == 1 + 3 + 1, "its first, the three of the other, the end"


def test_jobs_are_rebuilt_as_they_were_sent(monkeypatch):
    sent, spec = {}, small_spec()

    def broadcast(task, arrays):
        sent.update(task=task, arrays=arrays)

    monkeypatch.setattr(multihost, "broadcast", broadcast)
    monkeypatch.setattr(waves, "do_share", lambda *_: iter(()))
    jobs = [make_job(key, rows, spec.tuning) for key, rows in GROUPS.items()]
    labels = small_data()[1]
    assert list(waves.make_slices(Processes(0, 2), {"workdir": "w"}, spec, jobs, labels, lambda _: iter(()))) == []
    received = {job.key: job for job in waves.jobs_of(sent["task"], sent["arrays"]["rows"])}
    for job in jobs:
        other = received[job.key]
        assert np.array_equal(other.rows, job.rows)
        assert (other.epochs, other.batch, other.snapshots) == (job.epochs, job.batch, job.snapshots)
    assert np.array_equal(sent["arrays"]["labels"], labels[sent["arrays"]["rows"]])
    assert sorted(position for own in sent["task"]["shares"] for position in own) == list(range(len(jobs)))


# ---- with processes


def start(
    folder: Path, name: str, *arguments: str, count: int = 1, epochs: int = 3, experiment: str = CONFIG
) -> list[subprocess.Popen]:
    """Starts a command of `lmeraser` on the workdir `folder/run` in so many processes, each with one CPU device."""
    config = folder / "experiment.py"
    config.write_text(experiment.replace("EPOCHS", str(epochs)))
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lmeraser_jax.cli.main", name, f"--workdir={folder}/run", *arguments]
    if name == "train":
        command.append(f"--config={config}")
    place = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    own = [[*place, f"--process_id={index}"] if count > 1 else [] for index in range(count)]
    return [subprocess.Popen([*command, *flags], env=environment, **pipes) for flags in own]


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of every process."""
    ends = []
    for process in processes:
        out, error = process.communicate(timeout=seconds)
        ends.append((process.returncode, out, error))
    return ends


def published(folder: Path) -> dict[str, str]:
    """{cluster key: digest of its slice's parameters} of the published state."""
    with contextlib.closing(Catalog(folder / "run" / "catalog.db")) as catalog:
        manifest, slices = catalog.manifest(), catalog.slices()
        assert manifest is not None
        return {key: slices[ref].params_digest for key, ref in manifest.entries.items()}


def written(folder: Path) -> int:
    """Slices on disk."""
    return len(list((folder / "run" / "slices").glob("[0-9a-f]*")))


def start_until_a_slice_is_written(folder: Path) -> list[subprocess.Popen]:
    """Two processes that train for long, and have written a slice."""
    processes = start(folder, "train", count=2, epochs=400)
    deadline = time.monotonic() + 120
    while not written(folder):
        assert time.monotonic() < deadline, "no slice was written in time"
        time.sleep(0.05)
    return processes


def first_record(folder: Path) -> str:
    with contextlib.closing(Catalog(folder / "run" / "catalog.db")) as catalog:
        return catalog.live("train").ids[0]


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Time and size of every file of the workdir, but SQLite's own beside the catalog."""
    paths = [path for path in (folder / "run").rglob("*") if "catalog.db-" not in path.name]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Trained, and one record erased, by one process: (published state after each, the record)."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish(start(folder, "train"))[0][0] == 0
    trained, record = published(folder), first_record(folder)
    assert finish(start(folder, "unlearn", f"--records={record}"))[0][0] == 0
    return trained, published(folder), record


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_bits_of_one(tmp_path, alone, count):
    trained, erased, record = alone
    ends = finish(start(tmp_path, "train", count=count))
    assert [code for code, _, _ in ends] == [0] * count, ends
    assert published(tmp_path) == trained
    assert all(not out for _, out, _ in ends[1:]), "process 0 speaks for all"
    ends = finish(start(tmp_path, "unlearn", f"--records={record}", count=count))
    assert [code for code, _, _ in ends] == [0] * count, ends
    assert published(tmp_path) == erased


@pytest.mark.slow
def test_two_processes_tune_adapters_of_a_language_model_with_the_bits_of_one(tmp_path):
    """Each computes the states below the adapted block anew for the rows that it tunes on."""
    config, states = text_config(text_folder(tmp_path), tuning__lora_layers=1), []
    for command in (["train"], ["unlearn", "--owner=person-2"]):
        ends = finish(start(tmp_path, *command, count=2, experiment=experiment(config)))
        assert [code for code, _, _ in ends] == [0, 0], ends
        states.append(published(tmp_path))
    (tmp_path / "alone").mkdir()
    with text_run(tmp_path / "alone" / "run", config) as (run, _):
        for change in (build, lambda run: request_erasure(run, owners=["person-2"])):
            change(run)
            assert published(tmp_path / "alone") == states.pop(0) and len(run.catalog.manifest().entries) > 3


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_fails_the_job_in_seconds_and_the_next_start_reuses_what_is_written(tmp_path, victim):
    processes = start_until_a_slice_is_written(tmp_path)
    processes[victim].kill()
    begun = time.monotonic()
    ends = finish(processes, seconds=60)
    assert time.monotonic() - begun < 30
    code, _, error = ends[1 - victim]
    assert code != 0
    if victim == 1:
        assert code == 2 and "was lost" in error and "start the same command again" in error.splitlines()[-1]
    before = written(tmp_path)
    ((code, out, _),) = finish(start(tmp_path, "train", "--json=-", epochs=400))
    report = json.loads(out)
    assert code == 0 and report["reused"] >= before > 0 and report["clusters"] == report["reused"] + report["retuned"]


@pytest.mark.slow
def test_sigterm_ends_every_process_with_0_after_its_wave_and_the_next_start_goes_on(tmp_path):
    processes = start_until_a_slice_is_written(tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes, seconds=120)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "resume with: lmeraser train" in ends[0][2] and "process_id" not in ends[0][2].splitlines()[-1]
    assert written(tmp_path) > 0
    ends = finish(start(tmp_path, "train", count=2, epochs=400))
    assert [code for code, _, _ in ends] == [0, 0], ends


@pytest.mark.slow
def test_a_process_that_slept_through_an_erasure_leaves_no_byte_behind(tmp_path):
    processes = start_until_a_slice_is_written(tmp_path)
    sleeper = processes[1]
    sleeper.send_signal(signal.SIGSTOP)
    ((code, _, error),) = finish(processes[:1], seconds=60)
    assert code == 2 and "process 1 of 2 was lost" in error
    assert finish(start(tmp_path, "train", epochs=400))[0][0] == 0
    assert finish(start(tmp_path, "unlearn", f"--records={first_record(tmp_path)}"))[0][0] == 0
    before = files(tmp_path)
    sleeper.send_signal(signal.SIGCONT)
    assert finish([sleeper], seconds=60)[0][0] != 0
    assert files(tmp_path) == before


@pytest.mark.slow
def test_sigterm_ends_a_process_that_waits_for_the_others(tmp_path):
    processes = start(tmp_path, "train", count=2)
    processes[0].kill()
    finish(processes[:1])
    time.sleep(8)
    processes[1].send_signal(signal.SIGTERM)
    ((code, _, _),) = finish(processes[1:], seconds=20)
    assert code != 0
