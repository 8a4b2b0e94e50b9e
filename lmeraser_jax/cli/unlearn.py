"""lmeraser unlearn: erase records, and re-tune only the clusters that they touched.

  lmeraser unlearn --workdir=DIR --records=ID | --owner=NAME | --records_file=FILE | --like=IMAGE
                   [--dry_run] [--defer] [--quarantine] [--request=ID] [--requester=WHO] [--reason=WHY]

Each of the first four flags may be repeated. A name counts as it stands: commas, quotes and spaces are part of it.
FILE is text with one id a line, as it stands; or a .csv with a column id or owner, in which a name that has the
delimiter or a double quote in it stands in double quotes, with each of its own doubled; or a .jsonl with lines
{"id": ...} or {"owner": ...}, in which a name is a JSON string or a whole number.
--like takes the image file that records were imported from, and erases all records with exactly its pixels.

The command first accepts the request, at once and for good, even while another process writes. Then it serves the
request; with --defer the next lmeraser process does. With --dry_run it only says what the request would cost. If an
id or an owner is unknown, it erases nothing. It names the live records and owners that only look like those named.

With --mode=newton, paper or warm the command publishes an approximate update of the touched clusters and leaves the
request open. Such an update gives no guarantee; the next lmeraser process replaces it by the exact slices.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmeraser_jax import interrupt
from lmeraser_jax.cli import common
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.data.names import list_names
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import Request
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import request_files

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.erase import Erasure, Estimate
    from lmeraser_jax.unlearning.influence import Report
    from lmeraser_jax.unlearning.run import Run

NOTHING_TO_ERASE = "nothing to erase: all that the request names was erased before or is being erased already"
STRAY = "ids are given as --records=ID, once for each"
REQUEST = (  # flags of every request
    common.Flag("request", "", "id of the request: a second call with the same id repeats nothing"),
    common.Flag("requester", "", "who asks; kept in the receipt for good"),
    common.Flag("reason", "", "why; kept in the receipt for good"),
    common.Flag(
        "quarantine", False, "from now until they are tuned again, keep the touched clusters out of predictions"
    ),
    common.Flag("defer", False, "only accept the request; lmeraser process serves it later"),
    common.Flag("dry_run", False, "only say what the request would cost"),
    common.Flag(
        "mode",
        "exact",
        "newton, paper and warm answer at once with an approximate update, without any guarantee, until"
        " lmeraser process has the exact slices (L2 strength: tuning.lora_l2 or the weight decay, 0.001 without one)",
        choices=("exact", "newton", "paper", "warm"),
    ),
    common.Flag(
        "force", False, "with --mode: publish even if the solver ended at a residual above 1 (above 0.3 warns)"
    ),
    common.SIGNING_KEY,
    *common.WRITING,
    *common.SHARED,
)
VERBS = {"erase": "erased", "rectify": "rectified"}  # of the kinds of requests
FLAGS = (
    common.Flag("records", (), "id of a record to erase (lmeraser inspect --records lists them); may be repeated"),
    common.Flag("records_file", (absolute,), "file with ids or owners: text, .csv or .jsonl; may be repeated"),
    common.Flag("owner", (), "erase all private records of this owner; may be repeated"),
    common.Flag("like", (absolute,), "erase the records with the pixels of this image file; may be repeated"),
    common.Flag(
        "calibrate", False, "with --mode=newton or paper: until the erased records are as unknown as held-out ones"
    ),
    *REQUEST,
)


def run(arguments: common.Arguments) -> int:
    refuse_settings(arguments)
    with common.catalog_of(common.workdir_of(arguments)) as (layout, catalog):
        targets = ids, owners, contents = _targets(arguments, catalog)
        if not arguments["defer"]:
            requests.resolve(catalog, *targets)  # refuses unknown ones first
            common.require_device()
        if arguments["dry_run"]:
            common.warn(*requests.still_live(catalog, ids, owners))
            return _estimate(arguments, *targets)
        refuse_mode(arguments, catalog)
        request = requests.accept(catalog, ids, owners, contents=contents, **details(arguments))
        common.warn(*requests.still_live(catalog, ids, owners))
        return serve_or_show(arguments, layout, catalog, request)


def refuse_settings(arguments: common.Arguments) -> None:
    """Raises `UserError`, before anything is accepted, for illegal settings, an unusable key or flags that clash."""
    common.config_of(arguments)
    common.signing_key_of(arguments)
    if arguments["dry_run"] and arguments["defer"]:
        raise UserError("--dry_run changes nothing and --defer accepts; use one of them")
    _check_mode(arguments)


def refuse_mode(arguments: common.Arguments, catalog: Catalog) -> None:
    """Raises `UserError` where an approximate update is wanted and cannot be, before anything is accepted."""
    if arguments["mode"] != "exact":
        from lmeraser_jax.unlearning import approximate

        tuning = common.config_of(arguments).tuning
        approximate.refuse_unless_applicable(catalog, tuning, _calibrates(arguments))


def details(arguments: common.Arguments) -> dict[str, Any]:
    """What the flags say of a request of either kind."""
    return {name: arguments[name] for name in ("request", "requester", "reason", "quarantine")}


def serve_or_show(arguments: common.Arguments, layout: Layout, catalog: Catalog, request: Request) -> int:
    """Serves an accepted request unless it is deferred, or says what was accepted."""
    quarantined = requests.quarantine_size(catalog, request.id)
    if request.open and not arguments["defer"]:
        return _serve(arguments, request)
    values = {"request": dataclasses.asdict(request), "outcome": None, "receipt": layout.receipt(request.id)}
    common.show(arguments, _accepted_text(request, values["receipt"], quarantined), values)
    return 0


def _targets(arguments: common.Arguments, catalog: Catalog) -> tuple[list[str], list[str], list[str]]:
    """Ids, owners and content hashes that the flags name; says at once which records an image stands for."""
    ids, owners, contents = list(arguments["records"]), list(arguments["owner"]), []
    for path in arguments["records_file"]:
        named = request_files.read(path)
        ids, owners = [*ids, *named.ids], [*owners, *named.owners]
    most = common.config_of(arguments).data.max_pixels
    for path in arguments["like"]:
        contents.append(request_files.content_of(catalog, Path(path), f"--like={path}", most))
        same = list_names(catalog.same_pixels(contents[-1])) or "no live record"
        print(f"{path} has the pixels of: {same}", file=sys.stderr, flush=True)
    return ids, owners, contents


def _check_mode(arguments: common.Arguments) -> None:
    """Refuses flags that contradict --mode."""
    exact, problems = arguments["mode"] == "exact", []
    if not exact:
        reasons = {"defer": "accepts only", "dry_run": "changes nothing", "quarantine": "keeps these clusters out"}
        problems = [f"--{flag} {reason}, and --mode answers" for flag, reason in reasons.items() if arguments[flag]]
    if _calibrates(arguments) and arguments["mode"] not in ("newton", "paper"):
        problems.append("--calibrate scales the step of --mode=newton or paper")
    if exact and arguments["force"]:
        problems.append("--force publishes an approximate slice: give --mode, too")
    raise_all(problems)


def _calibrates(arguments: common.Arguments) -> bool:
    """Whether a step is to be calibrated, which corrections do not offer."""
    return "calibrate" in arguments.flags and arguments["calibrate"]


def _approximate(arguments: common.Arguments, run_: "Run", request: Request) -> None:
    """Publishes approximate slices for an accepted request and says how good they are."""
    from lmeraser_jax.unlearning import approximate, influence

    mode, force = arguments["mode"], arguments["force"]
    reports = approximate.publish_approximate(run_, mode, _calibrates(arguments), force, request.id)
    if any(report.residual > influence.WARN_RESIDUAL for report in reports.values()):
        common.warn("the solver had not converged: see residual; the exact slices do not depend on it")
    lines = [f"request {request.id}: {len(reports)} clusters answer approximately, without any guarantee"]
    if not reports:
        lines = [f"request {request.id}: no cluster that answers was tuned with these records; nothing is approximate"]
    lines += [f"  {key[:12]}  {_report_text(report)}" for key, report in reports.items()]
    lines.append(f"the next lmeraser process {Layout(arguments['workdir']).flag} makes them exact")
    values = {"request": dataclasses.asdict(request), "outcome": None}
    values["approximate"] = {key: dataclasses.asdict(report) for key, report in reports.items()}
    common.show(arguments, "\n".join(lines), values)


def _report_text(report: "Report") -> str:
    numbers = (f"{name} {value:.3g}" for name, value in dataclasses.asdict(report).items() if type(value) is float)
    return f"{report.mode}: {', '.join(numbers)}, {report.iterations} iterations"


def _estimate(arguments: common.Arguments, *targets: list[str]) -> int:
    with common.opened(arguments, write=True) as run_:
        from lmeraser_jax.unlearning import erase

        estimate = erase.estimate(run_, requests.resolve(run_.catalog, *targets))
    common.show(arguments, estimate_text(estimate, "erase"), dataclasses.asdict(estimate))
    return 0


def _serve(arguments: common.Arguments, request: Request) -> int:
    """Serves an accepted request as soon as the workdir is free."""
    flag = Layout(arguments["workdir"]).flag
    if arguments["signing_key"]:
        flag += f" {shlex.quote('--signing_key=' + arguments['signing_key'])}"
    print(f"accepted: request {request.id}", file=sys.stderr, flush=True)
    waits = f"request {request.id} is accepted all the same: it will be served by the writer's next command"
    waits += f" or by lmeraser process {flag}"
    try:
        with common.opened(arguments, write=True) as run_:
            from lmeraser_jax.unlearning import erase

            if arguments["mode"] != "exact":
                _approximate(arguments, run_, request)
                return 0
            others = len(requests.listed(run_.catalog, only_open=True)) - 1
            if others > 0:
                common.warn(f"{others} other requests wait; they are served with this one")
            erasure = erase.serve(run_, request.id)
    except UserError as error:
        raise UserError(f"{error}\n{waits}") from error
    except OSError:
        print(waits, file=sys.stderr)
        raise
    except interrupt.Stopped:
        raise interrupt.Stopped(f"process {flag}") from None
    common.show(arguments, _erasure_text(erasure), dataclasses.asdict(erasure))
    return 0


def _accepted_text(request: Request, receipt: Path, quarantined: int) -> str:
    if not request.open:
        return f"request {request.id} was served before: nothing to do; receipt: {shlex.quote(str(receipt))}"
    records, clusters = len(request.body["records"]), len(request.body["members"])
    lines = [f"accepted: request {request.id} ({request.state}), {records} records, {clusters} clusters to tune"]
    if quarantined:
        lines.append(f"predictions no longer use {quarantined} clusters, until the request is served")
    return "\n".join([*lines, *_known_before(request), "the next lmeraser process, train or unlearn serves it"])


def _known_before(request: Request) -> list[str]:
    """Lines about the records of a request that earlier requests named."""
    texts = {
        "erased_before": "were erased before: nothing to do for them",
        "shared": "are being erased by an earlier request",
    }
    lines = [f"{len(request.body[name])} records {text}" for name, text in texts.items() if request.body[name]]
    return lines if request.body["records"] else [*lines, NOTHING_TO_ERASE]


def estimate_text(estimate: "Estimate", verb: str) -> str:
    """What a request would cost."""
    share = estimate.images / max(1, estimate.images_full)
    lines = [
        *(() if estimate.records or verb != "erase" else (NOTHING_TO_ERASE,)),
        f"would {verb} {estimate.records} records; nothing has been changed",
        f"clusters to tune: {len(estimate.clusters)}, passes of a record: {estimate.images}"
        f" ({share:.1%} of a full re-tune), about {estimate.seconds:.1f} s",
        *(f"  {key}" for key in estimate.clusters),
    ]
    if estimate.reclustered and estimate.vanishing:
        lines.append(f"a sampled record is among them: {len(estimate.vanishing)} clusters would be replaced")
    return "\n".join(lines)


def _erasure_text(erasure: "Erasure") -> str:
    lines = _known_before(erasure.request)
    if erasure.records:
        verb = VERBS[erasure.request.body["kind"]]
        lines.append(f"{verb} {erasure.records} records (request {erasure.request.id})")
    served = common.build_text(erasure.outcome) if erasure.outcome else "another process has served it meanwhile"
    return "\n".join([*lines, served, f"receipt: {shlex.quote(str(erasure.receipt))}"])
