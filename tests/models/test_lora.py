"""Low-rank adapters: the first values change nothing, and an adapted layer is the one whose kernel is W + s A B."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import merged
from published import REGISTERS, SWIN, VIT
from transcriptions import QUICKLY, pictures, relative_error

from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import graph, with_own
from lmeraser_jax.models.lora import LoraSpec, init_adapters
from lmeraser_jax.storage.checkpoints import flatten

SMALL_SWIN = dataclasses.replace(SWIN, image_size=16, depths=(1, 2), heads=(2, 4))
NETWORKS = {  # the network, its last blocks, those below
    "ViT": (VIT, ["blocks/1"], ["blocks/0"]),
    "DINOv2": (REGISTERS, ["blocks/1"], ["blocks/0"]),
    "Swin": (SMALL_SWIN, ["stages/1/blocks/0", "stages/1/blocks/1"], ["stages/0/blocks/0"]),
}
LAYERS = ("attention/qkv", "attention/out", "mlp/fc1", "mlp/fc2")
SPEC = LoraSpec(rank=2, alpha=3.0)


def random_like(shapes, seed, scale=0.2):
    """Normal numbers in the form of a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=QUICKLY)
def features(config, params, images, spec=None):
    return backbone_lib.features(config, params, images, spec)


@pytest.mark.parametrize("name", ["ViT", "Swin", pytest.param("DINOv2", marks=pytest.mark.slow)])
def test_an_adapted_network_is_the_plain_one_with_merged_kernels(name):
    """All blocks, or the last ones; adapters as they begin change no bit."""
    config, last, below = NETWORKS[name]
    params, images = random_like(graph(config)[1], 0), pictures(2, config.image_size)
    plain = features(config, params, images)
    for spec, prefixes in ((SPEC, {*last, *below}), (dataclasses.replace(SPEC, layers=len(last)), set(last))):
        shapes = graph(config, spec)[2]
        names = {f"{prefix}/{layer}/{leaf}" for prefix in prefixes for layer in LAYERS for leaf in ("lora_a", "lora_b")}
        assert flatten(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)).keys() == names
        adapters = random_like(shapes, 1)
        adapted = features(config, with_own(params, adapters), images, spec)
        assert relative_error(adapted, features(config, merged(params, adapters, 1.5), images)) < 1e-5
        assert relative_error(adapted, plain) > 1e-2
        first = with_own(params, init_adapters(jax.random.key(0), shapes))
        np.testing.assert_array_equal(features(config, first, images, spec), plain)


def test_first_values_depend_on_the_key_and_the_layer_alone():
    shapes, last = graph(VIT, SPEC)[2], graph(VIT, LoraSpec(2, 3.0, 1))[2]
    a, same, other = (flatten(init_adapters(jax.random.key(seed), shapes)) for seed in (0, 0, 1))
    few = flatten(init_adapters(jax.random.key(0), last))
    bits = set()
    for name, leaf in a.items():
        assert np.array_equal(leaf, same[name]) and np.array_equal(leaf, few.get(name, leaf))
        if name.endswith("lora_b"):
            assert not leaf.any()
            continue
        limit = leaf.shape[0] ** -0.5
        assert (
            (other[name] != leaf).all() and 0.7 * limit < np.abs(leaf).max() <= limit and abs(leaf.mean()) < limit / 2
        )
        bits.add(leaf[:2].tobytes())
    assert len(few) == 8 and len(bits) == len(a) / 2, "no two layers begin alike"


def test_the_backward_pass_ends_at_the_first_adapter():
    """The gradient of adapters in the last block has as many products, whatever number of blocks lies below."""
    spec, products = LoraSpec(2, 3.0, 1), {}
    for depth in (1, 2):
        config = dataclasses.replace(VIT, depth=depth)
        params, images = random_like(graph(config)[1], 0), jnp.asarray(pictures(2, VIT.image_size))

        def loss(adapters, config=config, params=params, images=images):
            return backbone_lib.features(config, with_own(params, adapters), images, spec).sum()

        forward, both = (
            str(jax.make_jaxpr(f)(graph(config, spec)[2])).count("dot_general") for f in (loss, jax.grad(loss))
        )
        products[depth] = forward, both - forward
    assert products[2][0] > products[1][0] and products[2][1] == products[1][1] > 0


def test_more_layers_and_ranks_than_the_network_has_are_refused():
    with pytest.raises(UserError, match="--config.tuning.lora_layers=3: the backbone has 2 blocks; 0: all"):
        graph(VIT, LoraSpec(2, 3.0, 3))
    with pytest.raises(UserError, match=f"--config.tuning.rank=1000: must be at most {VIT.width}, the width"):
        graph(VIT, LoraSpec(1000, 3.0))
