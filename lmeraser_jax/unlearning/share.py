"""What every process but the first does for a command: its share of the tasks that process 0 broadcasts."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmeraser_jax.errors import UserError
from lmeraser_jax.interrupt import Stopped
from lmeraser_jax.progress import silence
from lmeraser_jax.training import multihost, waves
from lmeraser_jax.training.fingerprint import pinned
from lmeraser_jax.training.multihost import Arrays, Processes
from lmeraser_jax.unlearning.run import Run, open_run


def serve(processes: Processes) -> None:
    """Does this process's share of every task until the command is over. Writes nothing.

    Raises:
        UserError: the workdir cannot be read here, or this process's program gives other bits than process 0's.
    """
    silence()
    with pinned(), contextlib.ExitStack() as stack:
        run: Run | None = None
        while True:
            task, arrays = multihost.broadcast()
            if task["name"] == "end":
                multihost.end(processes)
                return
            if run is None:
                run = stack.enter_context(open_run(task["workdir"]))
            if run.fingerprint != task["fingerprint"]:
                programs = f"its program or devices are {run.fingerprint}, not {task['fingerprint']}"
                raise UserError(f"this process would compute other bits than process 0: {programs}")
            with contextlib.suppress(Stopped):  # process 0 ends the command
                if task["name"] == "features":
                    _extract(run, processes, arrays)
                else:
                    _tune(run, processes, task, arrays)


def _extract(run: Run, processes: Processes, arrays: Arrays) -> None:
    waves.extract_share(processes, arrays["rows"], lambda rows: run.extractor(run.images[rows]))


def _tune(run: Run, processes: Processes, task: Mapping[str, Any], arrays: Arrays) -> None:
    """One wave of slices, which process 0 writes."""
    labels = np.zeros(run.catalog.rows_used(), np.int32)
    labels[arrays["rows"]] = arrays["labels"]
    tune_own = run.tune_own(run.tuning_spec, run.training_rows(run.tuning_spec), labels)
    for _ in waves.do_share(processes, task["shares"], run.tuning_spec, waves.jobs_of(task, arrays["rows"]), tune_own):
        pass
