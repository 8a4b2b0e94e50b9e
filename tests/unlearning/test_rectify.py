"""Rectification: state(rectify(train(D))) == state(train(D with the corrected records)), and what it refuses.

With the stand-ins, which are functions of all that may matter to a slice; `test_exactness` has the real program.
"""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import rectified, small_config, small_run, small_source, without
from PIL import Image
from test_exactness import train_from_scratch

from lmeraser_jax.cli.main import main
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning import build as build_module
from lmeraser_jax.unlearning import erase, purge, rectify, request_files
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.rectify import Change, request_rectification
from lmeraser_jax.unlearning.run import prepare_run
from lmeraser_jax.unlearning.verify import verify_all

pytestmark = pytest.mark.usefixtures("fast_files")
PICTURES = np.random.default_rng(8).integers(0, 17, (4, 8, 8, 1)).astype(np.uint8) * 15


def sampled(run):
    return run.catalog.sample("train", 30).ids[3]


def unsampled(run):
    return next(name for name in run.catalog.live("train").ids if name not in run.catalog.sample("train", 30).ids)


def a_picture(run):
    return [[Change(sampled(run), image=PICTURES[0])]]


def picture_and_label(run):
    return [[Change(unsampled(run), image=PICTURES[1], label=5)]]


def only_a_label(run):
    return [[Change(sampled(run), label=7)]]


def a_batch(run):
    return [[*a_picture(run)[0], *picture_and_label(run)[0]]]


def in_turn(run):
    return [*a_picture(run), *picture_and_label(run), [Change(sampled(run), image=PICTURES[2])]]


def and_back(run):
    record = run.catalog.at(run.catalog.rows([sampled(run)]).values())
    return [*a_picture(run), [Change(sampled(run), int(record.labels[0]), np.array(run.images[record.rows[0]]))]]


SETTINGS = {
    "private": {},
    "snapshots": {"tuning__epochs": 6, "checkpoints__every_epochs": 2},
    "public": {"clustering__sample_from": "public"},
    "owners": {"clustering__partition": "owner"},
    "random": {"clustering__partition": "random", "clustering__shards": 5},
}
KINDS = (a_picture, picture_and_label, only_a_label, a_batch, in_turn, and_back)
CASES = [pytest.param("private", kind, id=kind.__name__) for kind in KINDS]
CASES += [pytest.param(name, in_turn, id=name, marks=pytest.mark.slow) for name in SETTINGS if name != "private"]


@pytest.fixture(scope="module")
def trained(fast_files, tmp_path_factory):
    """A run on a copy of a workdir that was trained with some settings."""
    folders = {}

    @contextlib.contextmanager
    def copied(folder, name="private"):
        config = small_config(**SETTINGS[name])
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("trained") / "run"
            train_from_scratch(folders[name], small_source(), config=config)
        with small_run(shutil.copytree(folders[name], folder), config=config) as run:
            yield run

    return copied


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rectifying_equals_having_had_the_corrected_records(trained, tmp_path, name, kind):
    source = small_source()
    with trained(tmp_path / "run", name) as run:
        for changes in kind(run):
            assert request_rectification(run, changes).outcome.retuned > 0
            source = rectified(source, changes)
        after = state(run)
        assert run.catalog.erased() == {} and not requests.any_open(run.catalog) and purge.leftovers(run) == []
        assert all(verdict.ok for verdict in verify_all(run.layout, run.catalog))
        assert kind is not a_batch or audit(run).ok
    assert (
        differences(after, train_from_scratch(tmp_path / "scratch", source, config=small_config(**SETTINGS[name])))
        == []
    )


def test_erasures_and_rectifications_that_wait_together(trained, tmp_path):
    """A record that is to be rectified may be erased meanwhile, by id or owner; no content of it comes back."""
    with trained(tmp_path / "run") as run:
        first, second, third = (
            Change(name, image=picture)
            for name, picture in zip([sampled(run), *run.catalog.live("train").ids[:2]], PICTURES)
        )
        request_rectification(run, [first, second], "r1", defer=True)
        build_module.remove_leftovers(run)  # the new versions are live, and the old ones not purged yet
        request_rectification(run, [third], "r2", defer=True)
        erase.request_erasure(run, [first.id, third.id], request="e1", defer=True)
        assert run.catalog.edited() == {} and len(run.catalog.erased()) == 4
        assert [request.id for request in erase.process(run)[1]] == ["r1", "r2", "e1"]
        after = state(run)
        assert audit(run).ok and all(verdict.ok for verdict in verify_all(run.layout, run.catalog))
        with pytest.raises(UserError, match=f"(?s)nothing is rectified.*erased records: {first.id}"):
            request_rectification(run, [first, second])
    expected = rectified(without(small_source(), {first.id, third.id}), [second])
    assert differences(after, train_from_scratch(tmp_path / "scratch", expected)) == []


@pytest.mark.parametrize("moment", ["current_plan", "tune_missing"])
def test_a_request_that_arrives_during_a_build_waits_for_the_next(trained, tmp_path, monkeypatch, moment):
    with trained(tmp_path / "run") as run:
        (change,), (late,) = a_picture(run)[0], picture_and_label(run)[0]
        real, accepted = getattr(build_module, moment), []

        def accept_late(*arguments):
            if not accepted:
                accepted.append(request_rectification(run, [late], "late", quarantine=True, defer=True))
            return real(*arguments)

        monkeypatch.setattr(build_module, moment, accept_late)
        request_rectification(run, [change], "first")
        assert requests.get(run.catalog, "late").state == "accepted" and run.catalog.quarantined()
        assert set(run.catalog.edited()) == {late.id}
        build(run)
        assert requests.get(run.catalog, "late").state == "purged" and not run.catalog.quarantined()
        after = state(run)
    source = rectified(small_source(), [change, late])
    assert differences(after, train_from_scratch(tmp_path / "scratch", source)) == []


def test_edits_that_cannot_be_used_are_all_named_and_change_nothing(trained, tmp_path):
    Image.fromarray(PICTURES[0, ..., 0]).resize((9, 8)).save(tmp_path / "wide.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with trained(tmp_path / "run") as run:
        catalog, (name, other, third) = run.catalog, run.catalog.live("train").ids[:3]
        public = catalog.live("public").ids[0]
        erase.request_erasure(run, [other])
        erase.request_erasure(run, [third], request="waits", defer=True)
        before = list(catalog.db.iterdump())
        cases = [
            (
                ["no", "[1]", '{"id": "a", "id": "b"}'],
                ["line 1: not JSON", "line 2: must be an object", "line 3: not JSON"],
            ),
            ([{"id": name}, {"label": "1"}, {"id": name, "lable": "1"}], ["line 1: must have id, and image or label"]),
            (
                [{"id": name, "lable": "1"}, {"id": name, "label": 1}],
                ["1: has lable; legal: id, image", "2: label must be"],
            ),
            ([{"id": name, "label": "10"}], ["line 1: there is no class 10; classes: 0, 1"]),
            (
                [{"id": name, "image": file} for file in ("none.png", "wide.png", "torn.png")],
                ["no such file", "8 x 9 p", "torn"],
            ),
            ([{"id": name, "label": "1"}, {"id": name, "label": "2"}], [f"several edits for one record: {name}"]),
            (
                [{"id": i, "label": "1"} for i in ("nobody", name, other, third, public)],
                [
                    "unknown records: nobody",
                    f"erased records: {other}",
                    f"an open request .*{third}",
                    f"public .*{public}",
                ],
            ),
            ([], ["has no edit"]),
        ]
        for edits, messages in cases:
            for message in messages:
                with pytest.raises(UserError, match=f"(?s)(?=.*nothing is rectified).*{message}"):
                    lines = request_files.read_edits(file_of(tmp_path / "edits.jsonl", edits))
                    request_rectification(run, rectify.changes_of(catalog, lines, tmp_path))
        assert list(catalog.db.iterdump()) == before


def file_of(path, edits) -> str:
    path.write_text("".join(f"{edit if isinstance(edit, str) else json.dumps(edit)}\n" for edit in edits))
    return str(path)


def test_a_request_is_repeated_by_its_id_and_one_without_change_is_none(trained, tmp_path):
    with trained(tmp_path / "run") as run:
        (change,) = only_a_label(run)[0]
        same = Change(
            unsampled(run), int(run.catalog.live("train").labels[run.catalog.live("train").ids.index(unsampled(run))])
        )
        assert request_rectification(run, [same], "r1") is None and requests.listed(run.catalog) == []
        first = request_rectification(run, [same, change], "r1", quarantine=True, defer=True)
        assert (
            first.records == 1 and rectify.unchanged([same, change], first.request) == 1 and run.catalog.quarantined()
        )
        with pytest.raises(UserError, match="an open request erases or rectifies these"):
            request_rectification(run, [change], "r2")
        assert request_rectification(run, [change, same], "r1").outcome.retuned == 1
        request_rectification(run, [dataclasses.replace(change, image=PICTURES[0])], "r2")
        again = request_rectification(run, [same, change], "r1")
        assert again.outcome is None and again.request.state == "purged"
        for other in ([change], [same, dataclasses.replace(change, label=1)]):
            with pytest.raises(UserError, match="--request=r1: was used for another request"):
                request_rectification(run, other, "r1")
        assert request_rectification(run, [change]) is None, "the record has this label"


def test_an_import_brings_no_old_version_back(trained, tmp_path):
    """The source still has it; a corrected source fits, too, also while the request waits."""
    config = small_config()
    with trained(tmp_path / "run") as run:
        changes = a_batch(run)[0]
        request_rectification(run, changes, defer=True)
    for source in (rectified(small_source(), changes), small_source()):
        with prepare_run(tmp_path / "run", config, source=source, reimport=True) as (run, imported):
            assert imported.added == imported.mended == 0
            build(run)
            assert set(run.catalog.contents()) >= {content_hash(c.image) for c in changes}
            assert run.catalog.erased() == {}


def test_by_command_line_while_another_process_writes(trained, tmp_path, capsys):
    Image.fromarray(PICTURES[0, ..., 0]).save(tmp_path / "new.png")
    with trained(tmp_path / "run") as run:
        name, before = sampled(run), state(run)
    edits = file_of(tmp_path / "edits.jsonl", [{"id": name, "image": "new.png", "label": "4"}])
    command = ["rectify", f"--workdir={tmp_path / 'run'}", f"--edits={edits}"]
    assert main([*command, "--dry_run", "--json=-"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    with writer_lock(Layout(tmp_path / "run")):
        assert main([*command, "--defer", "--request=r1", "--quarantine"]) == 0
    assert "accepted: request r1 (accepted), 1 records" in capsys.readouterr().out
    with small_run(tmp_path / "run") as run:
        assert state(run) == before | {"records": state(run)["records"], "assignment": state(run)["assignment"]}
        assert len(run.catalog.live("train")) == len(before["records"]) - 1 and run.catalog.quarantined()
    assert main([*command, "--request=r1"]) == 0
    assert "rectified 1 records (request r1)" in capsys.readouterr().out
    receipt = json.loads((tmp_path / "run" / "receipts" / "r1.json").read_text())
    assert receipt["request"]["kind"] == "rectify" and receipt["purged"]["rows"] == 1
    assert (receipt["work"]["clusters_tuned"], receipt["work"]["images"]) == (
        len(estimate["clusters"]),
        estimate["images"],
    )
    assert main(command) == 0
    assert "nothing to rectify" in capsys.readouterr().out
    with small_run(tmp_path / "run") as run:
        expected = rectified(small_source(), [Change(name, 4, PICTURES[0])])
        assert differences(state(run), train_from_scratch(tmp_path / "scratch", expected)) == []
