"""Where a process stands, told by flags or by a scheduler's variables; the files in launch/ set what is looked for."""

from pathlib import Path

import pytest

from lmeraser_jax.cli import common, main, train
from lmeraser_jax.distributed import Place, detect
from lmeraser_jax.errors import UserError

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SLURM = {
    "SLURM_JOB_ID": "8195",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
KUBERNETES = {
    "JOB_COMPLETION_INDEX": "2",
    "JAX_NUM_PROCESSES": "4",
    "JAX_COORDINATOR_ADDRESS": "lmeraser-workers-0-0.lmeraser:9876",
}


def test_a_plain_machine_is_alone():
    assert detect({}) is None
    assert detect({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None, "a batch script, no step"
    assert detect(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert detect(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert detect({"JOB_COMPLETION_INDEX": "2"}) is None, "an indexed job of independent pods"
    assert detect({}, "host:1", 1, 0) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-008]", "gpu007"),
        ("gpu[007,009-010],x", "gpu007"),
        ("a-b[3]", "a-b3"),
    ],
)
def test_slurm(nodes, first):
    assert detect(SLURM | {"SLURM_STEP_NODELIST": nodes}) == Place(f"{first}:61443", 8, 5, 1)


def test_slurm_with_one_task_a_node_uses_all_its_gpus():
    assert detect(SLURM | {"SLURM_STEP_NUM_NODES": "8"}) == Place("gpu007:61443", 8, 5, None)
    hidden = SLURM | {"CUDA_VISIBLE_DEVICES": "3"}
    assert detect(hidden) == Place("gpu007:61443", 8, 5, None), "Slurm shows it one GPU only"
    assert detect(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == Place("gpu007:61443", 8, 5, 1)


def test_open_mpi_and_before_slurm():
    alone = Place("10.96.0.1:62624", 4, 3)
    assert detect(OPEN_MPI) == alone == detect(OPEN_MPI | SLURM)
    crowded = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    assert detect(crowded).device == 3
    with pytest.raises(UserError, match="--coordinator_address=HOST:PORT --num_processes=N --process_id=I"):
        detect(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""})


def test_the_ports_and_hosts_are_those_that_jax_takes(monkeypatch):
    """JAX's own detection, which this one replaces, agrees on the same variables."""
    clusters = pytest.importorskip("jax._src.clusters")
    for environ, kind in ((SLURM, clusters.SlurmCluster), (OPEN_MPI, clusters.OmpiCluster)):
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            assert detect(environ).coordinator == kind.get_coordinator_address(1, None)


def test_kubernetes():
    assert detect(KUBERNETES) == Place("lmeraser-workers-0-0.lmeraser:9876", 4, 2)
    for name in ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"):
        with pytest.raises(UserError, match=f"{name} is not set"):
            detect({key: value for key, value in KUBERNETES.items() if key != name})


def test_flags_come_first_and_together():
    assert detect(SLURM, "[::1]:99", 3, 0) == Place("[::1]:99", 3, 0)
    with pytest.raises(UserError, match="--num_processes, --process_id missing"):
        detect({}, "host:99")
    with pytest.raises(UserError, match="--coordinator_address missing"):
        detect({}, "", 2, 1)
    for given in (("host", 2, 0), ("host:99", 2, 2), ("host:99", 2, -1), ("host:99", 0, 0), ("a b:1", 2, 0)):
        with pytest.raises(UserError, match="must be"):
            detect({}, *given)


def test_the_command_line_takes_the_flags(capsys):
    flags = ["lmeraser", "--workdir=w", "--coordinator_address=h:1", "--num_processes=3", "--process_id=2"]
    assert common.place_of(common.parse(train, flags)) == Place("h:1", 3, 2)
    assert main.main(["train", "--workdir=w", "--num_processes=3"]) == 2
    assert "--coordinator_address, --process_id missing" in capsys.readouterr().err


def test_the_line_to_resume_with_leaves_the_place_out():
    place = ["--coordinator_address=h:1", "-num_processes", "2", "--process_id", "0"]
    assert main._of_one(["train", "--workdir", "w", *place, "--json=-", "2"]) == [
        "train",
        "--workdir",
        "w",
        "--json=-",
        "2",
    ]


def test_what_process_0_does_alone_the_others_leave_to_it(monkeypatch, capsys, tmp_path):
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert main.main(["inspect", f"--workdir={tmp_path}/nothing"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert main.main(["inspect", f"--workdir={tmp_path}/nothing"]) == 2
    assert "does not exist" in capsys.readouterr().err
