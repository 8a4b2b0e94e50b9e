"""The files in launch/: scripts that lose neither a signal nor an exit code, and a manifest that the cluster knows."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from teams import within

from lmeraser_jax.training.places import Place, detect

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SAYS = 'echo "$(basename "$0") $* [${CUDA_VISIBLE_DEVICES:-}]"; exit ${CODE:-0}'
PROGRAMS = {"lmeraser": SAYS, "srun": 'shift; exec "$@"', "scancel": SAYS, "scontrol": SAYS}


def start(script: str, folder: Path, *arguments: str, programs: dict[str, str] | None = None, **environ: str):
    """Starts a script with programs of our own in place of lmeraser, srun, scancel and scontrol."""
    for name, body in (PROGRAMS | (programs or {})).items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "CUDA", "PROCESSES"))}
    plain |= {"PATH": f"{folder}:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["bash", "-c", 'SCRIPT=$$ exec bash "$@"', "", str(LAUNCH / script), *arguments]
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
    try:
        return subprocess.Popen(command, env=plain | environ, start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, heard)


def run(script: str, folder: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    """Runs it to its end; whatever it started ends with it."""
    with start(script, folder, *arguments, **how) as process:
        return ended(process)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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


# ---- one machine


def test_local(tmp_path):
    assert "usage:" in run("local.sh", tmp_path).stderr
    assert run("local.sh", tmp_path, "train", "--x=a b", GPUS="1,3").stdout == "lmeraser train --x=a b [1,3]\n"
    done = run("local.sh", tmp_path, "train", PROCESSES="2", GPUS="5,7", PORT="999")
    where = "lmeraser train --coordinator_address=127.0.0.1:999 --num_processes=2"
    assert sorted(done.stdout.splitlines()) == [f"{where} --process_id=0 [5]", f"{where} --process_id=1 [7]"]
    wrong = run("local.sh", tmp_path, "train", PROCESSES="2", GPUS="0")
    assert wrong.returncode == 2 and "name one for each process" in wrong.stderr


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", " "])
def test_local_refuses_what_is_no_number_of_processes(tmp_path, count):
    done = run("local.sh", tmp_path, "train", PROCESSES=count)
    assert (done.returncode, done.stdout) == (2, "") and "at least 1" in done.stderr


BY_NUMBER = 'index="${*: -1}"; index="${index#--process_id=}"\n'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("exit 7", 7),
        ('[ "$index" = 0 ] && sleep 0.3; [ "$index" = 0 ] || exit 7', 7),  # a worker, long before process 0
        ('[ "$index" = 0 ] && exit 3; sleep 0.3; exit 0', 3),
        ('[ "$index" = 1 ] || exit 0; exit 2', 2),
        ("exit 0", 0),
    ],
)
def test_local_ends_with_the_highest_code_whoever_ends_first(tmp_path, body, code):
    for _ in range(3):
        done = run("local.sh", tmp_path, "train", PROCESSES="3", programs={"lmeraser": BY_NUMBER + body})
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_local_passes_a_signal_on_and_waits(tmp_path, how):
    """Codes are those of the processes, not those of waits that the signal ended."""
    body = f"""{BY_NUMBER}trap 'sleep 0.3; echo "saved $index"; exit "$((index * 4))"' TERM
    touch "$(dirname "$0")/ready-$index"; while :; do sleep 0.05; done"""
    with start("local.sh", tmp_path, "train", PROCESSES="2", programs={"lmeraser": body}) as process:
        assert within(30, lambda: all((tmp_path / f"ready-{index}").exists() for index in range(2)))
        for _ in range(3):
            os.kill(process.pid, signal.SIGTERM) if how == "kill" else os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.05)
        done = ended(process)
    assert done.returncode == 4 and set(done.stdout.splitlines()) == {"saved 0", "saved 1"}, done.stderr


# ---- Slurm


def inside(folder: Path) -> dict[str, str]:
    return {"SLURM_JOB_ID": "5", "WORKDIR": str(folder / "w d"), "STOP": str(folder / "stop")}


def test_slurm_script(tmp_path):
    wrong = run("slurm.sbatch", tmp_path)
    assert wrong.returncode != 0 and "WORKDIR: the folder of the run" in wrong.stderr
    assert "CONFIG: the experiment" in run("slurm.sbatch", tmp_path, **inside(tmp_path)).stderr
    done = run("slurm.sbatch", tmp_path, "--config.seed=2", CONFIG="c.py", **inside(tmp_path))
    wanted = f"lmeraser train --workdir={tmp_path}/w d --config=c.py --config.seed=2 []\n"
    assert (done.returncode, done.stdout) == (0, wanted), done.stderr
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sbatch").read_text(), re.M))
    assert options["signal"] == "B:TERM@300" and "requeue" in options and "gpus-per-task" not in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]


@pytest.mark.parametrize("srun", ["exit 9", 'kill -TERM "$SCRIPT"; exit 9'])
def test_slurm_script_keeps_the_code_of_a_step_that_ends_at_once(tmp_path, srun):
    for _ in range(10):
        programs = {"srun": srun, "scancel": "sleep 0.05"}
        done = run("slurm.sbatch", tmp_path, COMMAND="process", programs=programs, **inside(tmp_path))
        assert (done.returncode, done.stdout) == (9, ""), done.stderr


@pytest.mark.parametrize("scancel", ["", "sleep 0.5\n", "exit 1\n"], ids=["fast", "slow", "failing"])
def test_slurm_script_passes_sigterm_on_and_requeues(tmp_path, scancel):
    programs = {"scancel": f'echo "scancel $*"; touch "$STOP"\n{scancel}'}
    programs["srun"] = 'kill -TERM "$SCRIPT"\nwhile [ ! -e "$STOP" ]; do sleep 0.02; done\nsleep 0.1\necho saved\n'
    done = run("slurm.sbatch", tmp_path, COMMAND="process", programs=programs, **inside(tmp_path))
    wanted = ["scancel --signal=TERM 5", "saved", "scontrol requeue 5 []"]
    assert (done.returncode, done.stdout.splitlines()) == (0, wanted), done.stderr


def test_slurm_script_that_is_stopped_before_its_step_requeues_without_one(tmp_path):
    (tmp_path / "activate").write_text('kill -TERM "$$"\n')
    environ = inside(tmp_path) | {"ENVIRONMENT": str(tmp_path / "activate"), "COMMAND": "process"}
    done = run("slurm.sbatch", tmp_path, **environ)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["scontrol requeue 5 []"]), done.stderr


def test_slurm_script_that_fails_after_sigterm_is_not_requeued(tmp_path):
    programs = {"scancel": 'touch "$STOP"'}
    programs["srun"] = 'kill -TERM "$SCRIPT"\nwhile [ ! -e "$STOP" ]; do sleep 0.02; done\nexit 2\n'
    done = run("slurm.sbatch", tmp_path, COMMAND="process", programs=programs, **inside(tmp_path))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr


# ---- Kubernetes

JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.fixture
def manifest():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((LAUNCH / "k8s_jobset.yaml").read_text())


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(Path(__file__).with_name("jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def structures(value) -> list[dict]:
    """Every structure of a manifest, from the outside in; not the free maps of quantities."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [value] if isinstance(value, dict) else []
    return found + [one for name, part in inside if name not in ("requests", "limits") for one in structures(part)]


def test_jobset_has_fields_that_the_api_has(manifest, validator):
    assert [error.message for error in validator.iter_errors(manifest)] == []
    assert len(structures(manifest)) > 15
    for one in structures(manifest):
        one["surprise"] = 1
        assert not validator.is_valid(manifest)
        del one["surprise"]
        for name in [name for name in ("apiVersion", "template", "spec", "name", "image", "mountPath") if name in one]:
            value = one.pop(name)
            assert not validator.is_valid(manifest), name
            one[name] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("apiVersion",), "jobset.x-k8s.io/v1alpha1"),
        (("metadata", "name"), "LMEraser"),
        (("spec", "network", "enableDNSHostnames"), "true"),
        (("spec", "failurePolicy", "maxRestarts"), -1),
        (("spec", "replicatedJobs"), {}),
        ((*JOB, "completionMode"), "indexed"),
        ((*JOB, "parallelism"), "4"),
        ((*POD, "restartPolicy"), "Always"),
        ((*POD, "containers", 0, "env", 2, "value"), 4),
        ((*POD, "containers", 0, "args"), "lmeraser"),
        ((*POD, "containers", 0, "resources", "limits", "nvidia.com/gpu"), "one"),
        ((*POD, "containers", 0, "volumeMounts", 0, "mountPath"), "data"),
    ],
)
def test_jobset_values_are_those_that_the_api_takes(manifest, validator, place, value):
    inner = manifest
    for step in place[:-1]:
        inner = inner[step]
    assert place[-1] in inner or isinstance(inner, list)
    inner[place[-1]] = value
    assert not validator.is_valid(manifest)


def test_jobset_starts_the_processes_of_one_command(manifest):
    made, spec = manifest, manifest["spec"]
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
