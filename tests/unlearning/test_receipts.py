"""Receipts: what they say is described, chained and true; what is no receipt never holds and never crashes."""

import contextlib
import copy
import dataclasses
import functools
import json
import re
import shutil

import jsonschema
import numpy as np
import pytest
from helpers import small_run
from hypothesis import given
from hypothesis import strategies as st

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import STATES
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning import verify as verify_module
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.verify import validator, verify, verify_all

pytestmark = pytest.mark.usefixtures("fast_files")


@pytest.fixture(scope="module")
def erased(tmp_path_factory, fast_files):
    """A workdir with four receipts (an unsampled record, owner and record, nothing new, a sampled record), and ids."""
    folder = tmp_path_factory.mktemp("erased") / "run"
    with small_run(folder) as run:
        build(run)
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        records = run.catalog.live("train")
        unsampled = [name for name in records.ids if name not in sample]
        owner = records.owners[-1]
        owned = run.catalog.owned(owner)
        erase.request_erasure(run, unsampled[:1], request="one", requester="me", reason="why")
        erase.request_erasure(run, [unsampled[1]], [owner], request="two", defer=True)
        erase.request_erasure(run, unsampled[:1], request="three", quarantine=True)
        sampled = next(name for name in sample if name not in owned)
        erase.request_erasure(run, [sampled], request="four")
    return folder, [unsampled[0], unsampled[1], sampled, *owned], owner


@pytest.fixture
def workdir(erased, tmp_path):
    return Layout(shutil.copytree(erased[0], tmp_path / "run"))


def catalog_of(layout):
    return contextlib.closing(Catalog(layout.catalog))


def findings(layout, name=""):
    """The findings about all receipts, or the named one, as "file: finding"."""
    with catalog_of(layout) as catalog:
        verdicts = verify(layout, catalog, [layout.receipt(name)]) if name else verify_all(layout, catalog)
    return [f"{verdict.name.rpartition('/')[2]}: {line}" for verdict in verdicts for line in verdict.findings]


def stored(layout, name):
    return json.loads(layout.receipt(name).read_text())


def sealed(values):
    """The values with a digest of their own that fits."""
    return {
        **values,
        "digest": digest({key: value for key, value in values.items() if key not in ("digest", "signature")}),
    }


def replaced(values, path, value):
    """A copy of a receipt with another value at a path of keys."""
    values = place = copy.deepcopy(values)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


# what is written
def test_receipts_say_what_was_done_and_name_nobody(erased):
    layout, ids, owner = Layout(erased[0]), *erased[1:]
    texts = [path.read_text() for path in layout.receipts.iterdir()]
    assert len(texts) == 4 and all(path.stat().st_mode & 0o777 == 0o600 for path in layout.receipts.iterdir())
    assert not [name for name in [*ids, owner] for text in texts if name in text]
    one, two, three, four = receipts = [stored(layout, name) for name in ("one", "two", "three", "four")]
    with catalog_of(layout) as catalog:
        salted, rows = catalog.salted, catalog.slices()
        tombstones = {name: salted("tombstone", name) for name in ids}
        published = {
            salted("cluster", key): (salted("slice", ref), salted("params", rows[ref].params_digest))
            for key, ref in catalog.manifest().entries.items()
        }
        assert two["request"]["owners"] == [salted("owner", owner)]
    assert one["records"]["records"] == [tombstones[ids[0]]] == three["records"]["erased_before"]
    assert set(two["records"]["records"]) == {tombstones[name] for name in ids if name not in (ids[0], ids[2])}
    assert one["request"]["requester"] == "me" and three["request"]["quarantine"] is True
    assert [len(receipt["clusters"]) for receipt in (one, three)] == [1, 0] and one["clusters"][0]["why"] == "member"
    assert two["work"]["batch"] == three["work"]["batch"] == ["two", "three"] and two["purged"] == three["purged"]
    assert four["purged"]["rows"] == 1 and len(four["purged"]["clusterings"]) == 1
    after = {c["cluster"]: (c["after"], c["params"]) for c in four["clusters"] if c["after"]}
    assert after and after.items() <= published.items()
    for receipt in receipts:
        states = [state["state"] for state in receipt["request"]["states"]]
        assert states == [state for state in STATES if state in states] and states[-1] == "purged"
        times = [state["at"] for state in receipt["request"]["states"]]
        assert times == sorted(times)


def test_each_receipt_follows_the_one_before_also_within_a_batch(erased):
    layout, previous = Layout(erased[0]), ""
    with catalog_of(layout) as catalog:
        links = catalog.receipts()
    assert [link.request for link in links] == ["one", "two", "three", "four"]
    for sequence, link in enumerate(links, 1):
        receipt = stored(layout, link.request)
        assert (receipt["sequence"], receipt["previous"]) == (sequence, previous) == (link.sequence, previous)
        assert receipt["digest"] == link.digest == sealed(receipt)["digest"]
        previous = receipt["digest"]


def test_the_schema_describes_every_field_and_fits_every_receipt(erased):
    schema = validator().schema
    jsonschema.Draft202012Validator.check_schema(schema)
    parts = [schema]
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict) and part.get("type") == "object":
            assert part["additionalProperties"] is False and set(part["required"]) == set(part["properties"])
            assert all(len(field.get("description", "")) > 10 for field in part["properties"].values()), part
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


def test_a_missing_receipt_shows_also_the_newest(workdir):
    for name in ("one", "two", "four"):
        content = workdir.receipt(name).read_bytes()
        workdir.receipt(name).unlink()
        (line,) = findings(workdir)
        assert line.startswith(f"{name}.json: the receipt at place ") and line.endswith("is missing")
        workdir.receipt(name).write_bytes(content)
    shutil.rmtree(workdir.receipts)
    lines = findings(workdir)
    assert lines[0] == "receipts: the folder is missing" and len(lines) == 5


def test_a_receipt_outside_the_chain_shows(workdir):
    """Taken out of the catalog, entered at another place, or without its predecessor."""
    workdir.receipt("four").unlink()
    with catalog_of(workdir) as catalog:
        catalog.db.execute("DELETE FROM receipts WHERE request='four'")
    assert findings(workdir) == ["receipts: finished requests without a receipt in the catalog: four"]
    with catalog_of(workdir) as catalog:
        catalog.db.execute("UPDATE receipts SET sequence=9 WHERE request='three'")
    assert any("the catalog's chain has gaps: 1, 2, 9" in line for line in findings(workdir))
    assert any("three.json: is not of this workdir or not in its place" in line for line in findings(workdir))
    with catalog_of(workdir) as catalog:
        catalog.db.execute("UPDATE receipts SET sequence=3 WHERE request='three'")
        catalog.db.execute("UPDATE receipts SET digest='' WHERE request='two'")
    assert "three.json: does not follow the receipt that the catalog has before it" in findings(workdir)


def paths_of(values, path=()):
    """Every part of a receipt but the whole."""
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield (*path, key)
        yield from paths_of(values[key], (*path, key))


def edits_of(whole):
    """Every part of a receipt, and the receipt with another value in its place."""
    for path in paths_of(whole):
        value = functools.reduce(lambda part, key: part[key], path, whole)
        edit = f"{value}0"
        if isinstance(value, bool | int | float):
            edit = not value if isinstance(value, bool) else value + 1
        yield path, replaced(whole, path, edit)


def test_every_edit_shows(checker, erased):
    """Each field of a receipt is covered by its digest, and a digest made to fit by the chain."""
    whole = stored(Layout(erased[0]), "four")
    assert checker(whole) == ()
    for path, edited in edits_of(whole):
        assert checker(edited), path
        assert path == ("digest",) or checker(sealed(edited)), path


def test_reordered_and_foreign_receipts_show(workdir, erased, tmp_path):
    one, two = workdir.receipt("one").read_bytes(), workdir.receipt("two").read_bytes()
    workdir.receipt("one").write_bytes(two)
    workdir.receipt("two").write_bytes(one)
    lines = "\n".join(findings(workdir))
    assert "one.json: holds the receipt of 'two'" in lines and "two.json: holds the receipt of 'one'" in lines
    shutil.copytree(erased[0] / "receipts", workdir.receipts, dirs_exist_ok=True)
    with small_run(tmp_path / "other") as run:
        build(run)
        erase.request_erasure(run, run.catalog.live("train").ids[:1], request="one")
    for name in ("one", "zero"):
        shutil.copy(run.layout.receipt("one"), workdir.receipt(name))
    lines = "\n".join(findings(workdir))
    assert "one.json: was replaced" in lines and "left no tombstone" in lines
    assert "receipts: 'zero.json' is not in the catalog" in lines


def test_what_was_purged_and_is_there_again_shows(workdir, erased):
    """Names are planted into the receipt and into the catalog so that each kind is recognised by its hash."""
    whole = stored(workdir, "four")
    images, tombstones = RowFile(workdir.images, (8, 8, 1), np.uint8), whole["records"]["records"]
    plants = (
        ("1 of the slices that", lambda c: workdir.slice("f00d").mkdir()),
        ("1 of the clusterings that", lambda c: workdir.clustering("f00d").mkdir()),
        ("manifests that were removed are there: 77", lambda c: c.db.execute("UPDATE manifests SET version=77")),
        ("1 stored rows that belong to no record", lambda c: images.view("r+").__setitem__(c.free_rows()[0], 1)),
        ("1 of its records are still", lambda c: c.erase(c.live("test").ids[:1], "four")),
        ("1 of its records left no tomb", lambda c: c.db.execute("DELETE FROM tombstones WHERE hash=?", tombstones)),
    )
    with catalog_of(workdir) as catalog:
        whole["purged"]["slices"].append(catalog.salted("slice", "f00d"))
        whole["purged"]["clusterings"].append(catalog.salted("clustering", "f00d"))
        whole["purged"]["manifests"].append(77)
    write_json(workdir.receipt("four"), sealed(whole))
    before = set(findings(workdir, "four"))
    for message, plant in plants:
        with catalog_of(workdir) as catalog:
            plant(catalog)
        after = set(findings(workdir, "four"))
        (new,) = after - before
        assert f"four.json: {message}" in new
        before = after


def test_an_erased_record_or_owner_that_is_live_again_shows(workdir, erased):
    (first, *_), owner = erased[1:]
    with catalog_of(workdir) as catalog:
        catalog.db.execute("UPDATE records SET id=? WHERE id=?", (first, catalog.live("test").ids[0]))
        catalog.db.execute("UPDATE records SET owner=? WHERE id=?", (owner, catalog.live("test").ids[1]))
    assert sorted(findings(workdir)) == [
        "one.json: 1 of its records are live",
        "three.json: 1 of its records are live",
        "two.json: 1 of its owners have records that are live",
    ]


def test_a_row_of_the_catalog_that_tells_another_story_shows(workdir):
    with catalog_of(workdir) as catalog:
        request = requests.get(catalog, "four")
        for field, value in (("requester", "x"), ("records", []), ("work", request.body["work"] | {"images": 1})):
            requests._store(catalog, dataclasses.replace(request, body=request.body | {field: value}))
            assert any("than the catalog" in line for line in findings(workdir, "four")), field


def test_a_slice_of_live_records_that_was_made_again_is_no_finding(workdir):
    """The same slice may come back by a later build; it is younger than the purge, and that decides."""
    whole = stored(workdir, "four")
    with catalog_of(workdir) as catalog:
        name = next(iter(catalog.slices()))
        whole["purged"]["slices"].append(catalog.salted("slice", name))
        write_json(workdir.receipt("four"), sealed(whole))
    assert any("1 of the slices" in line for line in findings(workdir, "four"))
    with catalog_of(workdir) as catalog:
        catalog.db.execute("UPDATE slices SET created=4e9 WHERE digest=?", (name,))
    assert not any("of the slices" in line for line in findings(workdir, "four"))


def test_a_current_slice_with_other_bytes_shows(workdir):
    cluster = next(c for c in stored(workdir, "four")["clusters"] if c["after"])
    with catalog_of(workdir) as catalog:
        entries = catalog.manifest().entries.values()
        folder = workdir.slice(next(ref for ref in entries if catalog.salted("slice", ref) == cluster["after"]))
    arrays, metadata, step = checkpoints.load(folder)
    checkpoints.save(folder, dict(arrays) | {"bias": arrays["bias"] + 1}, metadata, step)
    assert findings(workdir, "four") == [
        f"four.json: the slice of cluster {cluster['cluster'][:12]} has other bytes than it says"
    ]
    checkpoints.save(folder, {**arrays, "bias": arrays["bias"].astype(np.float64)}, metadata, step)
    assert "cannot be used: bias must be float32 of 1 dimensions, is float64 [10]" in findings(workdir, "four")[1]
    shutil.rmtree(folder)
    assert "cannot be read" in findings(workdir, "four")[0]


# crafted receipts
@pytest.fixture(scope="module")
def checker(erased, tmp_path_factory):
    """Gives the findings about a file with the given bytes, or with the given values as JSON."""
    layout, path = Layout(erased[0]), tmp_path_factory.mktemp("crafted") / "receipt.json"
    with catalog_of(layout) as catalog:
        snapshot = verify_module._Snapshot(layout, catalog)

    def check(content):
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return verify_module._verdict(path, snapshot).findings

    return check


def test_what_is_no_receipt(checker):
    for content, message in (
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 500_000, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, ""),
        (b'{"schema": 1, "schema": 1}', "a key occurs twice"),
        (b"NaN", "is not JSON"),
        (b'{"sequence": 1e999}', "is not JSON"),
        (b'"\\ud800"', "is not JSON"),
        (b"[]", "is not of type"),
        (b"{}", "is a required property"),
    ):
        lines = checker(content)
        assert lines and message in lines[0], (content[:20], lines)
        assert all(len(line) < 1000 for line in lines), content[:20]


def test_crafted_fields(checker, erased):
    purged = {"state": "purged", "at": "2026-01-01T00:00:00.000+00:00"}
    for path, value, message in (
        (("request", "id"), "../../etc/passwd", r"\$.request.id"),
        (("sequence",), 10**400, r"\$.sequence"),
        (("sequence",), 10**12, "the catalog has none"),
        (("previous",), "0" * 64, "does not follow"),
        (("clusters", 0, "after"), "../../../etc", "after"),
        (("request", "states"), [purged] * 2, "out of order"),
        (("request", "states", 0, "at"), "9999-01-01T00:00:00.000+00:00", "run backwards"),
        (("more",), 1, "more"),
    ):
        lines = checker(sealed(replaced(stored(Layout(erased[0]), "one"), path, value)))
        assert any(re.search(message, line) for line in lines), (path, value, lines)
    edited = replaced(stored(Layout(erased[0]), "one"), ("sequence",), 1.0)
    assert "was edited: its content has another digest than it says" in checker(edited)


def test_files_that_are_too_large_or_missing(erased, tmp_path, monkeypatch):
    layout = Layout(erased[0])
    with catalog_of(layout) as catalog:
        for path in (tmp_path, tmp_path / "none.json"):
            with pytest.raises(UserError, match="no such file|is no file"):
                verify(layout, catalog, [path])
        monkeypatch.setattr(verify_module, "LARGEST", 100)
        (verdict,) = verify(layout, catalog, [layout.receipt("one")])
    assert verdict.findings == ("is larger than 100 bytes",)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
plain |= st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=5), plain, max_size=3)


@given(st.data(), plain, st.booleans())
def test_any_value_in_any_place_is_a_finding_and_no_traceback(checker, erased, data, value, sign):
    whole = stored(Layout(erased[0]), data.draw(st.sampled_from(["one", "two", "four"])))
    path = data.draw(st.sampled_from(list(paths_of(whole))))
    values = replaced(whole, path, value)
    with contextlib.suppress(ValueError):  # not every value has a digest
        values = sealed(values) if sign else values
    assert checker(values) or json.dumps(values, sort_keys=True) == json.dumps(whole, sort_keys=True), path
