"""Everything that an erased record had a part in goes with it, whatever was pinned, damaged or under way meanwhile."""

import dataclasses
import json
import shutil

import pytest
from helpers import small_config, small_run, small_source, with_items, without

from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import ingest, requests
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.unlearning import audit, build, erase, purge, rollback, verify
from lmeraser_jax.unlearning import run as runs
from lmeraser_jax.unlearning.add import add
from lmeraser_jax.unlearning.artifacts import load_clustering, slice_of

CONFIG = small_config(clustering__sample_size=20, clustering__cut="auto:5", clustering__min_members=0)
TRAIN = [item.id for item in small_source().items if item.split == "train"]


pytestmark = pytest.mark.usefixtures("fast_files")


@pytest.fixture(scope="module")
def base(tmp_path_factory, fast_files):
    folder = tmp_path_factory.mktemp("taint") / "run"
    with small_run(folder, config=CONFIG) as run:
        build.build(run)
    return folder


@pytest.fixture
def run(base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    with small_run(tmp_path / "run", config=CONFIG) as opened:
        yield opened


def sound(run):
    """No published slice has seen an erased record, nothing is left over, receipts hold, the audit agrees."""
    assert run.catalog.orphaned_slices(run.catalog.free_rows()) == frozenset() and purge.leftovers(run) == []
    verdicts = verify.verify_all(run.layout, run.catalog)
    assert all(verdict.ok for verdict in verdicts), verdicts
    verdict = audit.audit(run)
    assert verdict.ok, verdict.text()


def published(run):
    return run.catalog.manifest().entries


def sample(run, manifest=None):
    return load_clustering(run.layout, (manifest or run.catalog.manifest()).clustering).sample


def clusters_with_a_member(run):
    """(cluster, one of its unsampled members) of the published clusters that have one."""
    members = {key: set(run.catalog.members(key).ids) - set(sample(run)) for key in published(run)}
    return [(key, min(names)) for key, names in members.items() if names]


def grown(folder, search):
    """(folder, what `search` returns) of a workdir that was built without some records, which then joined."""
    source = small_source()
    for first in range(0, len(TRAIN), 3):
        late = set(TRAIN[first : first + 3])
        with small_run(folder / str(first), without(source, late), CONFIG) as run:
            build.build(run)
            add(run, without(source, {item.id for item in source.items} - late))
            result = search(run)
        if result is not None:
            return folder / str(first), result
    raise AssertionError("no such workdir; change the sizes")


def test_a_pinned_slice_goes_with_a_member_that_is_in_another_cluster_now(tmp_path):
    def moved_away(run):
        """(cluster of both states, an unsampled record of its older slice that is elsewhere now)."""
        new, old = run.catalog.manifests()
        records = run.catalog.live("train")
        for key in sorted(set(new.entries) & set(old.entries)):
            rows = set(run.catalog.rows_of(old.entries[key]).tolist())
            for name, row, cluster in zip(records.ids, records.rows.tolist(), records.clusters, strict=True):
                if row in rows and cluster != key and name not in sample(run):
                    return key, name
        return None

    place, (key, name) = grown(tmp_path, moved_away)
    with small_run(place, config=CONFIG) as run:
        old = run.catalog.manifests()[1].entries[key]
        rollback.rollback(run, key, old)
        erase.request_erasure(run, [name], request="r")
        assert published(run)[key] != old and run.catalog.pins() == {}
        sound(run)


def test_a_pinned_slice_goes_with_a_sampled_record_that_decided_its_members(tmp_path):
    """No member of the slice is erased; but without the erased record it would have had others."""

    def newly_sampled(run):
        new, old = run.catalog.manifests()
        joined = {*sample(run, new)} - {*sample(run, old)}
        keys = [key for key in sorted(set(new.entries) & set(old.entries)) if new.entries[key] != old.entries[key]]
        return (keys[0], sorted(joined)) if joined and keys else None

    place, (key, joined) = grown(tmp_path, newly_sampled)
    config = dataclasses.replace(CONFIG, tuning=dataclasses.replace(CONFIG.tuning, head_rate=0.02))
    with small_run(place, config=CONFIG) as run:
        pinned = published(run)[key]
    with runs.prepare_run(place, config, source=small_source(), retune=True) as (run, _):
        build.build(run)
        rollback.rollback(run, key, pinned)
        erase.request_erasure(run, joined, request="r")
        assert pinned not in map(slice_of, published(run).values()) and run.catalog.pins() == {}
        sound(run)


def test_an_older_state_that_lost_a_slice_goes_with_an_erasure(run):
    """The list of members is lost with the slice, so the catalog can no longer say who was among them."""
    key, name = clusters_with_a_member(run)[0]
    shutil.rmtree(run.layout.slice(published(run)[key]))
    assert build.repair(run) and published(run)[key] not in run.catalog.slices()
    erase.request_erasure(run, [name], request="r")
    assert len(run.catalog.manifests()) == 1
    sound(run)


def test_rotten_pixels_are_never_tuned_on_nor_are_their_features_cached(run):
    key, name = next((key, name) for key, name in clusters_with_a_member(run) if len(run.catalog.members(key)) > 2)
    other = next(member for member in run.catalog.members(key).ids if member != name)
    row = run.catalog.rows([other])[other]
    for path in run.layout.records.glob("features-*"):
        path.unlink()
    view = image_file(run.layout, run.catalog).view("r+")
    view[row] = 255 - view[row]
    view.flush()
    with pytest.raises(UserError, match=f"contents of 1 records.*{other}"):
        run.features(run.catalog.at([row]))
    with pytest.raises(UserError, match=rf"contents of 1 records.*{other}.*--reimport"):
        erase.request_erasure(run, [name], request="r")
    assert requests.get(run.catalog, "r").open
    view[row] = 255 - view[row]
    view.flush()
    erase.process(run)
    sound(run)


def test_nothing_outlives_an_erasure_in_the_events_of_a_rollback(run):
    key, name = clusters_with_a_member(run)[0]
    old = published(run)[key]
    erase.request_erasure(run, [name])
    rollback.rollback(run, key, published(run)[key])
    rollback.unpin(run, key)
    text = json.dumps(run.catalog.db.execute("SELECT * FROM events").fetchall())
    assert key not in text and old not in text and published(run)[key] not in text


def test_a_rollback_to_what_a_waiting_erasure_removes_is_refused(run):
    key, name = clusters_with_a_member(run)[0]
    requests.accept(run.catalog, [name], request="waits")
    with pytest.raises(UserError, match=r"a waiting erasure removes \(waits\)"):
        rollback.rollback(run, key, published(run)[key])
    assert run.catalog.pins() == {}


def test_quarantine_follows_its_record_through_a_new_clustering(run, monkeypatch):
    """Also where it is added to a request that was accepted without it; both arrive after the build has planned."""
    first, second = [name for name in run.catalog.live("train").ids if name not in sample(run)][:2]
    real = build.current_plan

    def plan_then_accept(opened):
        wanted = real(opened)
        if requests.get(run.catalog, "first") is None:
            requests.accept(run.catalog, [first], request="first", quarantine=True)
            requests.accept(run.catalog, [second], request="second")
            requests.accept(run.catalog, [second], request="second", quarantine=True)
        return wanted

    monkeypatch.setattr(build, "current_plan", plan_then_accept)
    before = set(published(run))
    erase.request_erasure(run, list(sample(run)[:3]))
    assert set(published(run)) != before, "clustered anew"
    for name, request in ((first, "first"), (second, "second")):
        cluster = run.catalog.clusters_of([name])[name]
        assert cluster in published(run) and cluster in run.catalog.quarantined()
        assert requests.get(run.catalog, request).body["members"] == {cluster: 1}
    erase.process(run)
    for request in ("first", "second"):
        body = requests.get(run.catalog, request).body
        assert body["quarantine"] and [cluster["why"] for cluster in body["clusters"]] == ["member"]
    assert not run.catalog.quarantined()
    sound(run)


def test_images_of_an_owner_who_is_erased_during_an_import_stay_out(run, monkeypatch):
    larger = small_source(train=110)
    late = [item.id for item in larger.items if item.split == "train" and item.id not in TRAIN][:4]
    source = without(larger, {item.id for item in larger.items} - set(late))
    pixels = source.read(range(len(source.items))).rows
    items = [item._replace(owner="ann" if i % 2 else "bob") for i, item in enumerate(source.items)]
    source = with_items(source, items, pixels)
    add(run, with_items(source, [items[1]._replace(id="known")], pixels[1:2] // 2))
    real = ingest._Intake.read

    def read(intake, *args):
        real(intake, *args)
        requests.accept(run.catalog, owners=["ann"], request="ann")

    monkeypatch.setattr(ingest._Intake, "read", read)
    imported, _ = add(run, source)
    live = run.catalog.live("train")
    assert imported.erased == 2 and imported.added == 2
    assert "ann" not in live.owners and set(live.ids) & set(late) == {item.id for item in items if item.owner == "bob"}
    assert all(content_hash(image) != content_hash(pixels[1]) for image in run.images)
    sound(run)


def test_a_receipt_counts_the_work_of_interrupted_attempts(run, monkeypatch):
    real, registered = build.register, []

    def register(*args):
        real(*args)
        registered.append(args)
        if len(registered) == 3:
            raise InterruptedError

    monkeypatch.setattr(build, "register", register)
    with pytest.raises(InterruptedError):
        erase.request_erasure(run, list(sample(run)[:3]), request="r")
    outcome, _ = erase.process(run)
    work = requests.get(run.catalog, "r").body["work"]
    assert work["clusters_tuned"] == len(registered) == outcome.retuned + outcome.adopted + 3
    assert work["images"] > outcome.images
    sound(run)


def test_a_clustering_goes_with_a_record_that_only_it_has_sampled(tmp_path):
    """Its slices live on where the present clustering calls for them, too."""

    def no_longer_sampled(run):
        new, old = run.catalog.manifests()
        reused = set(new.entries.values()) & set(old.entries.values())
        left = {*sample(run, old)} - {*sample(run, new)}
        return min(left) if reused and left else None

    place, name = grown(tmp_path, no_longer_sampled)
    with small_run(place, config=CONFIG) as run:
        erase.request_erasure(run, [name])
        now = run.catalog.manifest().clustering
        assert [path.name for path in run.layout.clusterings.iterdir()] == [now]
        sound(run)


def test_a_pin_outlives_the_state_it_is_from(tmp_path):
    """Its clustering is kept with it, so that one can still tell whose erasure would end it."""

    def elsewhere(run):
        """(cluster, two unsampled records that its older slice never saw)."""
        new, old = run.catalog.manifests()
        sampled = {*sample(run, old), *sample(run, new)}
        earlier = {row for ref in old.entries.values() for row in run.catalog.rows_of(ref).tolist()}
        rows = run.catalog.rows(run.catalog.live("train").ids)
        for key in sorted(set(new.entries) & set(old.entries)):
            free_rows = earlier - set(run.catalog.rows_of(old.entries[key]).tolist())
            others = [name for name, row in rows.items() if row in free_rows and name not in sampled]
            if old.clustering != new.clustering and old.entries[key] != new.entries[key] and len(others) > 1:
                return key, others[:2]
        return None

    place, (key, others) = grown(tmp_path, elsewhere)
    with small_run(place, config=CONFIG) as run:
        old = run.catalog.manifests()[1]
        rollback.rollback(run, key, old.entries[key])
        for name in others:
            erase.request_erasure(run, [name])
            assert published(run)[key] == old.entries[key] and run.catalog.pins() == {key: old.entries[key]}
        assert old.version not in [manifest.version for manifest in run.catalog.manifests()]
        sound(run)
        last = erase.request_erasure(run, [run.catalog.at(run.catalog.rows_of(old.entries[key])).ids[0]])
        assert run.catalog.pins() == {}
        assert run.catalog.salted("clustering", old.clustering) in last.request.body["purged"]["clusterings"]
        sound(run)
