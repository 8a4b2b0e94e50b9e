"""Two processes on one workdir: one writes, and readers see one published state, whatever is purged meanwhile."""

import shutil

import pytest

from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import overview as overview_module
from lmeraser_jax.storage import atomic_files
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.run import open_run


def overview(run):
    return overview_module.overview(run.layout, run.catalog, run.config)


def erase_sampled(run) -> None:
    """Publishes another clustering and purges the present one."""
    sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
    erase.request_erasure(run, [sample[0]])


def test_a_clustering_that_is_purged_while_it_is_read_is_looked_up_again(fast_workdir, monkeypatch):
    reads, real = [], overview_module.load_clustering
    with open_run(fast_workdir, write=True) as writer, open_run(fast_workdir) as reader:
        before = overview(reader)

        def purged_before(layout, name):
            reads.append(name)
            if len(reads) == 1:
                erase_sampled(writer)
            return real(layout, name)

        monkeypatch.setattr(overview_module, "load_clustering", purged_before)
        after = overview(reader)
        assert len(reads) == 2 and reads[0] != reads[1]
        assert after.version == before.version + 1 and after.records["train"] == before.records["train"] - 1
        assert sum(row.members for row in after.clusters) == after.records["train"]


def test_a_state_that_is_always_replaced_and_a_damaged_one_end(fast_workdir, monkeypatch):
    with open_run(fast_workdir, write=True) as writer, open_run(fast_workdir) as reader:
        with monkeypatch.context() as patch:
            real = overview_module.load_clustering
            patch.setattr(overview_module, "load_clustering", lambda *place: (erase_sampled(writer), real(*place))[1])
            patch.setattr(overview_module, "ATTEMPTS", 3)
            with pytest.raises(UserError, match="cannot be read"):
                overview(reader)
        shutil.rmtree(reader.layout.clusterings)
        with pytest.raises(UserError, match="cannot be read.*clustering.npz.*lmeraser train"):
            overview(reader)


def test_files_that_vanish_while_they_are_counted(tmp_path, monkeypatch):
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "there").write_bytes(b"12345")
    walked = [(str(tmp_path / "slices"), [], ["there", "gone"]), (str(tmp_path / "gone"), [], ["gone"])]
    monkeypatch.setattr(atomic_files.os, "walk", lambda path, onerror: iter(walked))
    assert atomic_files.disk_use(tmp_path) == 5
