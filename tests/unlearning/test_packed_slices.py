"""The packed file of a published state: always there, the bits of the checkpoints, and nothing of an erased record."""

import contextlib
import os

import jax
import numpy as np
import pytest
from helpers import small_run

from lmeraser_jax.errors import Damaged
from lmeraser_jax.evaluation.predict import load_model
from lmeraser_jax.storage import packed
from lmeraser_jax.unlearning import artifacts, doctor, erase
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.doctor import State
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.verify import verify_all

pytestmark = pytest.mark.usefixtures("fast")


def packed_path(run):
    (path,) = run.layout.packed.iterdir()
    assert path == run.layout.packed_slices(run.catalog.manifest().entries)
    return path


def arrays_of(model):
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.tree.map(np.asarray, model.arrays))]


@contextlib.contextmanager
def unreadable_checkpoints(run):
    """While readers must do with the packed file."""
    os.rename(run.layout.slices, run.layout.root / "away")
    yield
    os.rename(run.layout.root / "away", run.layout.slices)


def test_a_model_of_packed_slices_has_the_bits_of_the_checkpoints(fast_workdir):
    with small_run(fast_workdir) as run:
        path = packed_path(run)
        with unreadable_checkpoints(run):
            mapped = arrays_of(load_model(run))
        path.rename(path.with_name(".away"))
        assert arrays_of(load_model(run)) == mapped
        with pytest.raises(Damaged), unreadable_checkpoints(run):
            load_model(run)


def test_an_erasure_leaves_no_bit_of_its_slices_and_packs_the_new_ones(fast_workdir):
    with small_run(fast_workdir) as run:
        before = run.catalog.manifest()
        old, path = {ref: load_slice(run, ref) for ref in before.entries.values()}, packed_path(run)
        member = run.catalog.live("train").ids[0]
        held = path.open("rb")  # a reader that has the old file mapped must not keep it in the folder
        erase.request_erasure(run, [member])
        held.close()
        new = packed_path(run)
        refs = set(run.catalog.manifest().entries.values())
        assert new != path and packed.references(run.layout.packed) == refs
        assert leftovers(run) == [] and all(verdict.ok for verdict in verify_all(run.layout, run.catalog))
        for ref in set(old) - refs:
            needle = np.asarray(old[ref].kernel).tobytes()
            assert not [file for file in run.layout.root.rglob("*") if file.is_file() and needle in file.read_bytes()]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "of another state"])
def test_damage_is_told_harms_no_answer_and_is_mended(fast_workdir, damage):
    with small_run(fast_workdir) as run:
        path, sound = packed_path(run), arrays_of(load_model(run))
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 8
        if damage == "missing":
            path.unlink()
        elif damage == "of another state":
            packed.write(path, {"x": {"w": np.ones(3, np.float32)}})
        else:
            path.write_bytes(raw if damage == "flipped" else raw[:-100])
        assert arrays_of(load_model(run)) == sound
        fault = artifacts.packed_fault(run, run.catalog.manifest().entries)
        assert str(path) in fault
    (problem,) = doctor.examine(fast_workdir, devices=jax.devices()[:1]).problems
    assert problem.component == "packed" and problem.message == fault
    assert problem.state == (State.NOTE if damage == "missing" else State.DAMAGED)
    with small_run(fast_workdir) as run:
        build(run)  # as every command that publishes
        assert artifacts.packed_fault(run, run.catalog.manifest().entries) == "" and packed_path(run) == path
        path.unlink()
    assert [each.state for each in doctor.examine(fast_workdir, True, jax.devices()[:1]).problems] == [State.FIXED]
    assert path.exists()


def test_packing_reads_only_the_checkpoints_that_are_new(fast_workdir, monkeypatch):
    with small_run(fast_workdir) as run:
        before, loaded = set(run.catalog.manifest().entries.values()), []
        load = artifacts._load_arrays
        monkeypatch.setattr(artifacts, "_load_arrays", lambda run, ref: loaded.append(ref) or load(run, ref))
        erase.request_erasure(run, [run.catalog.live("train").ids[0]])
        after = set(run.catalog.manifest().entries.values())
        assert set(loaded) == after - before and before & after


def test_what_a_killed_writer_left_is_written_over_and_never_read(fast_workdir):
    """A file that is mapped while it is written over would end the process (SIGBUS)."""
    with small_run(fast_workdir) as run:
        path = packed_path(run)
        left, whole = path.with_name(f".{path.name}.tmp"), path.read_bytes()
        path.rename(left)
        artifacts.pack(run, run.catalog.manifest().entries)
        assert path.read_bytes() == whole and not left.exists()
