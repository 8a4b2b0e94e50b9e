"""What is wrong with the arrays of a slice's checkpoint. Loads no JAX: receipts are checked with it."""

from collections.abc import Mapping

import numpy as np

from lmeraser_jax.errors import shorten

OWN = "backbone/"  # begins the names of those parameters of the backbone that are the slice's own
SHAPES = {"prompt": 1, "kernel": 2, "bias": 1}  # dimensions of the others


def array_problems(arrays: Mapping[str, np.ndarray], has_own: bool) -> list[str]:
    """Every array that is missing, left over or of another dtype or shape than readers take, a line each.

    Which parameters of the backbone a slice has of its own, the architecture says; here only their dtype is looked at.
    """
    problems = [f"{name} is missing" for name in SHAPES if name not in arrays]
    for name, leaf in arrays.items():
        if name not in SHAPES and not (has_own and name.startswith(OWN)):
            problems.append(f"{shorten(name)} is no part of a slice")
        elif leaf.dtype != np.float32 or leaf.ndim != SHAPES.get(name, leaf.ndim):
            dimensions = f" of {SHAPES[name]} dimensions" if name in SHAPES else ""
            problems.append(f"{name} must be float32{dimensions}, is {leaf.dtype} {list(leaf.shape)}")
    if not problems and arrays["kernel"].shape[1:] != arrays["bias"].shape:
        kernel, bias = list(arrays["kernel"].shape), list(arrays["bias"].shape)
        problems.append(f"kernel {kernel} and bias {bias} have different numbers of classes")
    return problems
