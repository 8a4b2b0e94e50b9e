"""lmeraser unlearn: erase records and re-tune the clusters they touched, and nothing else.

  lmeraser unlearn --workdir=DIR --records=ID,ID | --records_file=FILE | --owner=NAME,NAME | --like=IMAGE
                   [--dry_run] [--defer] [--quarantine] [--request=ID] [--requester=WHO] [--reason=WHY]

A file holds one id a line; a .csv has a column id or owner, a .jsonl lines {"id": ...} or {"owner": ...}. --like
finds the records that have exactly the pixels of an image, by the image file that they were imported from.

A request is accepted first, in an instant and for good, even while another process writes; then it is served: at
once, or with --defer by the next lmeraser process. A dry run says what it would cost and changes nothing. Nothing is
erased when an id or an owner is unknown.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from lmeraser_jax import interrupt
from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError

if TYPE_CHECKING:
    from lmeraser_jax.storage.catalog import Catalog
    from lmeraser_jax.storage.requests import Request
    from lmeraser_jax.unlearning.erase import Erasure, Estimate

STRAY = "ids are given as --records=ID,ID"


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_list("records", [], "ids, separated by commas", flag_values=flags)
    absl_flags.DEFINE_string("records_file", "", "file with ids or owners: text, .csv or .jsonl", flag_values=flags)
    absl_flags.DEFINE_list("owner", [], "all live records of these owners", flag_values=flags)
    absl_flags.DEFINE_string("like", "", "the records with the pixels of this image file", flag_values=flags)
    absl_flags.DEFINE_string("request", "", "an id; asking twice is then asking once", flag_values=flags)
    absl_flags.DEFINE_string("requester", "", "who asks; stays in the receipt for good", flag_values=flags)
    absl_flags.DEFINE_string("reason", "", "why; stays in the receipt for good", flag_values=flags)
    text = "predict without the touched clusters until they are tuned again"
    absl_flags.DEFINE_bool("quarantine", False, text, flag_values=flags)
    absl_flags.DEFINE_bool("defer", False, "only accept; lmeraser process serves it later", flag_values=flags)
    absl_flags.DEFINE_bool("dry_run", False, "only say what would be done", flag_values=flags)
    common.define_wait(flags)
    common.define_profile(flags)


def run(arguments: common.Arguments) -> int:
    workdir = common.workdir_of(arguments)
    common.config_of(arguments)  # illegal settings are told before anything is accepted
    from lmeraser_jax.storage import requests

    if arguments["dry_run"] and arguments["defer"]:
        raise UserError("--dry_run changes nothing and --defer accepts; use one of them")
    with common.catalog_of(workdir) as (layout, catalog):
        named = _named(arguments, catalog)
        if arguments["dry_run"]:
            requests.resolve(catalog, *named)  # unknown ones are told before JAX is loaded
            return _dry_run(arguments, named)
        given = {name: arguments[name] for name in ("request", "requester", "reason", "quarantine")}
        ids, owners, contents = named
        accepted = requests.accept(catalog, ids, owners, contents=contents, **given)
        kept_out = requests.kept_out(catalog, accepted.id)
    receipt = str(layout.receipt(accepted.id))
    if arguments["defer"] or not accepted.open:
        values = {"request": dataclasses.asdict(accepted), "outcome": None, "receipt": receipt}
        common.show(arguments, _accepted_text(accepted, receipt, kept_out), values)
        return 0
    return _serve(arguments, accepted, receipt)


def _serve(arguments: common.Arguments, accepted: "Request", receipt: str) -> int:
    """Serves an accepted request as soon as the workdir is free."""
    print(f"accepted: request {accepted.id}", file=sys.stderr, flush=True)
    from lmeraser_jax.storage import requests
    from lmeraser_jax.training import profiling
    from lmeraser_jax.unlearning import erase
    from lmeraser_jax.unlearning.run import open_run

    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    with (
        _says_accepted(accepted, workdir),
        profiling.into(arguments["profile"]),
        open_run(workdir, config, write=True, wait=arguments["wait"], team=arguments.team) as run_,
    ):
        common.log_devices()
        others = len(requests.listed(run_.catalog, only_open=True)) - 1
        if others > 0:
            common.warn(f"{others} other requests wait; they are served with this one")
        done = erase.serve(run_, accepted.id)
    common.show(arguments, _text(done, receipt), {**dataclasses.asdict(done), "receipt": receipt})
    return 0


def _named(arguments: common.Arguments, catalog: "Catalog") -> tuple[list[str], list[str], list[str]]:
    """Ids, owners and content hashes that the flags name; what an image stands for is printed at once."""
    from lmeraser_jax.unlearning import request_files

    ids, owners, contents = list(arguments["records"]), list(arguments["owner"]), []
    if arguments["records_file"]:
        named = request_files.read(arguments["records_file"])
        ids, owners = [*ids, *named.ids], [*owners, *named.owners]
    if arguments["like"]:
        contents = [request_files.content_of(catalog, arguments["like"], common.config_of(arguments).data.max_pixels)]
        found = ", ".join(catalog.same_pixels(contents[0])) or "no live record"
        print(f"{arguments['like']} has the pixels of: {found}", file=sys.stderr, flush=True)
    return ids, owners, contents


def _dry_run(arguments: common.Arguments, named: tuple[list[str], list[str], list[str]]) -> int:
    from lmeraser_jax.storage import requests
    from lmeraser_jax.unlearning import erase
    from lmeraser_jax.unlearning.run import open_run

    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    with open_run(workdir, config, write=True, wait=arguments["wait"]) as run_:
        estimate = erase.estimate(run_, requests.resolve(run_.catalog, *named))
    common.show(arguments, _estimate_text(estimate), dataclasses.asdict(estimate))
    return 0


@contextlib.contextmanager
def _says_accepted(request: "Request", workdir: str) -> Iterator[None]:
    """A request that cannot be served now is not lost, and whoever asked must know."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{error}\nrequest {request.id} is accepted all the same: it will be served by the writer's next command"
            f" or by lmeraser process --workdir={workdir}"
        ) from error
    except interrupt.Stopped:
        raise interrupt.Stopped(f"process --workdir={workdir}") from None


def _accepted_text(request: "Request", receipt: str, kept_out: int) -> str:
    if not request.open:
        return f"request {request.id} was served before: nothing to do; receipt: {receipt}"
    body = request.body
    lines = [
        f"accepted: request {request.id} ({request.state}), {len(body['records'])} records,"
        f" {len(body['members'])} clusters to tune"
    ]
    if kept_out:
        lines.append(f"predictions do without {kept_out} clusters from now on")
    return "\n".join([*lines, *_known_before(request), "it is served by the next lmeraser process, train or unlearn"])


def _known_before(request: "Request") -> list[str]:
    lines = []
    if request.body["erased_before"]:
        lines.append(f"{len(request.body['erased_before'])} records were erased before: nothing to do for them")
    if request.body["shared"]:
        lines.append(f"{len(request.body['shared'])} records are being erased by an earlier request")
    return lines


def _estimate_text(estimate: "Estimate") -> str:
    share = estimate.images / estimate.images_full if estimate.images_full else 0.0
    lines = [
        f"would erase {estimate.records} records and change nothing yet",
        f"clusters to tune: {len(estimate.clusters)}, images to process: {estimate.images}"
        f" ({share:.1%} of a full re-tune), about {estimate.seconds:.1f} s",
    ]
    lines += [f"  {key}" for key in estimate.clusters]
    if estimate.reclustered:
        lines.append(f"a sampled record is among them: {len(estimate.vanishing)} clusters would be replaced")
    return "\n".join(lines)


def _text(done: "Erasure", receipt: str) -> str:
    lines = _known_before(done.request)
    if done.records:
        lines.append(f"erased {done.records} records (request {done.request.id})")
    lines.append(common.outcome_text(done.outcome) if done.outcome else "another process has served it meanwhile")
    return "\n".join([*lines, f"receipt: {receipt}"])
