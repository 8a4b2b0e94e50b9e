"""The speed parts of the GPU suite: how much of the device the tuning programs use, and beside PyTorch.

Each part is a generator that yields figures as they come, {name: value}. Utilisation is the FLOPs of the matrix
products that the algorithm needs (forward, and backward to the slice), in a second, over those of one large bfloat16
product that is measured at the same time. FLOPs are counted in the traced program, before XLA changes it.
"""

import argparse
import contextlib
import dataclasses
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any
from unittest import mock

import gpu_checks
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gpu_settings import Settings
from reporting import timed
from workloads import Program

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import layers, vit, zoo
from lmeraser_jax.models.architectures import ImageArchitecture, ViTConfig
from lmeraser_jax.training import train_step

Figures = Iterator[dict[str, Any]]
PACKAGES = ("jax", "nvidia", "torch", "triton", "transformers", "peft")
CARD = 16e9  # bytes of memory of a small card
QUICK = ViTConfig(image_size=32, patch=16, width=32, depth=4, heads=2, mlp=64)


def on_gpu() -> bool:
    return jax.devices()[0].platform != "cpu"


def versions() -> dict[str, Any]:
    """The driver, the runtime, and the packages that a GPU's figures depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else ""
    packages = {package.name: package.version for package in metadata.distributions()}
    return {
        "driver": driver,
        "runtime": jax.devices()[0].client.platform_version,
        "packages": {name: version for name, version in sorted(packages.items()) if name.startswith(PACKAGES)},
    }


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of so many calls, after one that warms up."""
    run()
    return statistics.median(timed(run) for _ in range(rounds))


def product_flops_per_s(settings: Settings) -> float:
    """Of a bfloat16 product of two square matrices of random numbers, several in turn."""
    size, turns = (256, 2) if settings.quick else (8192, 20)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, turns, lambda _, x: (x @ b) * size**-0.5, a))
    return 2 * size**3 * turns / median_seconds(lambda: jax.block_until_ready(chain(a, b)), 5)


def speed(program: Program, settings: Settings, unit: str, per_row: int = 1) -> dict[str, float]:
    """Images or tokens per second of the program alone, and its utilisation."""
    rows = program.rows / median_seconds(program, 1 if settings.quick else 5)
    flops, peak = rows * program.flops_per_row(), product_flops_per_s(settings)
    return {f"{unit}_per_s": rows * per_row, "utilisation": flops / peak, "product_tflops": peak / 1e12}


def tuning(backbone: str, weights: str, settings: Settings) -> Figures:
    """Prompt and head at 224 px: the program alone, then a whole call beside the reference and the best PyTorch."""
    size, lanes, batch, steps = (64, 2, 2, 5) if settings.quick else (224, 4, 32, 20)
    config = dataclasses.replace(zoo.entry(backbone).architecture, image_size=size)
    if settings.quick:
        small = {"depth": 4} if isinstance(config, ViTConfig) else {"depths": (1, 1, 1, 1), "window": size // 32}
        config = dataclasses.replace(config, **small)
    yield {"program": speed(random_program(config, lanes, batch, steps), settings, "images")}
    import bench_tuning  # not above: what needs no PyTorch is measured without

    arguments = argparse.Namespace(
        backbone=backbone, size=size, lanes=lanes, batch=batch, steps=steps, weights=weights, quick=settings.quick
    )
    workload = bench_tuning.workload_of(arguments)
    yield bench_tuning.compared(workload, 1 if settings.quick else 3, compiled=not settings.quick)


def vit_b(settings: Settings) -> Figures:
    return tuning("vit-ti" if settings.quick else "vit-b-1k", settings.vit, settings)


def swin_b(settings: Settings) -> Figures:
    return tuning("swin-t" if settings.quick else "swin-b-22k", settings.swin, settings)


def language(settings: Settings) -> Figures:
    """Adapters of four blocks of SmolLM2-135M, beside peft."""
    import bench_language

    names = ("tinystories-656k", 2, 16) if settings.quick else ("smollm2-135m", 64, 256)
    sizes = dict(zip(("model", "batch", "tokens"), names, strict=True))
    problem = bench_language.problem_of(argparse.Namespace(**sizes, steps=bench_language.CHECKED))
    program = bench_language.program_of(problem)
    yield {"program": speed(program, settings, "tokens", sizes["tokens"])}
    yield bench_language.compared(problem, program, 1 if settings.quick else 5, compiled=not settings.quick)


def vit_program(settings: Settings, lanes: int, batch: int, blocks: int, steps: int = 10) -> Program:
    """Prompt and head on so many blocks of a random ViT-B/16 at 224 px."""
    config = QUICK if settings.quick else dataclasses.replace(zoo.entry("vit-b-1k").architecture, depth=blocks)
    return random_program(config, lanes, batch, 2 if settings.quick else steps)


def random_program(config: ImageArchitecture, lanes: int, batch: int, steps: int) -> Program:
    """Prompt and head on an architecture with random weights."""
    size = config.image_size
    width = max(1, round(size * 30 / 224))
    tuned = Tuning(optimizer="sgd", prompt_width=width, lanes=lanes, batch=batch, epochs=1, min_steps=1)
    spec = train_step.TuningSpec(config, ImageSpec(size, size, 3, size, size, 3), tuned, 10, seed=0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), backbone_lib.graph(config)[1]
    )
    images = rng.integers(0, 256, (lanes * batch, size, size, 3), np.uint8)
    return Program(spec, params, images, np.zeros(len(images), np.int32), steps)


def lanes(settings: Settings) -> Figures:
    """Lanes x batch on three blocks: images per second of each pair, as shares of the best."""
    pairs = [(1, 2), (2, 2)] if settings.quick else [(1, 32), (1, 128), (4, 16), (4, 32), (16, 8), (4, 128), (1, 512)]
    rates: dict[str, float] = {}
    for count, batch in pairs:
        program = vit_program(settings, count, batch, 3)
        rates[f"{count}x{batch}"] = program.rows / median_seconds(program, 3)
        yield {"of_best": {name: rate / max(rates.values()) for name, rate in rates.items()}}
    yield {"best": max(rates, key=rates.__getitem__)}


def memory(settings: Settings) -> Figures:
    """Bytes of the whole program with 4 lanes of 32, and how many images a step can have on a card of 16 GB."""
    count, batch = (2, 16) if settings.quick else (4, 32)
    for name, change in {"plain": contextlib.nullcontext(), "rematerialised": rematerialised()}.items():
        with change:
            program = vit_program(settings, count, batch, 12)
            used = program.memory()
        fixed, growing = used.argument_size_in_bytes + used.output_size_in_bytes, used.temp_size_in_bytes
        figures = {"peak_bytes": fixed + growing, "images_on_16_gb": int((CARD - fixed) / growing * count * batch)}
        yield {name: figures}
        yield {name: figures | {"images_per_s": program.rows / median_seconds(program, 3)}}


@contextlib.contextmanager
def rematerialised() -> Iterator[None]:
    """Programs traced here compute each block of a ViT again in the backward pass, but for the last one."""
    plain = vit.Block.__call__
    again = nnx.remat(plain)

    def call(self: vit.Block, x: jax.Array, queries: int | None = None) -> jax.Array:
        return again(self, x) if queries is None else plain(self, x, queries)

    train_step.compiled.cache_clear()
    with mock.patch.object(vit.Block, "__call__", call):
        yield
    train_step.compiled.cache_clear()


def attention(settings: Settings) -> Figures:
    """Forward and backward of attention by itself, and images per second of three blocks with it."""
    batch = 2 if settings.quick else 128
    shapes = {"vit": (batch, 197, 12, 64), "swin": (batch * 4, 49, 16, 32)}
    for kind, (b, n, heads, width) in shapes.items():
        q, k, v = (jax.random.normal(jax.random.key(i), (b, n, heads, width), jnp.bfloat16) for i in range(3))
        bias = None if kind == "vit" else jnp.zeros((1, heads, n, n), jnp.bfloat16)
        for name, function in implementations().items():
            yield {f"{kind} {name}": attempted(lambda f=function, a=(q, k, v), c=bias: microseconds(f, a, c))}
    for name, function in implementations().items():
        yield {f"images_per_s with {name}": attempted(lambda f=function: with_attention(f, settings, batch))}


def implementations() -> dict[str, Callable[..., jax.Array]]:
    """What `layers.attention` could be."""

    def fused(kind: Any) -> Callable[..., jax.Array]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
            bias = None if bias is None else jnp.broadcast_to(bias, (len(q), *bias.shape[-3:])).astype(q.dtype)
            return jax.nn.dot_product_attention(q, k, v, bias, implementation=kind).reshape(*q.shape[:2], -1)

        return attend

    return {"ours": layers.attention, "xla": fused("xla"), "cudnn": fused("cudnn")}


def attempted(measure: Callable[[], float]) -> float | str:
    """The figure, or why there is none: an implementation refuses devices, sizes and dtypes that it does not know."""
    try:
        return measure()
    except Exception as error:  # of several libraries
        return f"failed: {str(error).splitlines()[0][:120]}" if on_gpu() else "needs a GPU"


def microseconds(function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], bias: jax.Array | None) -> float:
    """Of the output and the gradients of queries, keys and values."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return function(q, k, v, bias).astype(jnp.float32).sum()

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return 1e6 * median_seconds(lambda: jax.block_until_ready(program(*arrays)), 10)


def with_attention(function: Callable[..., jax.Array], settings: Settings, batch: int) -> float:
    """Images per second of three blocks of the ViT."""
    train_step.compiled.cache_clear()
    with mock.patch.object(layers, "attention", function), mock.patch.object(vit, "attention", function):
        program = vit_program(settings, 1, batch, 3)
        program()  # compiles
    train_step.compiled.cache_clear()
    return program.rows / median_seconds(program, 3)


PARTS: dict[str, Callable[[Settings], Figures]] = {
    "exactness": gpu_checks.exactness,
    "determinism": gpu_checks.determinism,
    "vit": vit_b,
    "request": gpu_checks.request,
    "swin": swin_b,
    "language": language,
    "memory": memory,
    "lanes": lanes,
    "attention": attention,
    "adaptation": gpu_checks.adaptation,
}
