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
    public, fingerprint = signatures.make_keys(Path(arguments["out"]))
    values = {"private_key": arguments["out"], "public_key": str(public), "fingerprint": fingerprint}
    common.show(arguments, "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in values.items()), values)
    return 0
