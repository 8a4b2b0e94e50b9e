"""lmeraser rectify: replace the content or the label of records, and re-tune only the clusters that they touch.

  lmeraser rectify --workdir=DIR --edits=FILE.jsonl
                   [--dry_run] [--defer] [--quarantine] [--request=ID] [--requester=WHO] [--reason=WHY]
                   [--mode=newton|paper|warm [--force]]

A line of FILE is {"id": "...", "image": "FILE", "label": "CLASS"}, or, of texts, {"id": "...", "query": "...",
"response": "..."}; what a line does not name stays as it is. Image files lie relative to the folder of FILE.

The record keeps its id and its owner. The state is then the one that training with the corrected record gives, bit for
bit, and the old version is purged as after an erasure. The command accepts the request at once and for good, even while
another process writes; then it serves the request, or with --defer the next lmeraser process does. If an edit cannot
be used, because its id is unknown, erased or part of a request that waits, nothing is rectified. An edit that changes
nothing is left out; if no edit changes anything, no request is made. Later imports do not bring the old version back.

With --mode=newton, paper or warm the command publishes an approximate update of the touched clusters and leaves the
request open. Such an update gives no guarantee; the next lmeraser process replaces it by the exact slices. For a
corrected response or label warm is the best; for a corrected query or image newton and warm are as good.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lmeraser_jax.cli import common
from lmeraser_jax.cli.unlearn import REQUEST, details, estimate_text, refuse_mode, refuse_settings, serve_or_show
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError
from lmeraser_jax.progress import warn
from lmeraser_jax.unlearning import rectify, request_files, texts
from lmeraser_jax.unlearning.rectify import Change

STRAY = "edits are given as --edits=FILE.jsonl"
UNCHANGED = "nothing to rectify: the records are as the edits say; no request was made"
FLAGS = (
    common.Flag("edits", absolute, "file of JSON lines: an id in each, and what is new of its record"),
    *REQUEST,
)


def run(arguments: common.Arguments) -> int:
    refuse_settings(arguments)
    workdir, path = common.workdir_of(arguments), arguments["edits"]
    if not path:
        raise UserError("--edits=FILE.jsonl is missing: the ids, and what is new of their records")
    config = common.config_of(arguments)
    with common.catalog_of(workdir) as (layout, catalog):
        lines = request_files.read_edits(path)
        changes = rectify.changes_of(catalog, lines, Path(path).parent, config.data.max_pixels)
        if not arguments["defer"]:
            common.require_device()
        if arguments["dry_run"]:
            return _estimate(arguments, changes)
        refuse_mode(arguments, catalog)
        encoder = None
        if config.is_text:
            common.finished(arguments)  # with other settings, an edit would get other tokens
            encoder = texts.encoder_of(layout, catalog, config.text)
        request = rectify.accept(layout, catalog, changes, encoder, **details(arguments))
        if count := rectify.unchanged(changes, request):
            warn(f"{count} edits change nothing and are left out")
        if request is not None:
            return serve_or_show(arguments, layout, catalog, request)
    common.show(arguments, UNCHANGED, {"request": None, "outcome": None, "receipt": ""})
    return 0


def _estimate(arguments: common.Arguments, changes: Sequence[Change]) -> int:
    with common.opened(arguments, write=True) as run_:
        estimate = rectify.estimate(run_, changes, run_.encoder if run_.config.is_text else None)
    common.show(arguments, estimate_text(estimate, "rectify"), dataclasses.asdict(estimate))
    return 0
