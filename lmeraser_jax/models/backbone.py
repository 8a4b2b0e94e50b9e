"""A frozen backbone: architecture, parameters, normalisation and digest; one pure `features`.

The NNX module is split once into a static graph and a tree of arrays; everything downstream sees only the pure
function, so no optimizer and no gradient ever meets the backbone's parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lmeraser_jax import interrupt
from lmeraser_jax.errors import Damaged, raise_all, shorten
from lmeraser_jax.hashing import arrays_digest, digest
from lmeraser_jax.models.architectures import Architecture, DecoderConfig, ViTConfig, architecture_from, describe
from lmeraser_jax.models.decoder import Decoder
from lmeraser_jax.models.lora import LoraSpec, adapt
from lmeraser_jax.models.swin import Swin
from lmeraser_jax.models.vit import ViT
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints

Params = Any  # nested dict of arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """What the private side knows of the public one."""

    config: Architecture  # without the public classifier
    params: Params  # float32 on the host
    mean: tuple[float, ...]  # of pixels in [0, 1]; one number, or one for each channel
    std: tuple[float, ...]  # likewise
    digest: str  # SHA-256 over architecture, normalisation and parameters


def build(config: Architecture, rngs: nnx.Rngs) -> ViT | Swin | Decoder:
    """The module with random parameters."""
    if isinstance(config, DecoderConfig):
        return Decoder(config, rngs)
    return ViT(config, rngs) if isinstance(config, ViTConfig) else Swin(config, rngs)


def graph(config: Architecture, lora: LoraSpec | None = None) -> tuple[Any, Params, Params]:
    """Static graph of an architecture, abstract parameters (shapes only), and those of its adapters, if it has any."""
    return _graph(config, lora)


class _OneKey(nnx.Rngs):
    """Keys for parameters of which only shapes are wanted: counting them takes two thirds of the time of a trace."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


@functools.lru_cache(maxsize=16)  # not of `graph`: a default that is left out would be another key
def _graph(config: Architecture, lora: LoraSpec | None) -> tuple[Any, Params, Params]:

    def model() -> ViT | Swin | Decoder:
        plain = build(config, _OneKey(0))
        return adapt(plain, lora) if lora else plain

    graphdef, adapters, params = nnx.split(nnx.eval_shape(model), nnx.LoRAParam, nnx.Param)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(adapters)


def with_own(params: Params, own: Params) -> Params:
    """The frozen parameters with those of a slice's own in their places or, if they are adapters, beside them.

    All have the dtype of the frozen ones then.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    own = jax.tree.map(lambda leaf: leaf.astype(dtype), own)
    return unflatten_dict(flatten_dict(params) | flatten_dict(own))


def features(config: Architecture, params: Params, images: jax.Array, lora: LoraSpec | None = None) -> jax.Array:
    """Features of normalised images, [B, H, W, C] -> [B, D] float32, computed in the dtype of `params`.

    With `lora`, adapters are among `params`.
    """
    model = nnx.merge(graph(config, lora)[0], params)
    return model.features(images.astype(jax.tree.leaves(params)[0].dtype)).astype(jnp.float32)


def query_features(config: Architecture, params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Mean normalised state of queries, the first `lengths` [B] tokens of rows [B, T]: float32 [B, D]."""
    return nnx.merge(graph(config)[0], params).features(tokens, jnp.maximum(lengths, 1))


def token_states(config: Architecture, params: Params, tokens: jax.Array, last: int) -> jax.Array:
    """States [B, T, D] of tokens [B, T] before block `last`, in the dtype of `params`."""
    model = nnx.merge(graph(config)[0], params)
    return model.forward(model.embed(tokens), 0, last)


def token_logits(
    config: Architecture, params: Params, tokens: jax.Array, states: jax.Array | None, first: int, lora: LoraSpec | None
) -> jax.Array:
    """Logits of the next token at all places, [B, T] -> float32 [B, T, V]; with `lora`, adapters are among `params`.

    `states` are those before block `first` (`token_states`), if they are known.
    """
    model = nnx.merge(graph(config, lora)[0], params)
    if states is None:
        states, first = model.embed(tokens), 0
    return model.logits(model.forward(states, first))


def features_of_all(
    program: Callable[[np.ndarray], jax.Array], images: np.ndarray, size: int, width: int, title: str
) -> np.ndarray:
    """Features of any number of stored rows, such as images uint8 [N, h, w, c] -> float32 [N, D], at one fixed shape.

    `program` maps `size` rows to as many features of `width` numbers; short batches are padded, so a feature has the
    same bits whatever stands beside it. `title` names the progress line. Raises `Stopped`.
    """
    features = np.zeros((len(images), width), np.float32)
    with progress(title, len(images)) as shown:
        for start in range(0, len(images), size):
            interrupt.raise_if_stopped()
            piece = images[start : start + size]
            padded = np.zeros((size, *images.shape[1:]), images.dtype)
            padded[: len(piece)] = piece
            features[start : start + size] = np.asarray(program(padded))[: len(piece)]
            shown.advance(len(piece))
    return features


def features_and_logits(config: Architecture, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features [B, D] and, from them, logits [B, classes] of the public classifier, both float32, for training it."""
    model = nnx.merge(graph(config)[0], params)
    features = model.features(images)
    return features, model.head(features)


def make(config: Architecture, params: Params, mean: tuple[float, ...], std: tuple[float, ...]) -> Backbone:
    """Freezes parameters into a backbone; a public classifier among them is dropped."""
    config = config if isinstance(config, DecoderConfig) else dataclasses.replace(config, classes=0)
    params = {name: leaf for name, leaf in params.items() if name != "head"}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    name = digest([describe(config), mean, std, arrays_digest(checkpoints.flatten(params))])
    return Backbone(config, params, mean, std, name)


def array_problems(like: Params, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Every array that is missing, left over or of another shape than in a tree such as `graph` gives, by flat name."""
    shapes = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    expected = {name: leaf.shape for name, leaf in checkpoints.flatten(shapes).items()}
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in arrays]
    problems += [f"not used: {name} {list(arrays[name].shape)}" for name in arrays if name not in expected]
    for name, shape in expected.items():
        if name in arrays and arrays[name].shape != shape:
            problems.append(f"{name}: the file has {list(arrays[name].shape)}, the model needs {list(shape)}")
    return problems


def from_flat(like: Params, arrays: Mapping[str, np.ndarray], name: str) -> Params:
    """Nested parameters from flat ones, in the form of a tree such as `graph` gives; `name` is the file's.

    Raises `UserError` with all mismatches at once.
    """
    raise_all(array_problems(like, arrays), f"the weights {name} do not fit the backbone:")
    return checkpoints.unflatten(arrays, like)


def save(folder: Path, backbone: Backbone, inputs: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Writes a backbone into a folder of its own, with the settings and the files that it was made from."""
    metadata = {
        "config": describe(backbone.config),
        "mean": backbone.mean,
        "std": backbone.std,
        "digest": backbone.digest,
        "inputs": inputs,
        "provenance": provenance,
    }
    checkpoints.save(folder, checkpoints.flatten(backbone.params), metadata)


def load(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    """Reads a saved backbone and the settings it was made with. Raises as `checkpoints.load` does."""
    arrays, metadata, _ = checkpoints.load(folder)
    return restore(folder, arrays, metadata), metadata["inputs"]


def restore(folder: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> Backbone:
    """The backbone of a folder's arrays and metadata. Raises `Damaged` where they have not the recorded digest.

    They are compared before anything is built: what a library raises over contents that `save` wrote is no damage.
    """
    try:
        computed = digest([metadata["config"], metadata["mean"], metadata["std"], arrays_digest(arrays)])
        recorded = metadata["digest"]
        if computed != recorded:
            raise ValueError(f"its contents have the digest {computed[:12]}, recorded is {str(recorded)[:12]}")
        if not isinstance(metadata["inputs"], dict) or not isinstance(metadata["provenance"], dict):
            raise TypeError("inputs and provenance must be JSON objects")
    except (ValueError, TypeError, LookupError) as error:
        raise Damaged(
            f"{folder} is damaged: {type(error).__name__}: {shorten(str(error), 500)};"
            " restore the folder, or delete it and make it again"
        ) from error
    config = architecture_from(metadata["config"])
    params = from_flat(graph(config)[1], arrays, str(folder))
    return make(config, params, tuple(metadata["mean"]), tuple(metadata["std"]))
