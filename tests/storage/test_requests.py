"""Erasure requests: accepted at once and once, served together, with one state whatever their options."""

import contextlib
import json
import shutil
import threading
import time

import pytest
from helpers import small_run

from lmeraser_jax.data.source import Item
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import STATES, accept, due, get, listed, resolve, still_live
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning import erase, purge
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build

ITEMS = [Item(f"r{i}", "train", i % 2, f"own-{i // 3}") for i in range(9)]
ITEMS += [Item("h0", "holdout", 0, "own-0"), Item("t0", "test", 0, "own-0"), Item("p0", "public", 0, "own-0")]

EXACT = tuple(state for state in STATES if state != "approximated")  # of a request without --mode


@pytest.fixture
def catalog(tmp_path):
    """A catalog of records in two published clusters, without a workdir around it."""
    with contextlib.closing(Catalog(tmp_path / "catalog.db")) as new:
        new.add_records(ITEMS, range(len(ITEMS)), [digest(item.id) for item in ITEMS])
        new.publish("tree", "cpu", "inputs", {}, [(i, f"k{i % 2}") for i in range(9)])
        yield new


def dump(catalog):
    """All that a catalog holds."""
    return list(catalog.db.iterdump())


def check_states(catalog, name):
    """In order, never back in time, each change an event."""
    rows = catalog.db.execute("SELECT body FROM events WHERE kind='request' ORDER BY rowid")
    events = [body["state"] for body in (json.loads(row[0]) for row in rows) if body["request"] == name]
    request = get(catalog, name)
    states, times = zip(*request.body["states"], strict=True)
    assert states[0] == "accepted" and states[-1] == request.state
    assert list(states) == [known for known in STATES if known in states] == events
    assert list(times) == sorted(times) and request.created <= times[0]
    return states


# accepting
def test_accept_erases_at_once_and_holds_no_id(catalog):
    request = accept(catalog, iter(["r1", "r2", "r1"]), request="a", requester="me", reason="why")
    assert (request.state, request.open, get(catalog, "a")) == ("accepted", True, request)
    assert catalog.erased(["a"]) == {1: "r1", 2: "r2"} and catalog.is_tombstoned("r1")
    assert set(catalog.live("train").ids) == {f"r{i}" for i in range(9)} - {"r1", "r2"}
    assert request.body["members"] == {"k0": 1, "k1": 1} and len(request.body["records"]) == 2
    assert "r1" not in json.dumps(request.body | {"members": {}}) and check_states(catalog, "a") == ("accepted",)


def test_owners_are_erased_with_a_tombstone(catalog):
    request = accept(catalog, ["r8"], ["own-0", "own-1", "own-0"])
    wanted = {"r0", "r1", "r2", "r3", "r4", "r5", "r8", "h0", "t0"}
    assert set(catalog.erased([request.id]).values()) == wanted, "hold-out and test images too, public ones not"
    assert len(request.body["owners"]) == 2 and "own-0" not in json.dumps(request.body)
    assert [catalog.is_tombstoned(f"own-{i}", "owner") for i in range(3)] == [True, True, False]
    assert accept(catalog, [], ["own-0"]).body["records"] == [], "an erased owner may be named again"


def test_a_request_that_is_made_twice_is_accepted_once(catalog):
    first = accept(catalog, ["r1", "r2"], ["own-2"], request="a", reason="one")
    before = dump(catalog)
    assert accept(catalog, ["r2", "r1"], ["own-2"], request="a") == first
    for other in ({"reason": "two"}, {"requester": "somebody"}):
        with pytest.raises(UserError, match="--request=a: was used by another requester or for another reason"):
            accept(catalog, ["r2", "r1"], ["own-2"], request="a", **other)
    for ids in (["r1"], ["r1", "r2"]):
        with pytest.raises(UserError, match="--request=a: was used for another request"):
            accept(catalog, ids, request="a")
    assert dump(catalog) == before
    image = accept(catalog, request="like", contents=[digest("r3")])
    assert len(image.body["records"]) == 1 and accept(catalog, request="like", contents=[digest("r3")]) == image
    catalog.forget(["like"])
    assert accept(catalog, request="like", contents=[digest("r3")]) == image, "although no record has these pixels now"
    with pytest.raises(UserError, match="no live record has exactly these pixels"):
        accept(catalog, contents=[digest("r3")])


def test_a_second_request_for_a_record_that_waits(catalog):
    accept(catalog, ["r1"], request="a")
    second = accept(catalog, ["r1", "r3"], request="b", quarantine=True)
    assert len(second.body["records"]) == len(second.body["shared"]) == 1 and second.body["members"] == {"k1": 1}
    assert catalog.erased(["a"]) == {1: "r1"} and catalog.erased(["b"]) == {3: "r3"}
    assert catalog.quarantined() == {"k1"}, "also where another request erases"


def test_what_cannot_be_accepted_changes_nothing(catalog):
    before = dump(catalog)
    cases = [
        ({}, "say what to erase"),
        ({"ids": ["r1", "x", "y"]}, "unknown records: x, y"),
        ({"ids": ["r1"], "owners": ["own-0", "nobody"]}, "--owner=nobody: owns no live private record"),
        ({"ids": ["x"], "owners": ["nobody"]}, r"(?s)unknown records: x.*--owner=nobody"),
        ({"ids": ["r1", "p0"]}, "public records.*p0"),
        ({"ids": ["r1", ""]}, "not empty"),
        ({"ids": ["r1", "\udcff"]}, "text in UTF-8"),
        ({"ids": ["r1"], "owners": ["\ud800"]}, "text in UTF-8"),
        ({"ids": ["r1"], "request": "../x"}, "--request=../x: must be"),
        ({"ids": ["r1"], "request": "x" * 65}, "--request="),
        ({"ids": ["r1"], "reason": "two\nlines"}, "--reason="),
        ({"ids": ["r1"], "requester": "x" * 501, "reason": "\0"}, "(?s)--requester=.*--reason="),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            accept(catalog, **arguments)
        assert dump(catalog) == before


def test_names_that_only_look_alike_are_hints_and_stay_live(catalog):
    names = ["anna", "Anna", "ann a", "ann  a", "é", "e\u0301", "007", "a,b", "a", "b", "'q'", "q", "x" * 1000]
    items = [Item(name, "train", 0, f"o-{name}") for name in names]
    catalog.add_records(items, range(20, 20 + len(items)), map(digest, names))
    for unknown, *hints in (
        (["ANNA"], "records: ANNA; did you mean Anna (differs from ANNA in case), anna (differs from ANNA in case)?"),
        (["anna "], "'anna '; did you mean Anna (differs from 'anna ' in case and white space), anna (differs"),
        (["É"], "did you mean 'e\u0301' (differs from 'É' in Unicode form and case), 'é' (differs from 'É' in case)?"),
        (["7", '"q"'], "did you mean", "007 (differs from 7 in leading zeros)", "from '\"q\"' in quotes), q ("),
        (["anna, q"], "'anna, q'; a flag or line is one name as it stands, so repeat it for each of several; lmeraser"),
        (["a\u200bb", "zzz"], "unknown records: 'a\\u200bb', zzz; lmeraser inspect --records lists all names"),
    ):
        for kind, wanted in (("ids", unknown), ("owners", [f"o-{name}" for name in unknown])):
            with pytest.raises(UserError) as caught:
                accept(catalog, **{kind: wanted})
            text = str(caught.value)
            assert kind == "owners" or all(hint in text for hint in hints), text
            assert ("did you mean" in text) == any("did you mean" in hint for hint in hints)
    with pytest.raises(UserError) as caught:
        resolve(catalog, [*(f"ANNA{i}" for i in range(10_000)), "X" * 1000, "y" * 100_000, *["ANNA"] * 100])
    assert len(str(caught.value)) < 5000
    accept(catalog, ["anna"], ["o-é", "o-a"])
    records, owners = still_live(catalog, ["anna"], ["o-é", "o-a"])
    assert records == "records that look like those of the request are live and stay: Anna (differs from anna in case)"
    assert "'o-e\u0301' (differs from 'o-é' in Unicode form)" in owners and "owners that look" in owners
    assert still_live(catalog, ["a", "Anna", "anna"], ["o-é", "o-e\u0301"]) == []


def test_two_connections_accept_at_the_same_time(catalog, tmp_path):
    """Every record belongs to one request, and an id is given once."""
    start, created = threading.Barrier(4), set()

    def request_all(own):
        with contextlib.closing(Catalog(tmp_path / "catalog.db")) as other:
            start.wait()
            for i in range(9):
                created.add(accept(other, [f"r{i}"], request=f"same-{i}").created)
                accept(other, [f"r{i}"], request=f"{own}-{i}")

    threads = [threading.Thread(target=request_all, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listed(catalog)) == 9 * 5 and len(created) == 9
    for i in range(9):
        erased = [request for request in listed(catalog) if i in catalog.erased([request.id])]
        assert len(erased) == 1
        bodies = [request.body for request in listed(catalog) if request.id.endswith(f"-{i}")]
        assert sorted(len(body["records"]) + len(body["shared"]) for body in bodies) == [1] * 5


def test_a_clock_that_is_set_back_does_not_turn_states_around(catalog, monkeypatch):
    accept(catalog, ["r1"], request="a")
    at = get(catalog, "a").created
    monkeypatch.setattr(time, "time", lambda: at - 3600)
    requests.advance(catalog, ["a"], "planned")
    check_states(catalog, "a")
    assert due(catalog, max_wait=60.0).age == 0


def test_due(catalog, monkeypatch):
    assert due(catalog) == due(catalog, 0.0, 1) == requests.Due(0, 0.0, False)
    first = accept(catalog, ["r1"])
    accept(catalog, ["r2"])
    monkeypatch.setattr(time, "time", lambda: first.created + 100)
    assert due(catalog).now and due(catalog).waiting == 2 and due(catalog).age == 100
    assert [due(catalog, max_wait=seconds).now for seconds in (99, 100, 101)] == [True, True, False]
    assert [due(catalog, max_batch=count).now for count in (1, 2, 3)] == [True, True, False]
    assert [due(catalog, *limits).now for limits in ((50, 9), (500, 2), (500, 9))] == [True, True, False]
    later = due(catalog, 160.0, 5)
    assert (later.left, later.room) == (60.0, 3)


# serving
def test_deferred_requests_are_served_together(fast_workdir):
    with small_run(fast_workdir) as run:
        ids, before = list(run.catalog.live("train").ids), run.catalog.manifest()
        sampled = set(load_clustering(run.layout, before.clustering).sample)
        one, two, three = [name for name in ids if name not in sampled][:3]
        for name, wanted in (("a", [one]), ("b", [two, one]), ("c", [three])):
            assert erase.request_erasure(run, wanted, request=name, defer=True).outcome is None
        assert run.catalog.manifest() == before and run.layout.receipts.exists() is False
        tail = run.catalog.db.execute("SELECT count(*) FROM events WHERE kind='publish'").fetchone()[0]
        outcome, finished = erase.process(run)
        assert [request.id for request in finished] == ["a", "b", "c"] and not requests.any_open(run.catalog)
        assert outcome.version == before.version + 1 == run.catalog.manifest().version
        assert run.catalog.db.execute("SELECT count(*) FROM events WHERE kind='publish'").fetchone()[0] == tail + 1
        for request in finished:
            assert check_states(run.catalog, request.id) == EXACT
            assert request.body["work"]["batch"] == ["a", "b", "c"]
            assert request.body["manifest"] == {"before": before.version, "after": before.version + 1}
            assert run.layout.receipt(request.id).stat().st_mode & 0o777 == 0o600
        assert erase.process(run)[1] == []


def test_a_second_request_for_what_is_gone_has_its_own_receipt(fast_workdir):
    with small_run(fast_workdir) as run:
        name = run.catalog.live("train").ids[0]
        erase.request_erasure(run, [name], request="a")
        before = state(run)
        again = erase.request_erasure(run, [name], request="b")
        assert (again.records, len(again.request.body["erased_before"]), again.outcome.retuned) == (0, 1, 0)
        assert differences(state(run), before) == [] and run.layout.receipt("b").is_file()
        assert check_states(run.catalog, "b") == tuple(known for known in EXACT if known != "re-tuning")
        done = run.layout.receipt("a").read_bytes()
        same = erase.request_erasure(run, [name], request="a")
        assert same.outcome is None and run.layout.receipt("a").read_bytes() == done


def test_accepting_needs_no_writer_lock(fast_workdir):
    layout = Layout(fast_workdir)
    with writer_lock(layout), contextlib.closing(Catalog(layout.catalog)) as catalog:
        name = catalog.live("train").ids[0]
        accept(catalog, [name], request="a", quarantine=True)
        assert catalog.quarantined() and resolve(catalog, [name]).pending == (name,)
    with small_run(fast_workdir) as run:
        assert get(run.catalog, "a").open and not run.catalog.live("train").ids.count(name)
        build(run)
        assert get(run.catalog, "a").state == "purged" and run.catalog.quarantined() == frozenset()


def test_requester_reason_quarantine_and_defer_do_not_change_the_state(fast, fast_template, tmp_path):
    ways = [
        {},
        {"requester": "A. Person", "reason": "Art. 17", "request": "with-a-name"},
        {"quarantine": True},
        {"defer": True, "quarantine": True, "reason": "later"},
    ]
    states = []
    for number, way in enumerate(ways):
        with small_run(shutil.copytree(fast_template, tmp_path / f"run-{number}")) as run:
            sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
            names = [sample[0], next(i for i in run.catalog.live("train").ids if i not in sample)]
            erase.request_erasure(run, names, [run.catalog.live("train").owners[-1]], **way)
            if way.get("defer"):
                erase.process(run)
            assert purge.leftovers(run) == []
            states.append(state(run))
    assert [differences(other, states[0]) for other in states] == [[]] * len(states)
