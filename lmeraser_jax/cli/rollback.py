"""lmeraser rollback: give one cluster an earlier slice of its own, and keep it there.

  lmeraser rollback --workdir=DIR --cluster=KEY --list
  lmeraser rollback --workdir=DIR --cluster=KEY [--to=STATE | --to=epoch:E | --to=SLICE]
  lmeraser rollback --workdir=DIR --cluster=KEY --unpin

KEY may be the beginning of a key (see lmeraser inspect). Without --to it is the version before the present one.
Versions that an erased record was part of cannot come back.
"""

import dataclasses
import time

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_string("cluster", "", "key of the cluster, or its beginning", flag_values=flags)
    absl_flags.DEFINE_string("to", "", "a state, epoch:E, or a slice; empty: the one before", flag_values=flags)
    absl_flags.DEFINE_bool("list", False, "only say what there is", flag_values=flags)
    common.define_wait(flags)
    absl_flags.DEFINE_bool("unpin", False, "give the cluster what its records call for again", flag_values=flags)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    if not arguments["cluster"]:
        raise UserError("--cluster=KEY is missing: the cluster to roll back (lmeraser inspect lists them)")
    if sum([arguments["list"], arguments["unpin"], bool(arguments["to"])]) > 1:
        raise UserError("--list, --unpin and --to exclude each other")
    from lmeraser_jax.unlearning import rollback
    from lmeraser_jax.unlearning.run import open_run

    with open_run(workdir, config, write=not arguments["list"], wait=arguments["wait"], team=arguments.team) as run_:
        key = rollback.cluster_key(run_.catalog, arguments["cluster"])
        if arguments["list"]:
            versions = rollback.versions(run_, key)
            values = {"cluster": key, "versions": [dataclasses.asdict(version) for version in versions]}
            common.show(arguments, _table(key, versions), values)
            return 0
        common.log_devices()
        if arguments["unpin"]:
            outcome = rollback.unpin(run_, key)
            text = f"cluster {key[:12]} has the slice of its records again: state {outcome.version}"
            common.show(arguments, text, {"cluster": key, "version": outcome.version})
            return 0
        version, outcome = rollback.rollback(run_, key, arguments["to"])
    text = f"cluster {key[:12]} has slice {version.ref[:12]} (epoch {version.epoch}, {version.members} members) again"
    text += f" and is pinned to it: state {outcome.version}"
    values = {"cluster": key, "version": outcome.version, "slice": dataclasses.asdict(version)}
    common.show(arguments, text, values)
    return 0


def _table(key: str, versions) -> str:
    lines = [f"cluster {key}", f"{'states':<12}{'slice':<26}{'epoch':>6}{'members':>9}  made"]
    for v in versions:
        digest, _, step = v.ref.partition("@")
        name = digest[:12] + (f"@{step}" if step else "")
        marks = " (now)" * v.current + " (pinned)" * v.pinned
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(v.created))
        states = ",".join(map(str, v.versions)) or "-"
        lines.append(f"{states:<12}{name:<26}{v.epoch:>6}{v.members:>9}  {made}{marks}")
    return "\n".join(lines)
