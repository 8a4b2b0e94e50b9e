"""Receipts: what they say is described, chained and true, and what is no receipt never holds nor crashes."""

import contextlib
import copy
import json
import re
import shutil

import jsonschema
import numpy as np
import pytest
from helpers import small_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import STATES
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning import verify as verify_module
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.verify import validator, verify, verify_all


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    """A workdir with four receipts (an unsampled record, owner and record, nothing new, a sampled record), and ids."""
    folder = tmp_path_factory.mktemp("erased") / "run"
    with small_run(folder) as run:
        build(run)
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        records = run.catalog.live("train")
        free = [name for name in records.ids if name not in sample]
        owner = records.owners[-1]
        owned = run.catalog.owned(owner)
        erase.request_erasure(run, free[:1], request="one", requester="me", reason="why")
        erase.request_erasure(run, [free[1]], [owner], request="two", defer=True)
        erase.request_erasure(run, free[:1], request="three", quarantine=True)
        left = next(name for name in sample if name not in owned)
        erase.request_erasure(run, [left], request="four")
    return folder, [free[0], free[1], left, *owned], owner


@pytest.fixture
def workdir(erased, tmp_path):
    return Layout(shutil.copytree(erased[0], tmp_path / "run"))


@contextlib.contextmanager
def catalog_of(layout):
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        yield catalog


def findings(layout):
    """Everything that does not hold, as "file: finding"."""
    with catalog_of(layout) as catalog:
        return [f"{v.name.rpartition('/')[2]}: {line}" for v in verify_all(layout, catalog) for line in v.findings]


def stored(layout, name):
    return json.loads(layout.receipt(name).read_text())


def signed(values):
    """The values with a digest of their own that fits."""
    return {**values, "digest": digest({key: value for key, value in values.items() if key != "digest"})}


# what is written
def test_receipts_say_what_was_done_and_name_nobody(erased):
    layout, (ids, owner) = Layout(erased[0]), erased[1:]
    texts = [path.read_text() for path in layout.receipts.iterdir()]
    assert len(texts) == 4 and all(path.stat().st_mode & 0o777 == 0o600 for path in layout.receipts.iterdir())
    assert not [name for name in [*ids, owner] for text in texts if name in text]
    one, two, three, four = (stored(layout, name) for name in ("one", "two", "three", "four"))
    with catalog_of(layout) as catalog:
        manifest, made = catalog.manifest(), catalog.slices()
        salted = {name: catalog.salted("tombstone", name) for name in ids}
        known = {
            catalog.salted("cluster", key): (
                catalog.salted("slice", ref),
                catalog.salted("params", made[ref].params_digest),
            )
            for key, ref in manifest.entries.items()
        }
        assert two["request"]["owners"] == [catalog.salted("owner", owner)]
    assert [r["sequence"] for r in (one, two, three, four)] == [1, 2, 3, 4]
    assert [r["previous"] for r in (one, two, three, four)] == ["", one["digest"], two["digest"], three["digest"]]
    assert one["records"]["records"] == [salted[ids[0]]] == three["records"]["erased_before"]
    assert set(two["records"]["records"]) == {salted[name] for name in ids if name not in (ids[0], ids[2])}
    assert one["request"]["requester"] == "me" and three["request"]["quarantine"] is True
    assert [len(r["clusters"]) for r in (one, three)] == [1, 0] and one["clusters"][0]["why"] == "member"
    assert two["work"]["batch"] == three["work"]["batch"] == ["two", "three"] and two["purged"] == three["purged"]
    assert four["purged"]["rows"] == 1 and len(four["purged"]["clusterings"]) == 1
    after = {c["cluster"]: (c["after"], c["params"]) for c in four["clusters"] if c["after"]}
    assert after and after.items() <= known.items()
    for receipt in (one, two, three, four):
        states = [state["state"] for state in receipt["request"]["states"]]
        assert states == [known for known in STATES if known in states] and states[-1] == "purged"
        times = [state["at"] for state in receipt["request"]["states"]]
        assert times == sorted(times)


def objects(schema):
    """Every part of a schema."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from objects(value)
    if isinstance(schema, list):
        for value in schema:
            yield from objects(value)


def test_the_schema_describes_every_field_and_fits_every_receipt(erased):
    schema = validator().schema
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in objects(schema):
        for name, field in part.get("properties", {}).items() if part.get("type") == "object" else ():
            assert len(field.get("description", "")) > 10, name
        if part.get("type") == "object":
            assert part["additionalProperties"] is False and set(part["required"]) == set(part["properties"])
    for path in Layout(erased[0]).receipts.iterdir():
        jsonschema.validate(json.loads(path.read_text()), schema)


# what holds and what does not
def test_untouched_receipts_hold_also_as_copies(erased, tmp_path):
    layout = Layout(erased[0])
    assert findings(layout) == []
    shutil.copy(layout.receipt("one"), tmp_path / "mail.json")
    with catalog_of(layout) as catalog:
        (copied,) = verify(layout, catalog, [tmp_path / "mail.json"])
        notes = {verdict.request: verdict.notes for verdict in verify_all(layout, catalog)}
    assert copied.ok and copied.request == "one"
    assert "replaced by a later request" in notes["one"][0] and notes["four"] == ()


@pytest.mark.parametrize("name", ["one", "two", "four"])
def test_a_missing_receipt_shows_also_the_newest(workdir, name):
    workdir.receipt(name).unlink()
    (line,) = findings(workdir)
    assert line.startswith(f"{name}.json: the receipt at place ") and line.endswith("is missing")


def test_a_missing_folder_shows(workdir):
    shutil.rmtree(workdir.receipts)
    found = findings(workdir)
    assert found[0] == "receipts: the folder is missing" and len(found) == 5


def test_a_receipt_taken_from_the_catalog_too_shows(workdir):
    workdir.receipt("four").unlink()
    with catalog_of(workdir) as catalog:
        catalog.db.execute("DELETE FROM receipts WHERE request='four'")
    assert findings(workdir) == ["receipts: finished requests without a receipt in the catalog: four"]
    with catalog_of(workdir) as catalog:
        catalog.db.execute("DELETE FROM receipts WHERE request='two'")
    assert any("the catalog's chain has gaps: 1, 3" in line for line in findings(workdir))


def paths_of(values, path=()):
    """Every leaf of a receipt."""
    if isinstance(values, dict | list) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from paths_of(value, (*path, key))
    else:
        yield path


def test_every_edit_shows(checker, erased):
    """Each field of a receipt is covered by its digest, and a digest made to fit by the chain."""
    whole = stored(Layout(erased[0]), "four")
    assert checker(json.dumps(whole).encode()) == ()
    for path in paths_of(whole):
        values = copy.deepcopy(whole)
        place = values
        for key in path[:-1]:
            place = place[key]
        old = place[path[-1]]
        place[path[-1]] = old + 1 if type(old) in (int, float) else not old if isinstance(old, bool) else f"{old}0"
        for edited in [values] if path == ("digest",) else [values, signed(values)]:
            assert checker(json.dumps(edited).encode()), path


def findings_of(layout, name):
    with catalog_of(layout) as catalog:
        (verdict,) = verify(layout, catalog, [layout.receipt(name)])
    return [f"{name}.json: {line}" for line in verdict.findings]


def test_reordered_and_foreign_receipts_show(workdir, erased, tmp_path):
    one, two = workdir.receipt("one").read_bytes(), workdir.receipt("two").read_bytes()
    workdir.receipt("one").write_bytes(two)
    workdir.receipt("two").write_bytes(one)
    found = findings(workdir)
    assert any(line.startswith("one.json: holds the receipt of 'two'") for line in found)
    assert any(line.startswith("two.json: holds the receipt of 'one'") for line in found)
    shutil.copytree(erased[0] / "receipts", workdir.receipts, dirs_exist_ok=True)
    assert findings(workdir) == []
    with small_run(tmp_path / "other") as run:
        build(run)
        erase.request_erasure(run, run.catalog.live("train").ids[:1], request="one")
        foreign = run.layout.receipt("one").read_bytes()
    workdir.receipt("one").write_bytes(foreign)
    found = findings(workdir)
    assert any("one.json: was replaced" in line for line in found)
    assert any("left no tombstone" in line for line in found)
    (workdir.receipts / "zero.json").write_bytes(foreign)
    assert "receipts: 'zero.json' is not in the catalog" in findings(workdir)


def test_what_was_purged_and_is_there_again_shows(workdir, erased):
    """Names are planted into the receipt and into the catalog so that each kind is recognised by its hash."""
    whole = stored(workdir, "four")
    plants = {
        "slice on disk": lambda c: workdir.slice("f00d").mkdir(),
        "clustering": lambda c: workdir.clustering("f00d").mkdir(),
        "manifest": lambda c: c.db.execute("UPDATE manifests SET version=77"),
        "row": lambda c: RowFile(workdir.images, (8, 8, 1), np.uint8).view("r+").__setitem__(free_row(c), 1),
        "record": lambda c: c.db.execute("UPDATE records SET erased='four' WHERE id=?", (c.live("test").ids[0],)),
        "tombstone": lambda c: c.db.execute("DELETE FROM tombstones WHERE hash=?", whole["records"]["records"]),
    }
    with catalog_of(workdir) as catalog:
        whole["purged"]["slices"].append(catalog.salted("slice", "f00d"))
        whole["purged"]["clusterings"].append(catalog.salted("clustering", "f00d"))
        whole["purged"]["manifests"].append(77)
    write_json(workdir.receipt("four"), signed(whole))
    seen = set(findings_of(workdir, "four"))
    wanted = ["1 of the slices that", "1 of the clusterings that", "manifests that were removed are there: 77"]
    wanted += ["1 image rows that belong to no record", "1 of its records are still", "1 of its records left no tomb"]
    for plant, message in zip(plants.values(), wanted, strict=True):
        with catalog_of(workdir) as catalog:
            plant(catalog)
        new = set(findings_of(workdir, "four")) - seen
        assert len(new) == 1 and f"four.json: {message}" in next(iter(new)), (message, new)
        seen |= new


def free_row(catalog):
    used = {row[0] for row in catalog.db.execute("SELECT row FROM records")}
    return next(row for row in range(catalog.rows_used()) if row not in used)


def test_an_erased_record_or_owner_that_is_live_again_shows(workdir, erased):
    (first, *_), owner = erased[1:]
    with catalog_of(workdir) as catalog:
        catalog.db.execute("UPDATE records SET id=? WHERE id=?", (first, catalog.live("test").ids[0]))
        catalog.db.execute("UPDATE records SET owner=? WHERE id=?", (owner, catalog.live("test").ids[1]))
    found = findings(workdir)
    assert "one.json: 1 of its records are live" in found and "three.json: 1 of its records are live" in found
    assert "two.json: 1 of its owners have records that are live" in found and len(found) == 3


def test_a_slice_of_live_records_that_was_made_again_is_no_finding(workdir):
    """The same slice may come back by a later build; it is younger than the purge, and that decides."""
    whole = stored(workdir, "four")
    with catalog_of(workdir) as catalog:
        name, row = next(iter(catalog.slices().items()))
        whole["purged"]["slices"].append(catalog.salted("slice", name))
        write_json(workdir.receipt("four"), signed(whole))
        assert row.created < 4e9
    assert any("1 of the slices" in line for line in findings_of(workdir, "four"))
    with catalog_of(workdir) as catalog:
        catalog.db.execute("UPDATE slices SET created=4e9 WHERE digest=?", (name,))
    assert not any("of the slices" in line for line in findings_of(workdir, "four"))


def test_a_current_slice_with_other_bytes_shows(workdir):
    cluster = next(c for c in stored(workdir, "four")["clusters"] if c["after"])
    with catalog_of(workdir) as catalog:
        entries = catalog.manifest().entries.values()
        folder = workdir.slice(next(ref for ref in entries if catalog.salted("slice", ref) == cluster["after"]))
    arrays, metadata, step = checkpoints.load(folder)
    checkpoints.save(folder, dict(arrays) | {"bias": arrays["bias"] + 1}, metadata, step)
    assert findings_of(workdir, "four") == [
        f"four.json: the slice of cluster {cluster['cluster'][:12]} has other bytes than it says"
    ]
    shutil.rmtree(folder)
    assert "cannot be read" in findings_of(workdir, "four")[0]


# crafted receipts
@pytest.fixture(scope="module")
def checker(erased, tmp_path_factory):
    """Gives the findings of a file with the given bytes."""
    layout, path = Layout(erased[0]), tmp_path_factory.mktemp("crafted") / "receipt.json"
    with catalog_of(layout) as catalog:
        facts = verify_module._Snapshot(layout, catalog)

    def check(content):
        path.write_bytes(content)
        return verify_module._verdict(path, facts).findings

    return check


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 500_000, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, ""),
        (b"[" * 700 + b"]" * 700, ""),
        (b'{"schema": 1, "schema": 1}', "a key occurs twice"),
        (b"9" * 10_000, "is not JSON"),
        (b"NaN", "is not JSON"),
        (b'{"sequence": 1e999}', "is not JSON"),
        (b'"\\ud800"', "is not JSON"),
        (b"null", "is not of type"),
        (b"[]", "is not of type"),
        (b"{}", "is a required property"),
    ],
)
def test_what_is_no_receipt(checker, content, message):
    found = checker(content)
    assert found and message in found[0], found
    assert all(len(line) < 1000 for line in found)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("request", "id"), "../../etc/passwd", r"\$.request.id"),
        (("request", "id"), "one\n", "not of this workdir"),
        (("sequence",), 10**400, r"\$.sequence"),
        (("sequence",), 10**12, "the catalog has none"),
        (("sequence",), 1.0, "was edited"),
        (("sequence",), True, r"\$.sequence"),
        (("previous",), "0" * 64, "does not follow"),
        (("clusters",), [{}], r"\$.clusters\[0\]"),
        (("clusters", 0, "after"), "../../../etc", "after"),
        (("records", "records"), ["x" * 32], r"records\[0\]"),
        (("request", "states", 0, "at"), "2026-99-99T00:00:00.000+00:00", "a time that does not exist"),
        (("request", "states"), [{"state": "purged", "at": "2026-01-01T00:00:00.000+00:00"}] * 2, "out of order"),
        (("request", "states", 0, "at"), "9999-01-01T00:00:00.000+00:00", "run backwards"),
        (("work", "seconds"), 1e300, "seconds"),
        (("more",), 1, "more"),
    ],
)
def test_crafted_fields(checker, erased, path, value, message):
    values = stored(Layout(erased[0]), "one")
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = checker(json.dumps(signed(values) if message != "was edited" else values).encode())
    assert any(re.search(message, line) for line in found), found


def test_files_that_are_too_large_or_missing(erased, tmp_path, monkeypatch):
    layout = Layout(erased[0])
    with catalog_of(layout) as catalog:
        for path in (tmp_path, tmp_path / "none.json"):
            with pytest.raises(UserError, match="no such file|is no file"):
                verify(layout, catalog, [path])
        monkeypatch.setattr(verify_module, "LARGEST", 100)
        (verdict,) = verify(layout, catalog, [layout.receipt("one")])
    assert verdict.findings == ("is larger than 100 bytes",)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
quiet = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quiet
@given(st.data())
def test_any_change_of_any_field_is_a_finding(checker, erased, data):
    """Whatever replaces any part of a receipt, signed or not: findings, never a traceback."""
    values = stored(Layout(erased[0]), data.draw(st.sampled_from(["one", "two", "four"])))
    before, place = copy.deepcopy(values), values
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if data.draw(st.booleans()) or not isinstance(place[key], dict | list) or not place[key]:
            place[key] = data.draw(plain)
            break
        place = place[key]
    with contextlib.suppress(ValueError):  # not every value has a digest
        values = signed(values) if data.draw(st.booleans()) else values
    found = checker(json.dumps(values).encode())
    assert bool(found) == (json.dumps(values, sort_keys=True) != json.dumps(before, sort_keys=True)), found


@quiet
@given(st.binary(max_size=200) | plain.map(json.dumps).map(str.encode))
def test_any_bytes_are_findings(checker, content):
    assert checker(content)
