"""lmeraser serve: a workdir as an HTTP service: predictions, requests to erase and rectify, receipts, a console.

  lmeraser serve --workdir=DIR [--port=8080] [--max_wait=SECONDS] [--max_batch=N]
  lmeraser serve --workdir=DIR --host=0.0.0.0 --tokens=FILE [--tls_certificate=FILE --tls_key=FILE]
  lmeraser serve --workdir=DIR --signing_key=FILE [--public_key=FILE]

Without --tokens everyone on this machine may do everything, and nobody else reaches the service; lmeraser tokens makes
a file of tokens. A worker, a process beside the service, serves the requests: at once, or by --max_wait and --max_batch
as lmeraser process does. The description of the interface is at /openapi.json, the console at /.
"""

import contextlib
import dataclasses
import os
import socket
from pathlib import Path

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import signatures
from lmeraser_jax.unlearning.signatures import PublicKeys

FLAGS = (
    Flag("host", "127.0.0.1", "address to listen at; another one than this machine's own needs --tokens"),
    Flag("port", 8080, "port to listen at; 0: any free one", low=0),
    Flag("tokens", absolute, "file of tokens, made by lmeraser tokens"),
    Flag("max_wait", float, "serve requests once the oldest has waited for this many seconds", low=0),
    Flag("max_batch", int, "serve requests once this many wait", low=1),
    Flag("max_body", 32, "most megabytes of a call", low=1),
    Flag("max_inputs", 64, "most images, queries or candidates of a call", low=1),
    Flag("max_queue", 512, "most images or queries that wait for the devices; beyond it calls get 503", low=1),
    Flag("max_tokens", 256, "most tokens of a generated response", low=1),
    Flag("max_seconds", 60.0, "for a call to arrive, and again for its answer", low=0.1),
    Flag("max_connections", 256, "most connections at the same time; beyond it they get 503", low=2),
    common.SIGNING_KEY,
    Flag(
        "public_key",
        (absolute,),
        "receipts must be signed with this key, or with that of --signing_key; may be repeated",
    ),
    Flag("tls_certificate", absolute, "PEM file, for HTTPS without a proxy"),
    Flag("tls_key", absolute, "PEM file of its key"),
)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.finished(arguments)
    with common.catalog_of(workdir):
        pass  # refuses a catalog that is damaged, or of another version
    try:
        from lmeraser_jax.service.settings import Limits, Policy, Settings

        keys = _check(arguments)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the worker shares the accelerator
        common.log_devices()
        from lmeraser_jax.service.app import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{common.INSTALL} ({error.name} is missing)") from error
    names = [field.name for field in dataclasses.fields(Limits) if field.name != "body"]
    limits = Limits(body=arguments["max_body"] << 20, **{name: arguments[f"max_{name}"] for name in names})
    policy = Policy(arguments["max_wait"], arguments["max_batch"])
    tokens = Path(arguments["tokens"]) if arguments["tokens"] else None
    signing_key = Path(arguments["signing_key"]) if arguments["signing_key"] else None
    service = Settings(Layout(workdir), config, limits, policy, tokens, signing_key, keys)
    with contextlib.suppress(KeyboardInterrupt):  # as SIGTERM: the service has ended in order
        serve(service, arguments["host"], arguments["port"], arguments["tls_certificate"], arguments["tls_key"])
    return 0


def _refuse_taken(host: str, port: int) -> list[str]:
    """Why nothing can listen there, before anything is started."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return [f"--host={host} --port={port}: the service cannot listen there: {error.strerror}"]
    return []


def _check(arguments: common.Arguments) -> PublicKeys:
    """The keys that receipts are checked with: those that were given, and that of the signing key.

    Raises `UserError` for flags that do not go together and files that cannot be used, before anything is loaded.
    """
    from lmeraser_jax.service.auth import read_tokens
    from lmeraser_jax.service.limits import is_local

    tokens, problems = arguments["tokens"], []
    if not tokens and not is_local(arguments["host"]):
        problems.append(f"--host={arguments['host']}: other machines reach it, so --tokens=FILE must say who may what")
    if bool(arguments["tls_certificate"]) != bool(arguments["tls_key"]):
        problems.append("--tls_certificate and --tls_key go together")
    problems += [
        f"--{flag}={arguments[flag]}: no such file"
        for flag in ("tls_certificate", "tls_key")
        if arguments[flag] and not Path(arguments[flag]).is_file()
    ]
    if arguments["port"] > 65535:
        problems.append(f"--port={arguments['port']}: must be at most 65535")
    raise_all(problems or _refuse_taken(arguments["host"], arguments["port"]))
    if tokens:
        read_tokens(Path(tokens))
    own, keys = common.signing_key_of(arguments), signatures.load_public_keys(arguments["public_key"])
    return keys if own is None else {**keys, signatures.fingerprint(own.public_key()): own.public_key()}
