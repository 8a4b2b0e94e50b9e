"""The files in launch/: scripts that lose neither a signal nor an exit code, and a manifest that a cluster accepts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from lmeraser_jax.cli import common, main, serve

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SAY = 'echo "$(basename "$0") $* [${CUDA_VISIBLE_DEVICES:-}]"; exit ${CODE:-0}'
WAIT = 'trap "echo $(basename "$0") got TERM; exit ${CODE:-0}" TERM; echo ready; while :; do sleep 0.05; done'


def start(script: str, folder: Path, *arguments: str, programs: dict[str, str] | None = None, **environment: str):
    """Starts a script with stand-ins for lmeraser, srun, scancel and scontrol."""
    stand_ins = {"lmeraser": SAY, "srun": 'shift; exec "$@"', "scancel": SAY, "scontrol": SAY} | (programs or {})
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "CUDA", "PROCESSES"))}
    command = ["bash", str(LAUNCH / script), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=plain | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment, **pipes)


def run(script: str, folder: Path, *arguments: str, **options) -> tuple[int, str, str]:
    process = start(script, folder, *arguments, **options)
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def test_the_scripts_pass_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("shellcheck is not installed (it is in the extra: test)")
    for script in ("local.sh", "slurm.sbatch"):
        done = subprocess.run([program, str(LAUNCH / script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_local_passes_the_command_on(tmp_path):
    assert run("local.sh", tmp_path, "train", "--workdir=a b") == (0, "lmeraser train --workdir=a b []\n", "")
    assert run("local.sh", tmp_path, "train", GPUS="2,3")[1] == "lmeraser train [2,3]\n"
    assert run("local.sh", tmp_path, "train", CODE="3")[0] == 3


def test_local_gives_each_process_its_place_and_its_gpu(tmp_path):
    code, out, _ = run("local.sh", tmp_path, "process", "--workdir=w", PROCESSES="2", GPUS="4,6", PORT="1234")
    place = "lmeraser process --workdir=w --coordinator_address=127.0.0.1:1234 --num_processes=2 --process_id="
    assert code == 0 and sorted(out.splitlines()) == [f"{place}0 [4]", f"{place}1 [6]"]


def test_local_ends_with_the_highest_exit_code(tmp_path):
    first_fails = 'case "$*" in *process_id=0*) exit 5;; esac; exit 1'
    assert run("local.sh", tmp_path, "train", PROCESSES="3", programs={"lmeraser": first_fails})[0] == 5


def test_local_refuses_what_cannot_be(tmp_path):
    for environment, text in (
        ({"PROCESSES": "two"}, "PROCESSES=two"),
        ({"PROCESSES": "2", "GPUS": "1"}, "names 1 GPUs"),
    ):
        code, out, error = run("local.sh", tmp_path, "train", **environment)
        assert code == 2 and text in error and not out
    assert "usage" in run("local.sh", tmp_path)[2]
    assert "evaluate runs in one process" in run("local.sh", tmp_path, "evaluate", PROCESSES="2")[2]


@pytest.mark.parametrize("code", ["0", "3"])
def test_a_signal_reaches_every_process_and_no_exit_code_is_lost(tmp_path, code):
    process = start("local.sh", tmp_path, "train", PROCESSES="2", CODE=code, programs={"lmeraser": WAIT})
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["ready\n", "ready\n"]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out == "lmeraser got TERM\n" * 2 and process.returncode == int(code)


def test_slurm_runs_the_command_by_all_tasks(tmp_path):
    job = {"WORKDIR": str(tmp_path / "run"), "SLURM_JOB_ID": "7"}
    code, out, _ = run("slurm.sbatch", tmp_path, "--config.seed=1", CONFIG="c.py", **job)
    assert code == 0
    assert out == f"lmeraser train --distributed --workdir={tmp_path}/run --config=c.py --config.seed=1 []\n"
    assert run("slurm.sbatch", tmp_path, COMMAND="process", CODE="2", **job)[0] == 2
    for lacking in ("WORKDIR", "SLURM_JOB_ID", "CONFIG"):
        given = {name: value for name, value in ({"CONFIG": "c.py"} | job).items() if name != lacking}
        code, out, error = run("slurm.sbatch", tmp_path, **given)
        assert code != 0 and lacking in error and "lmeraser" not in out


def test_slurm_passes_sigterm_to_the_tasks_and_requeues(tmp_path):
    passing = 'echo "scancel $*"; kill -TERM "$(cat "$TASK")"'
    programs = {"srun": 'echo $$ > "$TASK"; shift; exec "$@"', "lmeraser": WAIT, "scancel": passing}
    job = {"WORKDIR": str(tmp_path), "SLURM_JOB_ID": "7", "CONFIG": "c.py", "TASK": str(tmp_path / "task")}
    process = start("slurm.sbatch", tmp_path, programs=programs, **job)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out.splitlines() == ["scancel --signal=TERM 7", "lmeraser got TERM", "scontrol requeue 7 []"]
    assert process.returncode == 0


def test_the_jobset_is_valid_and_its_names_agree():
    documents = list(yaml.safe_load_all((LAUNCH / "k8s_jobset.yaml").read_text()))
    jobset = documents[-1]
    jsonschema.validate(jobset, json.loads(Path(__file__).with_name("jobset.schema.json").read_text()))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    assert jobset["spec"]["network"]["subdomain"] == jobset["metadata"]["name"], "JAX looks for pod 0 there"
    pod = job["template"]["spec"]
    account, role, binding = documents[:3]
    assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["args"][0] == "train" and "--distributed" in container["args"]
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


def test_the_deployment_of_the_service_fits_its_flags_and_routes():
    deployment, service = yaml.safe_load_all((LAUNCH / "k8s_service.yaml").read_text())
    spec = deployment["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert spec["replicas"] == 1 and spec["strategy"]["type"] == "Recreate"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    arguments = common.parse(serve, ["lmeraser", *container["args"][1:]])
    assert arguments is not None and arguments["port"] == port["containerPort"] and arguments["tokens"]
    probes = {probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert probes == {"/healthz", "/readyz"}


def test_the_container_starts_the_service():
    lines = dict(line.split(" ", 1) for line in (LAUNCH / "Containerfile").read_text().splitlines() if " " in line)
    assert json.loads(lines["ENTRYPOINT"]) == ["lmeraser"]
    command, *flags = json.loads(lines["CMD"])
    arguments = common.parse(serve, ["lmeraser", *flags])
    assert command == "serve" and arguments is not None and str(arguments["port"]) == lines["EXPOSE"]


def test_the_flags_of_a_place_go_together(capsys):
    for flags, text in (
        (["--num_processes=2"], "--coordinator_address, --process_id missing"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "--process_id=2: must be below"),
        (["--process_id=-1"], "process_id"),
        *(
            ([f"--coordinator_address={address}", "--num_processes=2", "--process_id=0"], "must be HOST:PORT")
            for address in ("127.0.0.1", "127.0.0.1:999999", "127.0.0.1:abc", "", ":1")
        ),
    ):
        assert main.main(["train", "--workdir=w", *flags]) == 2
        assert text in capsys.readouterr().err
    assert main.main(["inspect", "--workdir=w", "--num_processes=2"]) == 2, "inspect is not shared"


def test_the_line_to_resume_with_names_no_place():
    line = ["train", "--workdir=w", "--distributed", "--coordinator_address=h:1", "--num_processes=2", "--process_id=1"]
    assert main._without_place(line) == ["train", "--workdir=w"]
    assert {flag.name for flag in common.PLACE} == {"coordinator_address", "num_processes", "process_id"}
