"""A history of a workdir beside a plain-Python model: add, erase, process, rollback, unpin, crash.

Tuning, features and checkpoints are fast stand-ins, whose slices still depend on every member, in order, and on the
labels; everything around them is what is tested.
"""

import contextlib
import itertools
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from crash_points import Points
from fakes import fake_slice
from helpers import small_config, small_source, with_items
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.ingest import import_source
from lmeraser_jax.unlearning import artifacts, audit, build, erase, rollback
from lmeraser_jax.unlearning import run as runs
from lmeraser_jax.unlearning.run import prepare_run
from lmeraser_jax.unlearning.verify import verify_all

CLUSTERING = {"clustering__sample_size": 10, "clustering__cut": "auto:3", "clustering__min_members": 0}
CONFIG = small_config(**CLUSTERING, tuning__epochs=4, checkpoints__every_epochs=1)
MEMORY = Path("/dev/shm")  # thousands of small files are synced, which costs nothing there
POOL = small_source(train=60, test=2, public=2)
ITEMS = [item for item in POOL.items if item.split == "train"]
OTHERS = [item for item in POOL.items if item.split != "train"]
IMAGES = POOL.read(range(len(POOL.items))).rows
PIXELS = {item.id: image for item, image in zip(POOL.items, IMAGES, strict=True)}
OWNERS = {item.id: f"owner-{i % 7}" for i, item in enumerate(ITEMS)}


class Killed(BaseException):
    """A process that is killed: nothing catches it."""


class History(RuleBasedStateMachine):
    """The model: what is live, what waits, and what was erased, beside the real workdir."""

    backbone_folder = Path()

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.patch = pytest.MonkeyPatch()
        copied = self.backbone_folder
        self.patch.setattr(runs, "_make_backbone", lambda layout, *_: shutil.copytree(copied, layout.backbone))
        self.live: set[str] = set()
        self.erased: set[str] = set()
        self.erased_owners: set[str] = set()
        self.requests: list[str] = []
        self.changed = False  # something was changed that no build has seen
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

    @rule(numbers=st.sets(st.integers(0, len(ITEMS) - 1), min_size=1, max_size=12), now=st.booleans())
    def add(self, numbers, now):
        chosen = [ITEMS[i] for i in sorted(numbers)]
        import_source(self.run.layout, self.run.catalog, self.source(chosen), CONFIG, adding=True)
        self.live |= {item.id for item in chosen} - self.erased - {i for i in OWNERS if OWNERS[i] in self.erased_owners}
        self.changed = True
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
        name = f"request-{len(self.requests)}"
        self.request(names, [who] if who else [], name, quarantine, defer)
        assert requests.get(self.run.catalog, name).state == ("accepted" if defer else "purged")
        self.mark(names, who, name)
        self.changed = defer

    def request(self, names, owners, name, quarantine, defer):
        """Asks for an erasure, and serves it unless it is deferred."""
        erase.request_erasure(self.run, names, owners, name, "", "", quarantine, defer)

    def mark(self, names, owner, request):
        erased = set(names) | {name for name in self.live if owner and OWNERS[name] == owner}
        self.live -= erased
        self.erased |= erased
        self.erased_owners |= {owner} - {""}
        self.requests.append(request)

    @rule()
    def settle(self):
        self.serve()
        self.changed = False

    def serve(self):
        """Serves what waits."""
        erase.process(self.run)

    @precondition(lambda self: self.run.catalog.manifest().entries)
    @rule(data=st.data())
    def roll_back(self, data):
        key = data.draw(st.sampled_from(sorted(self.run.catalog.manifest().entries)))
        version = data.draw(st.sampled_from(rollback.versions(self.run.catalog, key)))
        pinned = self.run.catalog.pins().keys()
        try:
            rollback.rollback(self.run, key, version.ref)
        except UserError as error:
            if "a waiting erasure removes" in str(error):
                assert requests.any_open(self.run.catalog) and key not in self.run.catalog.pins().keys() - pinned
                return
            assert "ended at once" in str(error) and key not in self.run.catalog.pins()
        self.changed = False
        entries = self.run.catalog.manifest().entries
        assert entries.get(key, version.ref) == version.ref or key not in self.run.catalog.pins()

    @precondition(lambda self: self.run.catalog.pins())
    @rule()
    def unpin(self):
        rollback.unpin(self.run, sorted(self.run.catalog.pins())[0])
        self.changed = False

    @rule(data=st.data(), at=st.integers(0, 120), defer=st.booleans())
    def crash(self, data, at, defer):
        """The process dies before or after a write of an erasure or of a build; the next command goes on."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.live or {""})), max_size=3, unique=True))
        name, before = f"request-{len(self.requests)}", self.run.catalog.manifest()
        with self.patch.context() as patch:
            self.die_at(patch, at)
            with contextlib.suppress(Killed):
                if names and names != [""]:
                    erase.request_erasure(self.run, names, request=name, defer=defer)
                else:
                    erase.process(self.run)
        self.stack.close()
        self.enter()
        accepted = requests.get(self.run.catalog, name)
        if accepted is not None:
            self.mark(names, "", name)
        after = self.run.catalog.manifest()
        assert after.version in (before.version, before.version + 1)
        assert after.version > before.version or after == before
        self.changed = True

    def die_at(self, patch, at):
        points = itertools.count()

        def reached(label, half):
            if next(points) >= at:
                raise Killed

        Points(self.run.layout.root, patch, reached)

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
        if not hasattr(self, "run") or self.changed or requests.any_open(self.run.catalog):
            return
        verdict = audit.audit(self.run)
        assert verdict.ok, verdict.text()
        manifest, pins = self.run.catalog.manifest(), self.run.catalog.pins()
        assert all(manifest.entries[key] == ref for key, ref in pins.items())
        for key in set(manifest.entries) - set(pins):
            slice_ = artifacts.load_slice(self.run, manifest.entries[key])
            assert audit.leaves(slice_) == audit.leaves(self.expected_slice(key))
        assert {link.request for link in self.run.catalog.receipts()} == set(self.requests)
        verdicts = verify_all(self.run.layout, self.run.catalog)
        assert len(self.run.catalog.receipts()) == len(self.requests)
        assert [line for verdict in verdicts for line in verdict.findings] == []

    def expected_slice(self, key):
        """The slice of a cluster from the model's own records."""
        names, labels = self.run.catalog.members(key).ids, {item.id: item.label for item in ITEMS}
        steps = self.run.catalog.slices()[self.run.catalog.manifest().entries[key]].steps
        images, labels = [PIXELS[name] for name in names], [labels[name] for name in names]
        return fake_slice(self.run.tuning_spec, self.run.backbone, key, images, labels, steps)

    def teardown(self):
        self.stack.close()
        self.patch.undo()
        self.folder.cleanup()
