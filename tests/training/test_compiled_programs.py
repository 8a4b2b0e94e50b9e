"""What surrounds the compiled program: kept on disk for the next process, with the same bits; traced when asked."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax._src.compilation_cache import decompress_executable
from tuning_problem import GROUPS, small_spec, tune_groups

from lmeraser_jax.cli import main
from lmeraser_jax.errors import UserError
from lmeraser_jax.training import profiling

TUNE = """
import json, sys
from lmeraser_jax.cli import main
if "keep" in sys.argv:
    main.keep_compiled_programs()
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
from tuning_problem import GROUPS, small_data, small_spec, tune_groups
from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.storage.checkpoints import flatten
slice_ = tune_groups(small_spec(epochs=2), {"c1": GROUPS["c1"]})["c1"].slice
private = [bytes(small_data()[0][row]) for row in GROUPS["c1"]]
private += [leaf.tobytes()[:64] for leaf in slice_[:3]]
facts = {"private": [needle.hex() for needle in private], "hits": len(hits)}
print(json.dumps(facts | {"params_digest": arrays_digest(flatten(slice_))}))
"""


def tune_in_a_process(home, *flags):
    """Tunes a cluster in another process, whose cache is below `home`; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TUNE, *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.slow
def test_a_kept_program_gives_the_same_bits_and_holds_no_image_and_no_parameter(tmp_path):
    """Kept programs outlive erasures."""
    first, second = tune_in_a_process(tmp_path, "keep"), tune_in_a_process(tmp_path, "keep")
    fresh = tune_in_a_process(tmp_path)
    assert first["params_digest"] == second["params_digest"] == fresh["params_digest"]
    assert second["hits"] > 0 == first["hits"] == fresh["hits"]
    files = list((tmp_path / "lmeraser_jax").glob("*-cache"))
    programs = [decompress_executable(file.read_bytes()) for file in files]
    assert any(b"device_program" in program for program in programs), "the search is not blind"
    private = [bytes.fromhex(needle) for needle in first["private"]]
    assert len(private) > 5 and not any(needle in program for needle in private for program in programs)


def test_a_folder_that_the_user_chose_is_not_overruled(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "elsewhere", "XDG_CACHE_HOME": str(tmp_path)})
    main.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def tune_in_many_calls():
    return tune_groups(small_spec(scan_steps=4))


def test_a_few_calls_are_traced_once(tmp_path, capsys):
    with profiling.into(str(tmp_path)):
        tune_in_many_calls()
        assert list(tmp_path.rglob("*.xplane.pb"))
        before = sorted(tmp_path.rglob("*"))
        tune_in_many_calls()
        assert sorted(tmp_path.rglob("*")) == before, "one tuning is enough"
    assert capsys.readouterr().err == ""


def test_too_few_calls_give_a_warning(tmp_path, capsys):
    with profiling.into(str(tmp_path)):
        tune_groups(small_spec(scan_steps=4, min_steps=0), {"c": np.arange(4)})
    assert "--config.tuning.scan_steps" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_trace_ends_with_a_tuning_that_fails(tmp_path):
    with pytest.raises(KeyError), profiling.into(str(tmp_path)), profiling.Trace() as trace:
        trace.next_call()
        trace.next_call()
        raise KeyError
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / "file" / "x"), "/proc/nope", "/proc"):
        with pytest.raises(UserError, match=f"^--profile={folder} cannot be written: "), profiling.into(folder):
            pytest.fail("the work began")


def test_a_trace_that_fails_costs_no_slice(tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("no room")

    for name in ("stop_trace", "start_trace"):
        real = getattr(jax.profiler, name)
        with monkeypatch.context() as patch, profiling.into(str(tmp_path / "new" / "folder")):
            patch.setattr(jax.profiler, name, failing)
            assert tune_in_many_calls().keys() == GROUPS.keys()
        assert capsys.readouterr().err == "warning: --profile: no trace was written: no room\n"
        if name == "stop_trace":
            real()
