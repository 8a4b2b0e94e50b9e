"""What the bits of a slice depend on beside its recipe: settings from outside, program, libraries, hardware.

A setting of JAX that can change bits is pinned here, for as long as a run is open, or is part of the fingerprint.
All others change what is logged, cached, checked or refused, or what this package does not use.
"""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lmeraser_jax.config import Tuning
from lmeraser_jax.hashing import canonical_json, digest
from lmeraser_jax.training.features import compute_dtype

PINNED: dict[str, Any] = {  # settings that JAX can set for a while; the last three would refuse what is wanted
    "enable_x64": False,
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
    "enable_custom_prng": False,
    "default_matmul_precision": None,
    "default_device": None,
    "disable_jit": False,
    "softmax_custom_jvp": False,
    "debug_nans": False,
    "debug_infs": False,
    "transfer_guard": "allow",
}
ON = "compiler_enable_remat_pass use_direct_linearize use_shardy_partitioner"
OFF = """
scan3 remat3 custom_vjp3 compilation_cache_expect_pgle disable_most_optimizations enable_pgle
use_simplified_jaxpr_constants remove_size_one_mesh_axis_from_type threefry_gpu_kernel_lowering
"""
RECORDED: dict[str, Any] = {  # the others that can reach a bit, with JAX's own defaults
    **{f"jax_{name}": True for name in ON.split()},
    **{f"jax_{name}": False for name in OFF.split()},
    **{f"jax_{name}_effort": 0.0 for name in ("exec_time_optimization", "memory_fitting")},
    **{f"jax_error_checking_behavior_{name}": "ignore" for name in ("nan", "divide", "oob")},
    **{"jax_memory_fitting_level": "O2", "jax_optimization_level": "UNKNOWN", "jax_pjrt_client_create_options": None},
    **{"jax_embedded_constants_max_bytes": 32, "jax_random_seed_offset": 0, "jax_xla_profile_version": 0},
    "eager_constant_folding": False,
}
VARIABLES = (  # of the environment, which XLA, its libraries and NumPy read by themselves
    *("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "PJRT_NPROC", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES"),
)
LIBRARIES = ("flax", "jax", "jaxlib", "numpy", "optax", "scipy")


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Holds the settings of `PINNED` in this thread, whatever the environment or the caller has set."""
    with contextlib.ExitStack() as settings:
        for name, value in PINNED.items():
            settings.enter_context(getattr(jax, name)(value))
        yield


def fingerprint(tuning: Tuning, mesh: Mesh) -> str:
    """Settings, libraries and hardware as JSON; settings and variables only where they are not JAX's defaults.

    The number of devices is not part of it, because each of them runs the program of one.
    """
    device, values = mesh.devices.flat[0], jax.config.values
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # XLA's threads
    host = {"cpu": _processor(), "cpus": cpus} if device.platform == "cpu" or tuning.closed else {}
    changed = {name: str(values[name]) for name in RECORDED.keys() & values.keys() if values[name] != RECORDED[name]}
    return canonical_json(
        {
            "platform": device.platform,
            "device": device.device_kind,
            "runtime": device.client.platform_version,
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "lanes": tuning.lanes,
            "batch": tuning.batch,
            "dtype": str(compute_dtype(tuning.dtype, mesh)),
            "settings": changed | {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
            **host,
        }
    )


def _processor() -> str:
    """Model and instruction sets of the CPU, shortened to a digest: XLA compiles for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return digest(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))[:16]
