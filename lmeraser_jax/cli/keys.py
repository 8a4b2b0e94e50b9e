"""lmeraser keys: make a key pair for signed receipts (Ed25519).

  lmeraser keys --out=FILE

FILE is the private key, which only its owner may open; the operator gives it to the commands that serve requests, as
--signing_key=FILE. FILE.pub is the public key, for everybody who checks receipts with lmeraser verify --public_key.
Files that exist are never overwritten. A receipt names its key by the fingerprint that this command prints.
"""

from pathlib import Path

from lmeraser_jax.cli import common
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError
from lmeraser_jax.unlearning import signatures

TAKES_CONFIG = False
FLAGS = (common.Flag("out", absolute, "new file for the private key"),)


def run(arguments: common.Arguments) -> int:
    if not arguments["out"]:
        raise UserError("--out=FILE is missing: a new file for the private key")
    public, name = signatures.make_keys(Path(arguments["out"]))
    text = f"private key: {arguments['out']}\npublic key: {public}\nfingerprint: {name}"
    common.show(arguments, text, {"private_key": arguments["out"], "public_key": str(public), "fingerprint": name})
    return 0
