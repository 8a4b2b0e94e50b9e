"""lmeraser tokens: make a token for the HTTP service; it is shown once, and its hash is added to a file.

  lmeraser tokens --tokens=tokens.json --name=helpdesk --role=erase [--role=read]

Roles: predict asks for predictions; erase sends requests to erase and rectify, and sees them; read sees the console,
the model, requests, receipts and figures. To withdraw a token, delete its entry in the file: a service that runs
notices.
"""

from pathlib import Path

from lmeraser_jax.cli import common
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError

TAKES_CONFIG = False
FLAGS = (
    common.Flag("tokens", absolute, "the file of tokens; made if need be"),
    common.Flag("name", "", "whom the token is for"),
    common.Flag("role", (), "predict, erase or read; may be repeated"),
)


def run(arguments: common.Arguments) -> int:
    if not arguments["tokens"]:
        raise UserError("--tokens=FILE is missing: the file of tokens")
    try:
        from lmeraser_jax.service.auth import make_token
    except ModuleNotFoundError as error:
        raise UserError(f"{common.INSTALL} ({error.name} is missing)") from error
    token = make_token(Path(arguments["tokens"]), arguments["name"], arguments["role"])
    text = f"{token}\nkeep it: only its hash is in {arguments['tokens']}"
    common.show(arguments, text, {"name": arguments["name"], "roles": arguments["role"], "token": token})
    return 0
