"""Blocks unrolled, as they are, against blocks stacked and scanned over depth: compile and run time.

  python benchmarks/bench_depth.py [--model=vit|swin] [--size=64] [--images=8] [--rounds=3] [--json=FILE]

Runs a few steps of the gradient with respect to the image, the shape of tuning, on random weights of ViT-Tiny/16 or
Swin-S. CPU seconds, so that a busy machine matters less; median of interleaved rounds.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from reporting import add_json, deliver

from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import zoo
from lmeraser_jax.models.layers import patches
from lmeraser_jax.models.swin import Block as SwinBlock
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import Block, ViT, ViTConfig

STEPS = 2


def graph_of(kind: Callable[..., nnx.Module], *sizes: Any) -> Any:
    return nnx.split(nnx.eval_shape(lambda: kind(*sizes, nnx.Rngs(0))), nnx.Param)[0]


def stack(blocks: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def scanned_vit(config: ViTConfig, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Tokens after the last block; `params["blocks"]` is one stacked block."""
    shallow = graph_of(ViT, dataclasses.replace(config, depth=0))
    block = graph_of(Block, config)

    def step(x, leaves):
        return nnx.merge(block, leaves)(x), None

    tokens = nnx.merge(shallow, params | {"blocks": {}}).hidden_states(images)[0]
    return jax.lax.scan(step, tokens, params["blocks"])[0]


def scanned_swin(config: SwinConfig, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Grid after the last stage; `params["pairs"]` are the stages' blocks, stacked as pairs (plain, shifted)."""
    whole = nnx.merge(backbone_lib.graph(config)[0], params["whole"])
    x = whole.embed_norm(whole.embed(patches(images, config.patch)))
    for index, pairs in enumerate(params["pairs"]):
        sizes = (config, config.width * 2**index, config.heads[index])
        plain, shifted = (graph_of(SwinBlock, *sizes, odd) for odd in (False, True))

        def step(x, leaves, plain=plain, shifted=shifted):
            return nnx.merge(shifted, leaves[1])(nnx.merge(plain, leaves[0])(x)), None

        x = jax.lax.scan(step, x, pairs)[0]
        if index + 1 < len(config.depths):
            x = whole.stages[index].merging(x)
    return x


def measured(tokens: Callable[..., jax.Array], params: Any, images: jax.Array) -> dict[str, float]:
    """CPU seconds to compile and to run the steps."""

    def steps(prompt, params, images):
        def body(_, prompt):
            return prompt - 1e-3 * jax.grad(lambda p: jnp.sum(tokens(params, images + p[None]) ** 2))(prompt)

        return jax.lax.fori_loop(0, STEPS, body, prompt)

    prompt = jnp.zeros(images.shape[1:])
    lowered = jax.jit(steps).lower(prompt, params, images)
    start = time.process_time()
    program = lowered.compile()
    compile_seconds = time.process_time() - start
    program(prompt, params, images).block_until_ready()
    start = time.process_time()
    program(prompt, params, images).block_until_ready()
    return {"compile": compile_seconds, "run": time.process_time() - start}


def forms(model: str, size: int) -> dict[str, tuple[Callable[..., jax.Array], Any]]:
    """{form: (tokens of params and images, params)}."""
    published = zoo.entry({"vit": "vit-ti", "swin": "swin-s"}[model]).architecture
    config = dataclasses.replace(published, image_size=size)
    graph, shapes = backbone_lib.graph(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)

    def unrolled(params, images):
        return nnx.merge(graph, params).hidden_states(images)[-1]

    if isinstance(config, ViTConfig):
        stacked = params | {"blocks": stack([params["blocks"][i] for i in range(config.depth)])}
        return {"unrolled": (unrolled, params), "scanned": (functools.partial(scanned_vit, config), stacked)}
    pairs = []
    for index, depth in enumerate(config.depths):
        blocks = params["stages"][index]["blocks"]
        pairs.append([stack([blocks[i] for i in range(odd, depth, 2)]) for odd in (0, 1)])
    stacked = {"pairs": pairs, "whole": params}
    return {"unrolled": (unrolled, params), "scanned": (functools.partial(scanned_swin, config), stacked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["vit", "swin"], default="vit")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    add_json(parser)
    flags = parser.parse_args()
    images = jnp.asarray(
        np.random.default_rng(1).standard_normal((flags.images, flags.size, flags.size, 3), np.float32)
    )
    chosen = forms(flags.model, flags.size)
    outputs = [np.asarray(jax.jit(tokens)(params, images)) for tokens, params in chosen.values()]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3 * np.abs(outputs[0]).max())
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(flags.rounds):
        for name, (tokens, params) in chosen.items():
            jax.clear_caches()
            rounds[name].append(measured(tokens, jax.device_put(params), images))
    result = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }
    values = {**vars(flags), "device": jax.devices()[0].device_kind, "jax": jax.__version__, "cpu_seconds": result}
    deliver(values, flags.json)


if __name__ == "__main__":
    main()
