"""Where a process stands, told by flags or by a scheduler's variables; the files in launch/ set what is looked for."""

from pathlib import Path

import pytest

from lmeraser_jax.cli import common, main, train
from lmeraser_jax.errors import UserError
from lmeraser_jax.training.places import BY_HAND, Place, detect

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
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
        ("gpu[1-2]-ib", "gpu1-ib"),
        ("gpu[3,5-6]-ib,other", "gpu3-ib"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("r[01,07]n[12-14]-ib[0],r2n[3-4]", "r01n12-ib0"),
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
    both = "1531576320.0;tcp6://[fe80::1]:34912;tcp://10.96.0.1:34911"
    assert detect(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": both}) == alone
    for uri in ("1531576320.0;tcp6://[fe80::1]:34911", "nonsense"):
        with pytest.raises(UserError, match=f"names no IPv4 address.*{BY_HAND}"):
            detect(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri})


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        (SLURM, ("SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_LOCALID")),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri"),
        ),
    ],
    ids=["Slurm", "Open MPI"],
)
@pytest.mark.parametrize("empty", [False, True])
def test_variables_that_a_scheduler_left_out_are_named(environ, names, empty):
    for name in names:
        kept = {key: value for key, value in environ.items() if key != name} | ({name: ""} if empty else {})
        with pytest.raises(UserError, match=f"does not set {name}; {BY_HAND}"):
            detect(kept)


def test_counts_must_be_numbers_and_empty_ones_are_not_set():
    assert detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": ""}) == detect(OPEN_MPI)
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        assert detect({name: "", "SLURM_PROCID": "0"}) is None
        with pytest.raises(UserError, match=f"{name}='two' must be a whole number"):
            detect({name: "two"})
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"):
        with pytest.raises(UserError, match=f"{name}='x'"):
            detect(SLURM | {name: "x"})
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        with pytest.raises(UserError, match="'x' is no number|at least 1, the index 0"):
            detect(SLURM | {name: "x"})
    for nodes in ("[", "[]", "[-2]", ",a", "]", "a[", "a[]", "a[-2]", "a[1"):
        with pytest.raises(UserError, match=f"names no node; {BY_HAND}"):
            detect(SLURM | {"SLURM_STEP_NODELIST": nodes})


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
    assert detect(SLURM, "10.0.0.1:99", 3, 0) == Place("10.0.0.1:99", 3, 0)
    with pytest.raises(UserError, match="--num_processes, --process_id missing"):
        detect({}, "host:99")
    with pytest.raises(UserError, match="--coordinator_address missing"):
        detect({}, "", 2, 1)
    for given in (("host:99", 2, 2), ("host:99", 2, -1), ("host:99", 0, 0)):
        with pytest.raises(UserError, match="the number of processes must be at least 1, the index 0 to that"):
            detect({}, *given)


@pytest.mark.parametrize(
    "address",
    ["host", "a b:1", ":99", "host:", "host:0", "host:65536", "host:99999", "host:123456", "host:-1", "host:x"]
    + ["[::1]:99", "::1:99", "fe80::1"],
)
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(UserError, match="must be HOST:PORT, HOST a name or an IPv4 address, PORT between 1 and 65535"):
        detect({}, address, 2, 0)
    assert detect({}, "host:65535", 2, 0) == Place("host:65535", 2, 0)


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
