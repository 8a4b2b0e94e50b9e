"""Settings from outside: those that can change bits are pinned while a run is open, or part of the fingerprint."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from fnmatch import fnmatch

import jax
import numpy as np
import pytest
from helpers import small_config, small_run

from lmeraser_jax.training.fingerprint import PINNED, RECORDED, VARIABLES, fingerprint
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.audit import audit, differences, state

PINS = {name: not value for name, value in PINNED.items() if isinstance(value, bool)}  # other values than the program's
PINS |= {"default_prng_impl": "rbg", "default_matmul_precision": "bfloat16"}
PINS |= {"default_device": "cpu", "transfer_guard": "disallow"}
HARMLESS = """
log_* *logging* *debug_log* explain_cache_misses distributed_debug pprint_* *traceback* source_url_schema dump_ir_*
hlo_source_file_canonicalization_regex include_debug_info_in_dumps captured_constants_* *compilation_cache*
*persistent_cache* remove_custom_partitioning_ptr_from_cache_key share_binary_* pgle_* enable_checks
check_tracer_leaks check_static_indices debug_key_reuse debug_leaked_* no_tracing no_execution numpy_*_promotion
legacy_prng_key explicit_x64_dtypes allow_f16_reductions thread_guard mutable_array_checks disable_bwd_checks
auto_pcast disable_vmap_shmap_error disallow_mesh_context_manager array_garbage_collection_guard transfer_guard*
*_runtime_errors platform* xla_backend backend_target *_visible_devices num_cpu_devices mock_gpu_topology
mock_num_gpu_processes cpu_* *cross_host* check_proxy_envs enable_preemption_service enable_recoverability
sort_devices_by_process_index serialization_version export_* jax2tf_* check_vma *_cusparse_* use_magma
high_dynamic_range_gumbel refs_to_pins ragged_dot_* mosaic_allow_hlo use_emit_pipeline_primitive pallas_*
"""  # they change what is logged, cached, checked or refused, choose the devices, or are for what is not used here


@contextlib.contextmanager
def globally(settings):
    """Sets what the environment of a process would; afterwards checks that it is still set."""
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        changed = dict(jax.config.values)
        yield
        assert jax.config.values == changed, "the settings of the caller are not those from before"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_every_setting_of_jax_is_pinned_recorded_or_harmless():
    others = jax.config.values.keys() - RECORDED.keys() - {f"jax_{name}" for name in PINNED}
    patterns = HARMLESS.split()
    assert not [n for n in others if not any(fnmatch(n.removeprefix("jax_"), pattern) for pattern in patterns)]
    assert {name: jax.config.values[name] for name in RECORDED} == RECORDED and PINS.keys() == PINNED.keys()


def test_a_request_under_other_settings_gives_the_same_bits(trained_workdir, erased_template):
    with small_run(erased_template) as run:
        expected, program = state(run), run.fingerprint
    with globally({f"jax_{name}": value for name, value in PINS.items()}):
        with small_run(trained_workdir) as run:
            erase.request_erasure(run, [run.catalog.live("train").ids[0]])
            assert {name: jax.config.values[f"jax_{name}"] for name in PINNED} == PINNED
            assert run.fingerprint == program and differences(state(run), expected) == []
            assert audit(run, sample=1).ok


def test_what_is_recorded_is_part_of_the_fingerprint(monkeypatch):
    tuning, mesh = small_config().tuning, mesh_of(jax.devices()[:1])
    plain = fingerprint(tuning, mesh)
    assert fingerprint(dataclasses.replace(tuning, lanes=5), mesh) != plain
    assert all(text in plain for text in (jax.__version__, np.__version__, '"settings":{}'))
    others = {bool: lambda old: not old, int: lambda old: old + 7, float: lambda _: 0.5, type(None): lambda _: "a:1"}
    for name, old in RECORDED.items():
        texts = {"ignore": "raise", "O2": "O1", "UNKNOWN": "O1"}
        with globally({name: texts[old] if isinstance(old, str) else others[type(old)](old)}):
            assert name in fingerprint(tuning, mesh), name
    for name in VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "3")
            assert fingerprint(tuning, mesh) != plain, name
    assert fingerprint(tuning, mesh) == plain
    if mesh.devices.flat[0].platform == "cpu":  # XLA divides its work among the CPUs that it may use
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
        assert '"cpus":5' in fingerprint(tuning, mesh)


@pytest.mark.slow
def test_an_audit_is_bit_identical_under_the_environment_of_another_user(trained_workdir):
    texts = {True: "1", False: "0"}
    settings = {f"JAX_{name.upper()}": texts.get(value, value) for name, value in PINS.items()}
    settings |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "lmeraser_jax.cli.main", "audit", f"--workdir={trained_workdir}"]
    answer = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "bit-identical: 5 of 5 slices\n"), answer.stderr
