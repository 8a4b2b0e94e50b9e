"""Random histories of a workdir against a plain-Python model: add, erase, process, rollback, unpin, crash.

Tuning and features are fast stand-ins that still depend on every member, in order, on the labels, and on the slice
that a stage starts from; what is under test is everything around them.
"""

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from helpers import small_config, small_source, with_items
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import add_source
from lmeraser_jax.training import tune as tune_module
from lmeraser_jax.training.jobs import parts
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tune import Tuned
from lmeraser_jax.unlearning import artifacts, audit, build, erase, purge, receipts, rollback
from lmeraser_jax.unlearning import run as runs
from lmeraser_jax.unlearning.run import Run, prepare_run

CONFIG = small_config(
    clustering__sample_size=10,
    clustering__cut="auto:3",
    clustering__min_members=0,
    tuning__slices=2,
    tuning__epochs=4,
    checkpoints__every_epochs=1,
)
POOL = small_source(train=60, test=2, public=2)
ITEMS = [item for item in POOL.items if item.split == "train"]
OTHERS = [item for item in POOL.items if item.split != "train"]
IMAGES = POOL.read(0, len(POOL.items)).images
PIXELS = {item.id: image for item, image in zip(POOL.items, IMAGES, strict=True)}
OWNERS = {item.id: f"owner-{i % 7}" for i, item in enumerate(ITEMS)}


def literal_slice(stream, images, labels, start, step) -> Slice:
    """What the stand-in tunes: numbers drawn from a hash of all that may matter."""
    sha = hashlib.sha256(json.dumps([stream, [int(label) for label in labels], step]).encode())
    sha.update(np.ascontiguousarray(images).tobytes())
    for leaf in (start or ())[:3]:
        sha.update(np.asarray(leaf).tobytes())
    rng = np.random.default_rng(np.frombuffer(sha.digest(), np.uint32))
    return Slice(*(rng.standard_normal(shape).astype(np.float32) for shape in ((28,), (16, 10), (10,))))


def fake_tune(problem, backbone, jobs, images, labels, mesh):
    for job in jobs:
        for step in (*job.snapshots, job.steps):
            part = literal_slice(job.stream, images[job.rows], labels[job.rows], job.start, step)
            yield Tuned(job, step, part, 0.5, None, 0.0)


def fake_features(run, records):
    images = np.asarray(run.images)[records.rows].reshape(len(records), -1).astype(np.float32)
    return np.ascontiguousarray(images[:, 16:32] + images[:, 32:48])


def fake_save(folder, arrays, metadata, step=0, earlier=None):
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    for number, tree in {**(earlier or {}), step: arrays}.items():
        np.savez(temporary / f"{number}.npz", **tree)
    temporary.rename(folder)


def fake_load(folder, step=None):
    try:
        step = max(int(path.stem) for path in folder.iterdir()) if step is None else step
        with np.load(folder / f"{step}.npz") as file:
            return {name: file[name] for name in file.files}, {}, step
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from error


@pytest.fixture(scope="module")
def backbone_only(tmp_path_factory):
    """The backbone of every history, made once."""
    folder = tmp_path_factory.mktemp("backbone")
    with prepare_run(folder / "run", CONFIG, jax.devices()[:1], POOL) as (run, _):
        return run.backbone


class Killed(BaseException):
    """A process that is killed: nothing catches it."""


STEPS = [(checkpoints, "save"), (artifacts, "write_bytes"), (purge, "remove_others"), (RowFile, "overwrite")]
STEPS += [(Catalog, "transaction"), (Catalog, "flush"), (receipts, "write_json"), (RowFile, "append")]


class History(RuleBasedStateMachine):
    """The model: what is live, what waits, who was erased; beside the real workdir."""

    backbone = None

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(tune_module, "tune", fake_tune)
        self.patch.setattr(Run, "features", fake_features)
        self.patch.setattr(checkpoints, "save", fake_save)
        self.patch.setattr(checkpoints, "load", fake_load)
        self.patch.setattr(runs, "_make_backbone", lambda layout, *args: layout.backbone.mkdir())
        self.patch.setattr(runs.frozen, "load", lambda folder: (self.backbone, runs.backbone_inputs(CONFIG)))
        self.live: set[str] = set()
        self.erased: set[str] = set()
        self.buried: set[str] = set()
        self.asked: list[str] = []
        self.fresh = False  # something was changed that no reconcile has seen
        self.stack = contextlib.ExitStack()

    @initialize(count=st.integers(12, 40))
    def begin(self, count):
        chosen = ITEMS[:count]
        self.enter(self.source(chosen))
        build.build(self.run)
        self.live = {item.id for item in chosen}

    def source(self, items):
        items = [item._replace(owner=OWNERS.get(item.id, "")) for item in [*items, *OTHERS]]
        return with_items(POOL, items, np.stack([PIXELS[item.id] for item in items]))

    def enter(self, source=None):
        """Opens the workdir as the next command would."""
        opened = prepare_run(
            Path(self.folder.name) / "run", CONFIG, jax.devices()[:1], source or self.source(ITEMS[:2])
        )
        self.run, _ = self.stack.enter_context(opened)

    def reopen(self):
        self.stack.close()
        self.enter()

    @rule(numbers=st.sets(st.integers(0, len(ITEMS) - 1), min_size=1, max_size=12), now=st.booleans())
    def add(self, numbers, now):
        chosen = [ITEMS[i] for i in sorted(numbers)]
        add_source(self.run.layout, self.run.catalog, self.source(chosen), CONFIG)
        self.live |= {item.id for item in chosen} - self.erased - {i for i in OWNERS if OWNERS[i] in self.buried}
        self.fresh = True
        if now:
            self.settle()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 6), owner=st.booleans(), quarantine=st.booleans(), defer=st.booleans())
    def erase(self, data, count, owner, quarantine, defer):
        names = data.draw(st.lists(st.sampled_from(sorted(self.live | self.erased)), max_size=count, unique=True))
        owners = sorted({OWNERS[name] for name in self.live})
        who = data.draw(st.sampled_from(owners)) if owner and owners else ""
        if not names and not who:
            return
        name = f"request-{len(self.asked)}"
        done = erase.request_erasure(self.run, names, [who] if who else [], name, "", "", quarantine, defer)
        assert done.request.state == ("accepted" if defer else "purged")
        self.mark(names, who, name)
        self.fresh = defer

    def mark(self, names, who, name):
        gone = set(names) | {i for i in self.live if who and OWNERS[i] == who}
        self.live -= gone
        self.erased |= gone
        self.buried |= {who} - {""}
        self.asked.append(name)

    @rule()
    def settle(self):
        erase.process(self.run)
        self.fresh = False

    @precondition(lambda self: self.run.catalog.manifest().entries)
    @rule(data=st.data())
    def roll_back(self, data):
        key = data.draw(st.sampled_from(sorted(self.run.catalog.manifest().entries)))
        version = data.draw(st.sampled_from(rollback.versions(self.run, key)))
        pinned = self.run.catalog.pins().keys()
        try:
            rollback.rollback(self.run, key, version.ref)
        except UserError as error:
            if "a waiting erasure removes" in str(error):
                assert requests.any_open(self.run.catalog) and key not in self.run.catalog.pins().keys() - pinned
                return
            assert "ended at once" in str(error) and key not in self.run.catalog.pins()
        self.fresh = False
        entries = self.run.catalog.manifest().entries
        assert entries.get(key, version.ref) == version.ref or key not in self.run.catalog.pins()

    @precondition(lambda self: self.run.catalog.pins())
    @rule()
    def unpin(self):
        rollback.unpin(self.run, sorted(self.run.catalog.pins())[0])
        self.fresh = False

    @rule(data=st.data(), at=st.integers(0, 40), defer=st.booleans())
    def crash(self, data, at, defer):
        """The process dies before the at-th write of an erasure or of a reconcile; the next command goes on."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.live or {""})), max_size=3, unique=True))
        name, before = f"request-{len(self.asked)}", self.run.catalog.manifest()
        with self.patch.context() as patch:
            self.die_at(patch, at)
            with contextlib.suppress(Killed):
                if names and names != [""]:
                    erase.request_erasure(self.run, names, request=name, defer=defer)
                else:
                    erase.process(self.run)
        self.reopen()
        accepted = requests.get(self.run.catalog, name)
        if accepted is not None:
            self.mark(names, "", name)
        after = self.run.catalog.manifest()
        assert after.version in (before.version, before.version + 1)
        assert after.version > before.version or after == before
        self.fresh = True

    def die_at(self, patch, at):
        calls = []

        def counted(function):
            def wrapper(*args, **kwargs):
                calls.append(function)
                if len(calls) > at:
                    raise Killed
                return function(*args, **kwargs)

            return wrapper

        for owner, name in STEPS:
            patch.setattr(owner, name, counted(getattr(owner, name)))

    @invariant()
    def live_records_are_the_models(self):
        if hasattr(self, "run"):
            assert set(self.run.catalog.live("train").ids) == self.live
            assert all(self.run.catalog.is_tombstoned(name) for name in self.erased)

    @invariant()
    def quarantine_is_that_of_open_requests(self):
        if hasattr(self, "run"):
            waiting = requests.listed(self.run.catalog, only_open=True)
            wanted = {key for request in waiting if request.body["quarantine"] for key in request.body["members"]}
            assert wanted <= self.run.catalog.quarantined()
            assert waiting or not self.run.catalog.quarantined()

    @invariant()
    def a_finished_state_is_what_the_live_records_call_for(self):
        if not hasattr(self, "run") or self.fresh or requests.any_open(self.run.catalog):
            return
        verdict = audit.audit(self.run)
        assert verdict.ok, verdict.text()
        manifest, pins = self.run.catalog.manifest(), self.run.catalog.pins()
        assert all(manifest.entries[key] == ref for key, ref in pins.items())
        for key in set(manifest.entries) - set(pins):
            found = artifacts.load_slice(self.run, manifest.entries[key])
            wanted = self.literal(key)
            assert all((a == b).all() for a, b in zip(found[:3], wanted[:3], strict=True))
        self.receipts_are_chained()

    def literal(self, key) -> Slice:
        """The slice of a cluster, stage by stage, from the model's own records."""
        records = self.run.catalog.live("train")
        names = sorted(name for name, home in zip(records.ids, records.clusters, strict=True) if home == key)
        label = {item.id: item.label for item in ITEMS}
        part, start = parts(names, CONFIG.tuning.slices, CONFIG.seed), None
        (row,) = [r for r in self.run.catalog.slices().values() if r.digest == self.run.catalog.manifest().entries[key]]
        chain = [row]
        while chain[0].parent:
            chain.insert(0, self.run.catalog.slice(chain[0].parent))
        for stage, made in zip(np.unique(part).tolist(), chain, strict=True):
            inside = [name for name, number in zip(names, part, strict=True) if number <= stage]
            images = np.stack([PIXELS[name] for name in inside])
            stream = key if stage == 1 else f"{key}/{stage}"
            start = literal_slice(stream, images, [label[name] for name in inside], start, made.steps)
        return start

    def receipts_are_chained(self):
        chain, last = self.run.catalog.receipts(), ""
        assert {link.request for link in chain} == set(self.asked)
        for number, link in enumerate(chain, 1):
            values = json.loads(self.run.layout.receipt(link.request).read_text())
            own = values.pop("digest")
            assert (values["sequence"], values["previous"]) == (number, last) and digest(values) == own == link.digest
            last = own

    def teardown(self):
        self.stack.close()
        self.patch.undo()
        self.folder.cleanup()


def test_random_histories(backbone_only):
    History.backbone = backbone_only
    hypothesis.stateful.run_state_machine_as_test(
        History, settings=hypothesis.settings(max_examples=10, stateful_step_count=12, deadline=None, derandomize=True)
    )


@pytest.mark.slow
def test_more_random_histories(backbone_only):
    History.backbone = backbone_only
    hypothesis.stateful.run_state_machine_as_test(
        History, settings=hypothesis.settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
    )
