"""The clustering samples a public set and prompts begin with it: no erasure reaches them, and the set is read once."""

import collections
import shutil

import numpy as np
import pytest
from helpers import small_config, small_run, small_source

from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.overview import overview
from lmeraser_jax.models import public_sets
from lmeraser_jax.unlearning import doctor, erase
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import audit, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run

pytestmark = pytest.mark.usefixtures("fast_files")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """An .npz of 60 grey images with private ids, the first five of which are private and test images too."""
    source, file = small_source(), tmp_path_factory.mktemp("public") / "public.npz"
    positions = [i for i, item in enumerate(source.items) if item.split == "train"]
    twins = positions[:4] + [i for i, item in enumerate(source.items) if item.split == "test"][:1]
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1)).astype(np.uint8)
    images[:5] = source.read(range(len(source.items))).rows[sorted(twins)]
    ids = [source.items[i].id for i in positions[:60]]
    np.savez(file, train_images=images, train_labels=np.arange(60) % 3, train_ids=ids)
    return file


def config_with(public, **overrides):
    chosen = {"clustering__sample_from": "public", "public__source": "npz", "public__path": str(public)}
    chosen["tuning__start"] = "public"
    return small_config(**chosen | overrides)


@pytest.fixture(scope="module")
def template(fast_files, public, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "run"
    with small_run(folder, config=config_with(public)) as run:
        build(run)
    return folder


@pytest.fixture
def workdir(template, tmp_path):
    return shutil.copytree(template, tmp_path / "run")


def test_a_request_costs_its_own_clusters_and_nothing_reclusters(workdir, public, tmp_path):
    moved = public.rename(tmp_path / "elsewhere.npz")  # nothing reads it again
    with small_run(workdir, config=config_with(public)) as run:
        before, live = state(run), run.catalog.live("train")
        sizes = np.array(list(collections.Counter(live.clusters).values()))
        shown = overview(run.layout, run.catalog, run.config)
        assert shown.expected_share == (sizes**2).sum() / sizes.sum() ** 2 and shown.sampled_share == 0
        twins = [name for name, row in zip(live.ids, live.rows, strict=True) if is_twin(moved, run.images[row])]
        assert len(twins) == 4 and not before["sample"].keys() & set(live.ids)
        for ids in (twins[:1], twins[1:], live.ids[20:30], live.ids[40:]):
            hit = set(run.catalog.clusters_of(ids).values())
            report = erase.request_erasure(run, list(ids)).outcome
            assert not report.reclustered and report.retuned <= len(hit)
            after = state(run)
            assert after["prototypes"] == before["prototypes"] and after["sample"] == before["sample"]
            assert {key for key in after["slices"] if after["slices"][key] != before["slices"][key]} <= hit
            before = after
        assert audit(run).ok
    moved.rename(public)


def is_twin(public, image):
    with np.load(public) as arrays:
        return content_hash(image) in map(content_hash, arrays["train_images"])


def test_the_sample_does_not_show_which_records_are_private(tmp_path, public, capsys):
    """Else a workdir in which a record was erased would differ from one that never had it."""
    config = config_with(public, clustering__sample_size=60)
    with small_run(tmp_path / "run", config=config) as run:
        sample = run.public_sample
        twins = {*run.catalog.live("train", "test").contents} & {*sample.records.contents}
        assert len(sample.images) == 60 and len(twins) == 5
    assert "5 images of the public sample are private or test images too: digit-" in capsys.readouterr().err
    assert public_sets.draw_sample(config, lambda _: False).digest == sample.digest
    with pytest.raises(UserError, match="all images drawn from .* are private or test images; use another"):
        public_sets.draw_sample(config, lambda _: True)
    refused = "sample_size=61: must be at most 60, the number of images of the public set"
    with (
        pytest.raises(UserError, match=refused),
        small_run(tmp_path / "run", config=config_with(public, clustering__sample_size=61)),
    ):
        pass


def test_the_order_of_the_set_does_not_reach_the_sample(public, tmp_path):
    with np.load(public) as arrays:
        order = np.random.default_rng(1).permutation(60)
        np.savez(tmp_path / "shuffled.npz", **{name: column[order] for name, column in arrays.items()})
    first, second = (
        public_sets.draw_sample(config_with(file, clustering__sample_size=20), lambda _: False)
        for file in (public, tmp_path / "shuffled.npz")
    )
    assert first.digest == second.digest and len(first.images) == 20


def test_a_lost_sample_is_drawn_again_from_the_same_set_only(workdir, public, tmp_path):
    config, folder = config_with(public), workdir / "public" / "sample"
    np.savez(folder / "0" / "arrays.npz", images=np.zeros((30, 8, 8, 1), np.uint8))
    (problem,) = doctor.examine(workdir, fix=True).problems
    assert (problem.component, problem.state) == ("public", doctor.State.DROPPED) and not folder.exists()
    kept = public.rename(tmp_path / "kept.npz")
    np.savez(public, train_images=np.zeros((60, 8, 8), np.uint8), train_labels=np.arange(60) % 3)
    with pytest.raises(UserError, match="names other images now"), small_run(workdir, config=config):
        pass
    kept.rename(public)
    prompt = next((workdir / "public").glob("prompt-*"))
    before = {path.name: path.read_bytes() for path in prompt.rglob("*.npz")}
    np.savez(prompt / "0" / "arrays.npz", prompt=np.zeros(3, np.float32))
    with pytest.raises(UserError, match="not the one that was tuned; lmeraser train"), open_run(workdir) as run:
        _ = run.tuning_spec
    with small_run(workdir, config=config) as run:
        assert {path.name: path.read_bytes() for path in prompt.rglob("*.npz")} == before
        assert not build(run).published
        named = load_clustering(run.layout, run.catalog.manifest().clustering)
        assert run.public_sample.records.ids == named.sample
