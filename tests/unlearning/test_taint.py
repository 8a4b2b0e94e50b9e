"""What an erased record had a part in goes with it, whatever was pinned, damaged, rotten or under way meanwhile."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from fakes import fast_fakes
from helpers import small_config, small_run, small_source, with_items, without

from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import ingest, requests
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.unlearning import audit, erase, purge, rollback, verify
from lmeraser_jax.unlearning import build as build
from lmeraser_jax.unlearning import run as runs
from lmeraser_jax.unlearning.add import add
from lmeraser_jax.unlearning.artifacts import load_clustering, slice_of

CONFIG = small_config(clustering__sample_size=20, clustering__cut="auto:5", clustering__min_members=0)
TRAIN = [item.id for item in small_source().items if item.split == "train"]


@pytest.fixture(scope="module", autouse=True)
def _fast():
    """Fast slices and features: what is tried is what is kept."""
    with pytest.MonkeyPatch.context() as patch:
        fast_fakes(patch)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory, _fast):
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
    """Nothing published has seen a record that is gone, nothing is left over, receipts hold, the audit agrees."""
    assert run.catalog.orphaned_slices() == frozenset() and purge.leftovers(run) == []
    verdicts = verify.verify_all(run.layout, run.catalog)
    assert all(verdict.ok for verdict in verdicts), verdicts
    found = audit.audit(run)
    assert found.ok, found.text()


def published(run):
    return run.catalog.manifest().entries


def sample(run):
    return load_clustering(run.layout, run.catalog.manifest().clustering).sample


def member(run, key):
    """An unsampled member of a cluster, or None."""
    return next((name for name in run.catalog.members(key).ids if name not in sample(run)), None)


def grown(folder, wanted):
    """(run folder, what `wanted` finds) of a workdir that was trained without some records, which then joined."""
    for first in range(0, len(TRAIN), 3):
        late = set(TRAIN[first : first + 3])
        place = folder / str(first)
        with small_run(place, without(small_source(), late), CONFIG) as run:
            build.build(run)
            ids = {item.id for item in small_source().items if item.id in late}
            add(run, without(small_source(), {item.id for item in small_source().items} - ids))
            found = wanted(run)
        if found is not None:
            return place, found
    raise AssertionError("no such workdir; change the sizes")


def moved_away(run):
    """(key, id): a cluster of both states, and an unsampled record of the older slice that is elsewhere now."""
    new, old = run.catalog.manifests()
    for key in sorted(set(new.entries) & set(old.entries)):
        rows = set(run.catalog.rows_of(old.entries[key]).tolist())
        for name, home in zip(*(lambda t: (t.ids, t.clusters))(run.catalog.live("train")), strict=True):
            if run.catalog.rows([name])[name] in rows and home != key and name not in sample(run):
                return key, name
    return None


def test_a_pinned_slice_goes_with_a_member_that_is_in_another_cluster_now(tmp_path):
    place, (key, name) = grown(tmp_path, moved_away)
    with small_run(place, config=CONFIG) as run:
        old = run.catalog.manifests()[1].entries[key]
        rollback.rollback(run, key, old)
        erase.request_erasure(run, [name], request="r")
        assert published(run)[key] != old and run.catalog.pins() == {}
        sound(run)


def test_a_pinned_slice_goes_with_a_sampled_record_that_decided_its_members(tmp_path):
    """No member of the slice is erased; but without the erased record it would have had others."""

    def shaped(run):
        new, old = run.catalog.manifests()
        fresh = set(sample(run)) - set(load_clustering(run.layout, old.clustering).sample)
        keys = [key for key in sorted(set(new.entries) & set(old.entries)) if new.entries[key] != old.entries[key]]
        return (keys[0], sorted(fresh)) if fresh and keys else None

    place, (key, fresh) = grown(tmp_path, shaped)
    config = dataclasses.replace(CONFIG, tuning=dataclasses.replace(CONFIG.tuning, head_rate=0.02))
    with small_run(place, config=CONFIG) as run:
        made = published(run)[key]
    with runs.prepare_run(place, config, source=small_source(), retune=True) as (run, _):
        build.build(run)
        rollback.rollback(run, key, made)
        erase.request_erasure(run, fresh, request="r")
        assert made not in map(slice_of, published(run).values()) and run.catalog.pins() == {}
        sound(run)


def test_a_pin_holds_where_the_slice_is_called_for_all_the_same(run):
    key = next(key for key in published(run) if member(run, key))
    other = next(name for name in sample(run) if run.catalog.clusters_of([name])[name] != key)
    before = published(run)[key]
    rollback.rollback(run, key, before)
    erase.request_erasure(run, [other])
    assert (published(run).get(key) == before) == (key in run.catalog.pins())
    sound(run)


@pytest.mark.parametrize("how", ["doctor", "repair"])
def test_an_older_state_that_lost_a_slice_goes_with_an_erasure(run, how):
    """The list of members is lost with the slice, so nobody can tell any more who was among them."""
    key = next(key for key in published(run) if member(run, key))
    name, ref = member(run, key), published(run)[key]
    shutil.rmtree(run.layout.slice(ref))
    with run.catalog.transaction():
        run.catalog.drop_slice(ref)
    if how == "repair":
        build.repair(run)
    erase.request_erasure(run, [name], request="r")
    assert len(run.catalog.manifests()) == 1
    sound(run)


def test_rotten_pixels_are_never_tuned_on(run):
    key = next(key for key in published(run) if len(run.catalog.members(key)) > 2 and member(run, key))
    name = member(run, key)
    other = next(one for one in run.catalog.members(key).ids if one != name)
    row = run.catalog.rows([other])[other]
    good = bytes(run.images[row])
    view = image_file(run.layout, run.catalog).view("r+")
    view[row] = 255 - view[row]
    view.flush()
    with pytest.raises(UserError, match=rf"pixels of 1 records.*{other}.*--reimport"):
        erase.request_erasure(run, [name], request="r")
    assert requests.get(run.catalog, "r").open
    view[row] = np.frombuffer(good, np.uint8).reshape(view[row].shape)
    view.flush()
    erase.process(run)
    sound(run)


def test_features_of_rotten_pixels_are_not_cached(run):
    """A record that is read from its source again would keep them."""
    table = run.catalog.live("train").take(np.array([4]))
    for path in run.layout.records.glob("features-*"):
        path.unlink()
    view = image_file(run.layout, run.catalog).view("r+")
    view[table.rows] = 255 - view[table.rows]
    view.flush()
    with pytest.raises(UserError, match=f"pixels of 1 records.*{table.ids[0]}"):
        run.features(table)


def test_nothing_outlives_an_erasure_in_the_events_of_a_rollback(run):
    key = next(key for key in published(run) if member(run, key))
    old = published(run)[key]
    erase.request_erasure(run, [member(run, key)])
    rollback.rollback(run, key, published(run)[key])
    rollback.unpin(run, key)
    text = json.dumps(run.catalog.db.execute("SELECT * FROM events").fetchall())
    assert key not in text and old not in text and published(run)[key] not in text


def test_a_rollback_to_what_a_waiting_erasure_removes_is_refused(run):
    key = next(key for key in published(run) if member(run, key))
    requests.accept(run.catalog, [member(run, key)], request="waits")
    with pytest.raises(UserError, match=r"a waiting erasure removes \(waits\)"):
        rollback.rollback(run, key, published(run)[key])
    assert run.catalog.pins() == {}


# requests that arrive while another is served
def between(monkeypatch, function, action):
    """Does something once, right after the plan was made."""
    real = getattr(build, function)
    left = [action]

    def wrapper(*args, **kwargs):
        found = real(*args, **kwargs)
        if left:
            left.pop()()
        return found

    monkeypatch.setattr(build, function, wrapper)


@pytest.mark.parametrize("escalated", [False, True])
def test_quarantine_follows_its_record_through_a_new_clustering(run, monkeypatch, escalated):
    late = next(name for name in run.catalog.live("train").ids if name not in sample(run))

    def accept():
        requests.accept(run.catalog, [late], request="late", quarantine=not escalated)
        if escalated:
            requests.accept(run.catalog, [late], request="late", quarantine=True)

    between(monkeypatch, "plan", accept)
    before = set(published(run))
    erase.request_erasure(run, list(sample(run)[:3]), request="first")
    assert set(published(run)) != before, "clustered anew"
    home = run.catalog.clusters_of([late])[late]
    assert home in published(run) and home in run.catalog.quarantined()
    assert requests.get(run.catalog, "late").body["members"] == {home: 1}
    erase.process(run)
    body = requests.get(run.catalog, "late").body
    assert body["quarantine"] and [one["why"] for one in body["clusters"]] == ["member"]
    assert not run.catalog.quarantined()
    sound(run)


def test_images_of_an_owner_who_is_erased_during_an_import_stay_out(run, monkeypatch):
    items = [item for item in small_source(train=110).items if item.split == "train" and item.id not in TRAIN][:4]
    source = small_source(train=110)
    kept = {item.id for item in items}
    source = without(source, {item.id for item in source.items} - kept)
    pixels = source.read(0, len(source.items)).images
    named = [item._replace(owner="ann" if i % 2 else "bob") for i, item in enumerate(source.items)]
    source = with_items(source, named, pixels)
    first = with_items(source, [named[1]._replace(id="known")], pixels[1:2] // 2)
    add(run, first)
    real = ingest._Intake.take

    def take(intake, *args):
        found = real(intake, *args)
        requests.accept(run.catalog, owners=["ann"], request="ann")
        return found

    monkeypatch.setattr(ingest._Intake, "take", take)
    imported, _ = add(run, source)
    live = run.catalog.live("train")
    assert imported.erased == 2 and imported.added == 2
    assert "ann" not in live.owners and set(live.ids) & kept == {item.id for item in named if item.owner == "bob"}
    assert all(content_hash(image) != content_hash(pixels[1]) for image in run.images)
    sound(run)


def test_a_receipt_counts_the_work_of_interrupted_attempts(run, monkeypatch):
    real, calls = build._keep, []

    def keep(*args):
        real(*args)
        calls.append(args)
        if len(calls) == 3:
            raise InterruptedError

    monkeypatch.setattr(build, "_keep", keep)
    with pytest.raises(InterruptedError):
        erase.request_erasure(run, list(sample(run)[:3]), request="r")
    outcome, _ = erase.process(run)
    work = requests.get(run.catalog, "r").body["work"]
    assert work["clusters_tuned"] == len(calls) == outcome.retuned + outcome.adopted + 3
    assert work["images"] > outcome.images
    sound(run)


def test_the_same_image_asks_for_the_same_erasure_once(run):
    name = run.catalog.live("train").ids[4]
    content = content_hash(run.images[run.catalog.rows([name])[name]])
    done = erase.request_erasure(run, request="like", contents=[content], defer=True)
    assert done.request.body["records"]
    assert erase.request_erasure(run, request="like", contents=[content], defer=True) == done
    erase.process(run)
    assert not erase.request_erasure(run, request="like", contents=[content]).request.open
    with pytest.raises(UserError, match="no live record has exactly these pixels"):
        erase.request_erasure(run, request="again", contents=[content])


def test_a_row_of_the_catalog_that_tells_another_story_shows(run):
    erase.request_erasure(run, [run.catalog.live("train").ids[4]], request="r")
    request = requests.get(run.catalog, "r")
    for part, value in (("requester", "somebody"), ("records", []), ("work", request.body["work"] | {"images": 1})):
        requests._store(run.catalog, dataclasses.replace(request, body=request.body | {part: value}))
        (verdict,) = (one for one in verify.verify_all(run.layout, run.catalog) if not one.ok)
        assert "than the catalog" in verdict.findings[0]
    requests._store(run.catalog, request)
    sound(run)


def test_a_clustering_goes_with_a_record_that_only_it_has_sampled(tmp_path):
    """Its slices live on where the clustering of today calls for them, too."""

    def displaced(run):
        new, old = run.catalog.manifests()
        reused = set(new.entries.values()) & set(old.entries.values())
        gone = set(load_clustering(run.layout, old.clustering).sample) - set(sample(run))
        return sorted(gone)[0] if reused and gone else None

    place, name = grown(tmp_path, displaced)
    with small_run(place, config=CONFIG) as run:
        erase.request_erasure(run, [name])
        now = run.catalog.manifest().clustering
        assert [path.name for path in run.layout.clusterings.iterdir()] == [now]
        sound(run)


def test_a_pin_outlives_the_state_it_is_from(tmp_path):
    """Its clustering is kept with it, so that one can still tell whose erasure would end it."""

    def elsewhere(run):
        new, old = run.catalog.manifests()
        shaped = set(load_clustering(run.layout, old.clustering).sample) | set(sample(run))
        then = {row for ref in old.entries.values() for row in run.catalog.rows_of(ref).tolist()}
        free = [name for name, row in run.catalog.rows(run.catalog.live("train").ids).items() if row in then]
        free = [name for name in free if name not in shaped]
        for key in sorted(set(new.entries) & set(old.entries)):
            rows = set(run.catalog.rows_of(old.entries[key]).tolist())
            others = [name for name in free if run.catalog.rows([name])[name] not in rows]
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
        member = next(
            name
            for name, row in run.catalog.rows(run.catalog.live("train").ids).items()
            if row in run.catalog.rows_of(old.entries[key])
        )
        last = erase.request_erasure(run, [member])
        assert run.catalog.pins() == {}
        assert run.catalog.salted("clustering", old.clustering) in last.request.body["purged"]["clusterings"]
        sound(run)
