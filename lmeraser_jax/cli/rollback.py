"""lmeraser rollback: give one cluster an earlier slice of its own, and pin it there.

  lmeraser rollback --workdir=DIR --cluster=KEY --list
  lmeraser rollback --workdir=DIR --cluster=KEY [--to=STATE | --to=epoch:E | --to=SLICE]
  lmeraser rollback --workdir=DIR --cluster=KEY --unpin

KEY may be the beginning of a cluster's key (see lmeraser inspect). Without --to the cluster gets the version before its
current one. A version that was tuned on an erased record cannot come back.
"""

import dataclasses
import time
from collections.abc import Sequence

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError
from lmeraser_jax.unlearning import rollback
from lmeraser_jax.unlearning.rollback import Version

FLAGS = (
    common.Flag("cluster", "", "key of the cluster, or its beginning"),
    common.Flag("to", "", "number of a published state, epoch:E, or a slice; empty: the version before"),
    common.Flag("list", False, "only list the versions of the cluster"),
    common.Flag("unpin", False, "remove the pin: give the cluster the slice of its current records again"),
    common.SIGNING_KEY,
    *common.WRITING,
    *common.SHARED,
)


def run(arguments: common.Arguments) -> int:
    workdir, _ = common.finished(arguments)
    if not arguments["cluster"]:
        raise UserError("--cluster=KEY is missing: the cluster to roll back (lmeraser inspect lists them)")
    if sum([arguments["list"], arguments["unpin"], bool(arguments["to"])]) > 1:
        raise UserError("--list, --unpin and --to exclude each other")
    with common.catalog_of(workdir) as (_, catalog):
        key = rollback.cluster_key(catalog, arguments["cluster"])
        if arguments["list"]:
            versions = rollback.versions(catalog, key)
            values = {"cluster": key, "versions": [dataclasses.asdict(version) for version in versions]}
            common.show(arguments, _table(key, versions), values)
            return 0
        if arguments["unpin"]:  # both refuse before JAX is loaded
            rollback.pinned(catalog, key)
        else:
            rollback.choose(catalog, key, arguments["to"])
    with common.opened(arguments, write=True) as run_:
        key = rollback.cluster_key(run_.catalog, key)  # again, now that no other process writes
        if arguments["unpin"]:
            version, report = None, rollback.unpin(run_, key)
        else:
            version, report = rollback.rollback(run_, key, arguments["to"])
    values, text = {"cluster": key, "version": report.version}, "the slice of its records again"
    if version is not None:
        text = f"slice {version.ref[:12]} (epoch {version.epoch}, {version.members} members) again and is pinned to it"
        values["slice"] = dataclasses.asdict(version)
    text = f"cluster {key[:12]} has {text}: state {report.version}"
    common.show(arguments, text, values)
    return 0


def _table(key: str, versions: Sequence[Version]) -> str:
    lines = [f"cluster {key}", f"{'states':<12}{'slice':<26}{'epoch':>6}{'members':>9}  made"]
    for version in versions:
        digest, _, step = version.ref.partition("@")
        name = f"{digest[:12]}@{step}" if step else digest[:12]
        states = ",".join(map(str, version.versions)) or "-"
        line = f"{states:<12}{name:<26}{version.epoch:>6}{version.members:>9}  "
        line += time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(version.created))
        line += " (now)" if version.current else ""
        line += " (pinned)" if version.pinned else ""
        lines.append(line)
    return "\n".join(lines)
