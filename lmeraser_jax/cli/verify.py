"""lmeraser verify: check that receipts are unchanged and in their place, and that what they list as removed is gone.

  lmeraser verify RECEIPT.json ... --workdir=DIR [--public_key=FILE]
  lmeraser verify --all --workdir=DIR [--public_key=FILE]
  lmeraser verify --receipt=COPY.json --public_key=FILE

With --public_key each receipt must be signed with that key, or with one of several; --all demands it of the head of the
chain, too. --receipt needs no workdir: it checks the signature of a copy, and that several copies belong to one chain.

Exit code 0: all receipts hold; 1: one does not; 3: a file could not be read now, so nothing can be said. --all also
compares the folder of receipts with the catalog, so it finds missing receipts. lmeraser audit goes further: it builds
everything again and compares every bit.
"""

import dataclasses
from pathlib import Path

from lmeraser_jax.cli import common
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError
from lmeraser_jax.unlearning import signatures, verify
from lmeraser_jax.unlearning.signatures import PublicKeys
from lmeraser_jax.unlearning.verify import Verdict

TAKES_FILES = True
FLAGS = (
    common.Flag("all", False, "check all receipts of the workdir, and that none is missing"),
    common.Flag("receipt", (absolute,), "copy of a receipt or of receipts_head.json to check alone; may be repeated"),
    common.Flag("public_key", (absolute,), "public key of the operator (lmeraser keys); may be repeated"),
)


def run(arguments: common.Arguments) -> int:
    keys = signatures.load_public_keys(arguments["public_key"])
    verdicts = _copies(arguments, keys) if arguments["receipt"] else _receipts(arguments, keys)
    ok = all(verdict.ok for verdict in verdicts)
    values = {"ok": ok, "verdicts": [{**dataclasses.asdict(verdict), "ok": verdict.ok} for verdict in verdicts]}
    common.show(arguments, "\n".join(map(_text, verdicts)), values)
    return 0 if ok else 1


def _copies(arguments: common.Arguments, keys: PublicKeys) -> list[Verdict]:
    """Checks copies by their signatures alone."""
    if not keys:
        raise UserError("--public_key=FILE is missing: the operator's public key, which checks the copy of a receipt")
    if arguments["all"] or arguments.files or arguments["workdir"]:
        raise UserError("--receipt checks a copy without the workdir; leave out --workdir, --all and other files")
    return verify.verify_copies([Path(name) for name in arguments["receipt"]], keys)


def _receipts(arguments: common.Arguments, keys: PublicKeys) -> list[Verdict]:
    """Checks receipts against the workdir."""
    workdir = common.workdir_of(arguments)
    if arguments["all"] == bool(arguments.files):
        raise UserError("name receipts or give --all: lmeraser verify RECEIPT.json ... --workdir=DIR")
    with common.catalog_of(workdir) as (layout, catalog):
        if arguments["all"]:
            return verify.verify_all(layout, catalog, keys)
        return verify.verify(layout, catalog, [Path(name) for name in arguments.files], keys)


def _text(verdict: Verdict) -> str:
    facts = ", ".join(filter(None, (verdict.request and f"request {verdict.request}", verdict.signature)))
    lines = [f"{'holds' if verdict.ok else 'DOES NOT HOLD'}: {verdict.name}{facts and f' ({facts})'}"]
    lines += [f"  - {line}" for line in verdict.findings]
    lines += [f"  note: {line}" for line in verdict.notes]
    return "\n".join(lines)
