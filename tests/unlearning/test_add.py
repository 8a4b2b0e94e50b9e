"""Adding records: the state is that of training on everything at once; only touched slices are tuned."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import SMALL, changed, files_of, small_config, small_run, small_source, without
from PIL import Image

from lmeraser_jax.cli.main import main
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import sample_rank
from lmeraser_jax.unlearning import erase, rollback
from lmeraser_jax.unlearning.add import add, open_source
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run


def ranked():
    """Private ids in the order of sampling."""
    ids = [item.id for item in small_source().items if item.split == "train"]
    return sorted(ids, key=lambda name: sample_rank(0, name))


def only(ids):
    """The whole source's records with these ids."""
    source = small_source()
    return without(source, {item.id for item in source.items} - set(ids))


pytestmark = pytest.mark.usefixtures("fast_files")
UNSAMPLED, MIXED = tuple(ranked()[-3:]), tuple(ranked()[:6] + ranked()[-6:])


@pytest.fixture(scope="module")
def built(tmp_path_factory, fast_files):
    """{added ids: a workdir built without them}, and the state of a build on everything."""
    folder, workdirs = tmp_path_factory.mktemp("built"), {}
    for number, ids in enumerate((UNSAMPLED, MIXED)):
        workdirs[ids] = folder / f"run{number}"
        with small_run(workdirs[ids], without(small_source(), set(ids))) as run:
            build(run)
    with small_run(folder / "whole") as run:
        build(run)
        return workdirs, state(run)


@contextlib.contextmanager
def copied(workdir, target):
    shutil.copytree(workdir, target, copy_function=shutil.copy2)
    with open_run(target, devices=jax.devices()[:1], write=True) as run:
        yield run


def test_adding_equals_training_on_everything_and_the_second_time_does_nothing(built, tmp_path):
    for number, ids in enumerate((UNSAMPLED, MIXED)):
        with copied(built[0][ids], tmp_path / str(number)) as run:
            dataset, config = run.catalog.get("dataset"), run.layout.config.read_bytes()
            imported, outcome = add(run, only(ids))
            assert (imported.added, imported.known, outcome.published) == (len(ids), 0, True)
            assert differences(state(run), built[1]) == [] and outcome.reclustered == (ids is MIXED)
            assert run.catalog.get("dataset") == dataset and run.layout.config.read_bytes() == config
            imported, outcome = add(run, only(ids))
            assert (imported.added, imported.known) == (0, len(ids))
            assert (outcome.published, outcome.retuned) == (False, 0)


def test_unsampled_records_tune_only_the_clusters_they_join(built, tmp_path):
    with copied(built[0][UNSAMPLED], tmp_path / "run") as run:
        before, files = state(run), {n: files_of(run, n) for n in run.catalog.manifest().entries.values()}
        _, outcome = add(run, only(UNSAMPLED))
        after = state(run)
        joined = {after["assignment"][name] for name in UNSAMPLED}
        assert {key for key in after["slices"] if before["slices"][key] != after["slices"][key]} == joined
        assert (outcome.retuned, outcome.reclustered) == (len(joined), False) and len(joined) < outcome.clusters
        for key in set(after["slices"]) - joined:
            assert files_of(run, after["slices"][key]) == files[before["slices"][key]]


def test_adding_and_erasing_is_never_having_added(built, tmp_path):
    with copied(built[0][MIXED], tmp_path / "run") as run:
        before = state(run)
        add(run, only(MIXED))
        erase.request_erasure(run, MIXED)
        assert differences(state(run), before) == []
        imported, outcome = add(run, only(MIXED))
        assert (imported.added, imported.erased, outcome.published) == (0, len(MIXED), False)
        assert differences(state(run), before) == []


def test_what_does_not_fit_is_refused_and_changes_nothing(built, tmp_path):
    known = only(ranked()[8:11])
    with copied(built[0][MIXED], tmp_path / "run") as run:
        before, rows = state(run), run.layout.images.read_bytes()
        for source, message in (
            (changed(known, {known.items[0].id}, lambda label: label), "have another content or label"),
            (without(known, {item.id for item in known.items}), "there is no training record"),
        ):
            with pytest.raises(UserError, match=message):
                add(run, source)
        assert differences(state(run), before) == [] and run.layout.images.read_bytes() == rows


def test_a_holdout_is_drawn_as_at_the_first_import(tmp_path):
    config = small_config(data__holdout=0.3, clustering__sample_size=20)
    with small_run(tmp_path / "run", without(small_source(), set(MIXED)), config) as run:
        build(run)
        add(run, only(MIXED))
        whole, held = state(run), run.catalog.live("holdout").ids
    with small_run(tmp_path / "whole", config=config) as run:
        build(run)
        assert differences(whole, state(run)) == [] and run.catalog.live("holdout").ids == held
        assert set(held) & set(MIXED) and not set(MIXED) <= set(held)


@pytest.fixture
def pictures(tmp_path):
    """A source in colour as .npz and as a folder with the same pixels, ids and labels; owners are in a CSV."""
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    labels, rows = np.arange(60) % 3, ["file,label,owner"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "new" / "train" / "abc"[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        rows.append(f"train/{'abc'[label]}/{i}.png,,hand-{i // 4}")
    for name in ("test", "public"):
        (tmp_path / "new" / name / "unheard-of").mkdir(parents=True)
        Image.fromarray(images[0]).save(tmp_path / "new" / name / "unheard-of" / "0.png")
    (tmp_path / "owners.csv").write_text("\n".join(rows))
    ids = [f"train/{'abc'[label]}/{i}.png" for i, label in enumerate(labels)]

    def npz(name, chosen, test=False):
        columns = {"images": images[chosen], "labels": labels[chosen], "ids": np.array(ids)[chosen]}
        values = {f"train_{key}": value for key, value in columns.items()}
        values |= {"test_images": images[:3], "test_labels": labels[:3]} if test else {}
        values |= {"public_images": images[:9], "public_labels": labels[:9]} if test else {}
        np.savez(tmp_path / name, class_names=np.array(list("abc")), **values)
        return str(tmp_path / name)

    return npz, str(tmp_path / "new"), str(tmp_path / "owners.csv"), ids


def test_the_command_adds_a_file_and_a_folder_to_a_workdir_of_another_kind(tmp_path, pictures, capsys):
    npz, folder, owners, ids = pictures
    flags = [f"--config.{group}.{name}={value}" for group, values in SMALL.items() for name, value in values.items()]
    path = npz("first.npz", slice(0, 40), test=True)
    run = f"--workdir={tmp_path / 'run'}"
    assert main(["train", run, "--config.data.source=npz", f"--config.data.path={path}", *flags]) == 0
    config = (tmp_path / "run" / "config.json").read_bytes()
    assert main(["add", run, f"--source={npz('one.npz', slice(40, 41))}", "--wait=1"]) == 0, "one image is enough"
    assert "imported 1 records" in capsys.readouterr().out
    assert main(["add", run, f"--source={folder}", f"--labels={owners}", "--json=-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["imported"] | {"added": 19, "known": 41, "left_out": 2} == values["imported"]
    assert values["published"] and (tmp_path / "run" / "config.json").read_bytes() == config
    assert main(["add", run, f"--source={folder}"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    with open_run(tmp_path / "run") as opened:
        assert opened.catalog.owned("hand-14") == sorted(ids[56:60])
        assert set(opened.catalog.live("train").ids) == set(ids)
    assert main(["audit", run]) == 0


def test_other_kinds_of_sources_are_refused(built, tmp_path, pictures):
    npz, folder, owners, _ = pictures
    with open_run(built[0][MIXED]) as run:
        for path in ("digits", "tfds", str(tmp_path / "nowhere")):
            with pytest.raises(UserError, match="must be an .npz file or a folder"):
                open_source(run, path)
        for path, labels, message in (
            ("", "", "--source=FILE.npz or --source=FOLDER is missing"),
            (str(tmp_path / "nowhere.npz"), "", "no such file"),
            (owners, "", "must be an .npz file or a folder"),
            (str(tmp_path), "", "has no folder train"),
            (npz("some.npz", slice(0, 3)), owners, "--labels=.*goes with a folder"),
        ):
            with pytest.raises(UserError, match=message):
                open_source(run, path, labels)
        assert open_source(run, folder).shape == (8, 8, 3)


def test_requests_that_wait_are_finished_by_an_add_that_brings_nothing(built, tmp_path):
    with copied(built[0][MIXED], tmp_path / "run") as run:
        erase.request_erasure(run, ranked()[7:8], defer=True)
        add(run, only(ranked()[8:9]))
        assert [request.state for request in requests.listed(run.catalog)] == ["purged"]


def test_new_members_of_pinned_clusters_are_published_without_tuning(built, tmp_path):
    """A pinned slice stays, so no entry changes; its new members are told their cluster all the same."""
    workdirs, expected = built
    with copied(workdirs[UNSAMPLED], tmp_path / "run") as run:
        manifest = run.catalog.manifest()
        for key, ref in manifest.entries.items():
            rollback.rollback(run, key, ref)
        _, outcome = add(run, only(UNSAMPLED))
        assert outcome.retuned == 0 and outcome.published and run.catalog.manifest().entries == manifest.entries
        assert state(run)["assignment"] == expected["assignment"] and audit(run).ok
        assert not build(run).published
