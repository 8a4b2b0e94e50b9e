"""Where a process stands, told by flags or by a scheduler's variables; the files in launch/ set what is looked for."""

import os
import re
import shutil
import subprocess
import sys
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


# ---- the files


def shellcheck() -> str:
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not found:
        pytest.skip("shellcheck is not installed (it is in the extra: test)")
    return found


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_scripts_are_clean_and_strict(name):
    text = (LAUNCH / name).read_text()
    assert "set -euo pipefail" in text and os.access(LAUNCH / name, os.X_OK)
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    done = subprocess.run([shellcheck(), str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run(script, folder: Path, *arguments, **environ) -> subprocess.CompletedProcess:
    """Runs a script with programs of our own in place of lmeraser, srun, scancel and scontrol."""
    for name in ("lmeraser", "srun", "scancel", "scontrol"):
        fake = folder / name
        body = f'echo "{name} $* [${{CUDA_VISIBLE_DEVICES:-}}]"; exit ${{CODE:-0}}'
        body = 'shift\nexec "$@"' if name == "srun" else body
        fake.write_text(f"#!/usr/bin/env bash\n{body}\n")
        fake.chmod(0o755)
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "CUDA"))}
    plain |= {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=plain | environ, capture_output=True, text=True, timeout=60)


def test_local(tmp_path):
    assert "usage:" in run("local.sh", tmp_path).stderr
    assert run("local.sh", tmp_path, "train", "--x=a b", GPUS="1,3").stdout == "lmeraser train --x=a b [1,3]\n"
    done = run("local.sh", tmp_path, "train", PROCESSES="2", GPUS="5,7", PORT="999")
    where = "lmeraser train --coordinator_address=127.0.0.1:999 --num_processes=2"
    assert sorted(done.stdout.splitlines()) == [f"{where} --process_id=0 [5]", f"{where} --process_id=1 [7]"]
    assert run("local.sh", tmp_path, "train", PROCESSES="2", CODE="7").returncode == 7
    wrong = run("local.sh", tmp_path, "train", PROCESSES="2", GPUS="0")
    assert wrong.returncode == 2 and "name one for each process" in wrong.stderr


def test_slurm_script(tmp_path):
    wrong = run("slurm.sbatch", tmp_path)
    assert wrong.returncode != 0 and "WORKDIR: the folder of the run" in wrong.stderr
    inside = {"SLURM_JOB_ID": "5", "WORKDIR": str(tmp_path / "w d")}
    assert "CONFIG: the experiment" in run("slurm.sbatch", tmp_path, **inside).stderr
    done = run("slurm.sbatch", tmp_path, "--config.seed=2", CONFIG="c.py", **inside)
    wanted = f"lmeraser train --workdir={tmp_path}/w d --config=c.py --config.seed=2 []\n"
    assert (done.returncode, done.stdout) == (0, wanted), done.stderr
    assert run("slurm.sbatch", tmp_path, CONFIG="c.py", CODE="2", **inside).returncode == 2


def test_slurm_script_passes_sigterm_on_and_requeues(tmp_path):
    (tmp_path / "scancel").write_text('#!/bin/sh\necho "scancel $*"\ntouch "$STOP"\n')
    real = (LAUNCH / "slurm.sbatch").read_text()
    script = tmp_path / "job"
    script.write_text(real)
    waits = '#!/usr/bin/env bash\nkill -TERM "$PPID"\nwhile [ ! -e "$STOP" ]; do sleep 0.05; done\necho saved\n'
    for name, body in (("srun", waits), ("scontrol", '#!/bin/sh\necho "scontrol $*"\n')):
        (tmp_path / name).write_text(body)
    for name in ("scancel", "srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "STOP": f"{tmp_path}/stop"}
    environ |= {"WORKDIR": str(tmp_path), "COMMAND": "process"}
    done = subprocess.run(["bash", str(script)], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["scancel --signal=TERM 5", "saved", "scontrol requeue 5"], done.stderr
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", real, re.M))
    assert options["signal"] == "B:TERM@300" and "requeue" in options and "gpus-per-task" not in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_jobset():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    made = yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = made["spec"]
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    assert group["replicas"] == 1 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert spec["failurePolicy"]["maxRestarts"] > 0 and spec["network"]["enableDNSHostnames"] is True
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environ = {one["name"]: one["value"] for one in container["env"]}
    host = f"{made['metadata']['name']}-{group['name']}-0-0.{spec['network']['subdomain']}"
    place = detect(environ | {"JOB_COMPLETION_INDEX": "3"})
    assert place == Place(f"{host}:9876", 4, 3) and job["parallelism"] == job["completions"] == place.size
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 300
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and environ["WORKDIR"].startswith(mount["mountPath"])
    script = container["args"][0]
    for name in ("WORKDIR", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"):
        assert f"${{{name}:?}}" in script
    subprocess.run(["sh", "-n", "-c", script], check=True)
