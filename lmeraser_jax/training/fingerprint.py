"""What the bits of a slice depend on beside its recipe: program, libraries, hardware."""

import os
import platform
from pathlib import Path

import jax
import jaxlib.version
from jax.sharding import Mesh

from lmeraser_jax.config import Tuning
from lmeraser_jax.hashing import canonical_json, digest
from lmeraser_jax.training.features import compute_dtype


def fingerprint(tuning: Tuning, mesh: Mesh) -> str:
    """Program, libraries and hardware as JSON.

    The number of devices is not part of it, only whether the program is partitioned at all: XLA compiles a one-device
    program with other fusions than one for many devices.
    """
    device = mesh.devices.flat[0]
    host = {"cpu": _processor(), "cpus": os.cpu_count()} if device.platform == "cpu" else {}
    return canonical_json(
        {
            "platform": device.platform,
            "device": device.device_kind,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "lanes": tuning.lanes,
            "batch": tuning.batch,
            "dtype": str(compute_dtype(tuning.dtype, mesh)),
            "partitioned": mesh.size > 1,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
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
