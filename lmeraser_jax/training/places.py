"""Where a process stands among several: flags say it, or the variables of Open MPI, Slurm or Kubernetes."""

import dataclasses
import re
from collections.abc import Mapping

from lmeraser_jax.errors import UserError

PORTS = 4096  # above 61439, as JAX picks them: a port for each Slurm or Open MPI job
BY_HAND = "give each of them --coordinator_address=HOST:PORT --num_processes=N --process_id=I"


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among several.

    Attributes:
        coordinator: HOST:PORT of process 0, where the processes meet.
        size: number of processes, more than one.
        index: own number.
        device: the one GPU of its host that this process uses; None: all.
    """

    coordinator: str
    size: int
    index: int
    device: int | None = None

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0]


def detect(
    environ: Mapping[str, str], coordinator: str = "", size: int | None = None, index: int | None = None
) -> Place | None:
    """This process's place among several, or None where it is the only one.

    Flags come first, then Open MPI (whose processes may run inside a Slurm job), Slurm and Kubernetes.

    Args:
        environ: the environment's variables.
        coordinator, size, index: the flags --coordinator_address, --num_processes and --process_id.

    Raises:
        UserError: flags or variables that are half set or impossible.
    """
    flags = {"--coordinator_address": coordinator or None, "--num_processes": size, "--process_id": index}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) < len(flags):
        if missing:
            raise UserError(f"{', '.join(missing)} missing: {', '.join(flags)} are given together, or none of them")
        return _place(coordinator, str(size), str(index), None, "--coordinator_address, --num_processes, --process_id")
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return _open_mpi(environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environ:
        return _slurm(environ)
    if "JOB_COMPLETION_INDEX" in environ:
        return _kubernetes(environ)
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    """A variable that counts something; 1 where it is not set or empty."""
    text = environ.get(name) or "1"
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} must be a whole number; {BY_HAND}")
    return int(text)


def _told(environ: Mapping[str, str], scheduler: str, *names: str) -> list[str]:
    """Variables that a scheduler sets for each of several processes."""
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise UserError(f"{scheduler} started several processes but does not set {', '.join(missing)}; {BY_HAND}")
    return [environ[name] for name in names]


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    """mpirun's own host is the first one, as JAX takes it too: `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`."""
    who = "Open MPI"
    size, index, uri = _told(environ, who, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri")
    found = re.match(r"(\d+)\.\d+;(?:.*;)?tcp://([^,:;]+)", uri)
    if not found:
        raise UserError(f"OMPI_MCA_orte_hnp_uri={uri!r} names no IPv4 address of mpirun's host; {BY_HAND}")
    port = 65536 - PORTS + int(found[1]) // PORTS % PORTS
    crowded = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1
    device = _device(environ, who, "OMPI_COMM_WORLD_LOCAL_RANK") if crowded else None
    return _place(f"{found[2]}:{port}", size, index, device, "Open MPI's variables")


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """Process 0 runs on the first of the nodes `rack[1-2]node[001,007-015]-ib,other`."""
    who = "Slurm"
    size, index, nodes = _told(environ, who, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")
    _told(environ, who, "SLURM_JOB_ID", "SLURM_STEP_NUM_NODES")
    names = re.match(r"(?:[^,\[\]]|\[[^\[\],-]+[^\[\]]*\])+(?=,|$)", nodes)
    if not names:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no node; {BY_HAND}")
    host = re.sub(r"\[([^,-]+)[^\]]*\]", r"\1", names[0])
    port = 65536 - PORTS + _number(environ, "SLURM_JOB_ID") % PORTS
    crowded = int(size) > _number(environ, "SLURM_STEP_NUM_NODES")
    device = _device(environ, who, "SLURM_LOCALID") if crowded else None
    return _place(f"{host}:{port}", size, index, device, "Slurm's variables")


def _device(environ: Mapping[str, str], scheduler: str, name: str) -> str | None:
    """Processes of one host take a GPU each, unless the scheduler shows each of them only one."""
    return _told(environ, scheduler, name)[0] if "," in environ.get("CUDA_VISIBLE_DEVICES", ",") else None


def _kubernetes(environ: Mapping[str, str]) -> Place | None:
    """Pods of an indexed job know their index; where pod 0 is and how many there are the manifest has to say."""
    needed = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
    missing = [name for name in needed if not environ.get(name)]
    if len(missing) == len(needed):
        return None  # an indexed job of independent pods
    if missing:
        raise UserError(f"{missing[0]} is not set; launch/k8s_jobset.yaml sets {' and '.join(needed)} in each pod")
    address, count = (environ[name] for name in needed)
    return _place(address, count, environ["JOB_COMPLETION_INDEX"], None, f"{needed[0]}, {needed[1]}, index of the pod")


def _place(coordinator: str, size: str, index: str, device: str | None, source: str) -> Place | None:
    """The place, checked; None where there is one process only."""
    given = f"{source}: {coordinator}, {size}, {index}"
    found = re.fullmatch(r"[^\s:\[\]]+:(\d{1,5})", coordinator)
    if not found or not 1 <= int(found[1]) <= 65535:
        what = "HOST a name or an IPv4 address, PORT between 1 and 65535"
        raise UserError(f"{given}: the address must be HOST:PORT, {what}")
    if not (size.isdecimal() and index.isdecimal() and int(index) < int(size)):
        raise UserError(f"{given}: the number of processes must be at least 1, the index 0 to that number less 1")
    if device is not None and not device.isdecimal():
        raise UserError(f"{source}: {device!r} is no number of a process on its host")
    if int(size) == 1:
        return None
    return Place(coordinator, int(size), int(index), None if device is None else int(device))
