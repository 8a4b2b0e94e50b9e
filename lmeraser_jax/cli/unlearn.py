"""lmeraser unlearn: erase records and re-tune the clusters they touched, and nothing else.

  lmeraser unlearn --workdir=DIR --records=ID,ID | --records_file=FILE | --owner=NAME [--dry_run]

A file holds one id a line. A dry run says what it would cost and changes nothing. Nothing is erased when
an id or the owner is unknown.
"""

import dataclasses
from pathlib import Path

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError

STRAY = "ids are given as --records=ID,ID"


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_list("records", [], "ids, separated by commas", flag_values=flags)
    absl_flags.DEFINE_string("records_file", "", "file with one id a line", flag_values=flags)
    absl_flags.DEFINE_string("owner", "", "all live records of this owner", flag_values=flags)
    absl_flags.DEFINE_bool("dry_run", False, "only say what would be done", flag_values=flags)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    ids = [*arguments["records"], *_lines(arguments["records_file"])]
    if not ids and not arguments["owner"]:
        raise UserError("say what to erase: --records=ID,ID, --records_file=FILE or --owner=NAME")
    from lmeraser_jax import unlearning
    from lmeraser_jax.run import opened
    from lmeraser_jax.store import requests

    with opened(workdir, config, write=True) as run_:
        if arguments["dry_run"]:
            estimate = unlearning.estimate(run_, requests.resolve(run_.catalog, ids, arguments["owner"]))
            common.show(arguments, _estimate_text(estimate), dataclasses.asdict(estimate))
            return 0
        common.log_devices()
        unfinished = len(run_.catalog.erased())
        if unfinished:
            common.warn(f"an erasure of {unfinished} records was interrupted; it is finished with this one")
        done = unlearning.request_erasure(run_, ids, arguments["owner"])
    common.show(arguments, _text(done), dataclasses.asdict(done))
    return 0


def _lines(path: str) -> list[str]:
    if not path:
        return []
    if not Path(path).is_file():
        raise UserError(f"--records_file={path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--records_file={path} is not UTF-8 text: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _estimate_text(estimate) -> str:
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


def _text(done) -> str:
    o = done.outcome
    lines = []
    if done.erased_before:
        lines.append(f"{done.erased_before} records were erased before: nothing to do for them")
    if done.records:
        lines.append(f"erased {done.records} records (request {done.request.id})")
    lines.append(
        f"clusters re-tuned {o.retuned}, reused {o.reused}; {o.images} images ({o.ratio:.1%} of a full re-tune)"
        f" in {o.seconds:.1f} s"
    )
    return "\n".join(lines)
