"""What surrounds the compiled program: kept on disk for the next process, with the same bits; traced when asked."""

import json
import os
import subprocess
import sys

import jax
import pytest
from jax._src.compilation_cache import decompress_executable
from tuning_problem import GROUPS, problem_of, run, small_backbone, small_data

from lmeraser_jax.cli import main
from lmeraser_jax.errors import UserError
from lmeraser_jax.training import profiling

TUNED = """
import json, sys
from lmeraser_jax.cli import main
if "--kept" in sys.argv:
    main.keep_compiled_programs()
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
from tuning_problem import GROUPS, problem_of, run, small_backbone, small_data
from lmeraser_jax.digests import arrays_digest
from lmeraser_jax.storage.checkpoints import flatten
found = run(problem_of(small_backbone(), epochs=2), small_backbone(), small_data(), {"c1": GROUPS["c1"]})
private = [bytes(small_data()[0][row]) for row in GROUPS["c1"]]
private += [leaf.tobytes()[:64] for leaf in found["c1"].slice[:3]]
made = {"private": [one.hex() for one in private], "hits": len(hits)}
print(json.dumps(made | {"params": arrays_digest(flatten(found["c1"].slice))}))
"""


def tuned(home, *flags):
    """What another process makes of a cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, "-c", TUNED, *flags]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True, env=environment).stdout)


def test_a_kept_program_is_found_again_and_gives_the_same_bits(tmp_path):
    first, second, fresh = tuned(tmp_path, "--kept"), tuned(tmp_path, "--kept"), tuned(tmp_path)
    assert first["params"] == second["params"] == fresh["params"]
    assert second["hits"] > 0 == first["hits"] == fresh["hits"]
    assert any("device_program" in path.name for path in (tmp_path / "lmeraser_jax").iterdir())


def kept_bytes(folder):
    """Everything that the kept programs hold."""
    for path in folder.glob("*-cache"):
        yield decompress_executable(path.read_bytes())


def test_a_kept_program_holds_no_image_and_no_parameter(tmp_path):
    """They outlive erasures."""
    private = [bytes.fromhex(one) for one in tuned(tmp_path, "--kept")["private"]]
    programs = list(kept_bytes(tmp_path / "lmeraser_jax"))
    assert any(b"device_program" in program for program in programs), "the search is not blind"
    assert len(private) > 5 and not any(one in program for one in private for program in programs)


def test_whoever_chose_a_folder_is_not_overruled(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "elsewhere", "XDG_CACHE_HOME": str(tmp_path)})
    main.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def tune_in_calls(scan_steps):
    problem = problem_of(small_backbone(), scan_steps=scan_steps, epochs=2)
    return run(problem, small_backbone(), small_data(), GROUPS)


def test_a_few_calls_are_traced(tmp_path, capsys):
    with profiling.into(str(tmp_path)):
        tune_in_calls(4)
        assert list(tmp_path.rglob("*.xplane.pb"))
        before = sorted(tmp_path.rglob("*"))
        tune_in_calls(4)
        assert sorted(tmp_path.rglob("*")) == before, "one tuning is enough"
    assert capsys.readouterr().err == ""


def test_too_few_calls_are_said(tmp_path, capsys):
    with profiling.into(str(tmp_path)):
        tune_in_calls(1000)
    assert "--config.tuning.scan_steps" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_trace_ends_with_a_tuning_that_fails(tmp_path):
    with pytest.raises(KeyError), profiling.into(str(tmp_path)), profiling.tracing() as trace:
        trace.next_call()
        trace.next_call()
        raise KeyError
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("name", ["file/x", "/proc/nope", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "file").write_text("")
    folder = name if name.startswith("/") else str(tmp_path / name)
    with pytest.raises(UserError, match=f"^--profile={folder} cannot be written: "), profiling.into(folder):
        pytest.fail("the work began")


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_costs_no_slice(tmp_path, monkeypatch, capsys, broken):
    real = getattr(jax.profiler, broken)

    def failing(*args):
        if broken == "stop_trace":
            real(*args)
        raise RuntimeError("no room")

    monkeypatch.setattr(jax.profiler, broken, failing)
    with profiling.into(str(tmp_path / "new" / "folder")):
        done = tune_in_calls(4)
    assert done.keys() == GROUPS.keys()
    assert capsys.readouterr().err == "warning: --profile: no trace was written: no room\n"
