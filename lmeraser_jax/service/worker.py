"""The process that serves requests: it looks at the workdir, and when requests are due it builds.

  python -m lmeraser_jax.service.worker --workdir=DIR [--max_wait=SECONDS] [--max_batch=N] [--signing_key=FILE]

It keeps its compiled programs, so that a request costs its tuning and little else, and takes the writer lock for as
long as it builds only. It ends when its standard input ends, that is with the service that started it, however that
ended, and on SIGTERM; a request that is not finished then is finished by the next one. A line of JSON on standard
output says what cannot be done now, "" where nothing stands in the way; the next one follows when that changes.
"""

import argparse
import contextlib
import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lmeraser_jax import interrupt
from lmeraser_jax.errors import UserError
from lmeraser_jax.service.problems import place_of, public_text
from lmeraser_jax.service.settings import Policy
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import Request
from lmeraser_jax.storage.workdir import Layout, current_writer

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.run import Run

POLL = 0.25  # seconds between two looks at the workdir
LONGEST_PAUSE = 60.0  # seconds before another try after failures


def approximations_due(catalog: Catalog) -> list[Request]:
    """Accepted requests that are to be answered approximately at once."""
    waiting = requests.listed(catalog, only_open=True)
    return [each for each in waiting if each.body["mode"] != "exact" and each.state == "accepted"]


def serve_once(layout: Layout, policy: Policy, signing_key: str = "") -> bool:
    """Serves what is due now, if anything is and no other process writes; returns whether something was.

    Raises `UserError` as `erase.process`: the requests stay open.
    """
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        due, approximations = requests.due(catalog, policy.max_wait, policy.max_batch), approximations_due(catalog)
    if not (due.now or approximations) or current_writer(layout):
        return False
    from lmeraser_jax.unlearning import erase, signatures
    from lmeraser_jax.unlearning.run import open_run

    key = signatures.load_signing_key(signing_key)
    with open_run(layout.root, write=True, signing_key=key) as run:
        for request in approximations_due(run.catalog):
            _approximate(run, request)
        if requests.due(run.catalog, policy.max_wait, policy.max_batch).now:
            erase.process(run)
    return True


def _approximate(run: "Run", request: Request) -> None:
    """Publishes approximate slices for a request, or notes why there are none: it is served exactly all the same."""
    from lmeraser_jax.unlearning import approximate

    try:
        approximate.publish_approximate(run, request.body["mode"], request=request.id)
    except UserError as error:
        requests.note(run.catalog, request.id, mode="exact", problem=public_text(run.layout, error))


def _end_with_parent() -> None:
    """Asks this process to stop when its standard input ends."""
    sys.stdin.buffer.read()
    interrupt.request_stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="lmeraser_jax.service.worker")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--max_wait", type=float)
    parser.add_argument("--max_batch", type=int)
    parser.add_argument("--signing_key", default="")
    arguments = parser.parse_args()
    layout, policy = Layout(Path(arguments.workdir)), Policy(arguments.max_wait, arguments.max_batch)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pause, said = POLL, None
    with interrupt.handle_sigterm():
        while not interrupt.stop_requested():
            try:
                serve_once(layout, policy, arguments.signing_key)
                pause, problem = POLL, ""  # also where another process served what could not be done here
            except interrupt.Stopped:
                break
            except UserError as error:
                pause, problem = min(LONGEST_PAUSE, max(1.0, 2 * pause)), public_text(layout, error)
            except Exception as error:  # a disk, a database, a device: the requests stay open
                print(f"the worker: {place_of(error)}: {error}", file=sys.stderr, flush=True)
                pause, problem = min(LONGEST_PAUSE, max(1.0, 2 * pause)), f"{type(error).__name__}; the log says where"
            if problem != said:
                print(json.dumps({"problem": problem}), flush=True)
                said = problem
            interrupt.wait(pause)
    return 0


if __name__ == "__main__":
    sys.exit(main())
