"""The two tasks of a slice as the tuning program sees them: image classification, and language modelling.

A task says what a step feeds, what the network answers, and what a row's loss is. All is static under `jit` but arrays.

Shapes: B rows, T tokens of a row, D feature, Y classes, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.text_rows import TextSpec, tokens_of
from lmeraser_jax.data.transforms import ImageSpec, augmented, centred
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Architecture, Params
from lmeraser_jax.models.lora import LoraSpec
from lmeraser_jax.training.slices import Slice, place_prompt


@dataclasses.dataclass(frozen=True)
class TuningSpec:
    """Everything static about a tuning program."""

    architecture: Architecture
    input_spec: ImageSpec | TextSpec
    tuning: Tuning
    classes: int
    seed: int
    mapping: tuple[int, ...] = ()  # the feature that is each class's logit; empty: heads are tuned
    start: bytes = b""  # float32 [n], what prompts begin with; empty: they begin fresh
    state_batch: int = 0  # rows of a call that computes states of the frozen blocks, where there are some

    @property
    def on_features(self) -> bool:
        """Whether slices are made of features that are computed once, not of images."""
        return self.tuning.closed or self.tuning.method == "head" and self.input_spec.augment == "none"

    @property
    def lora(self) -> LoraSpec | None:
        """The adapters of a slice; None where it has none."""
        tuning = self.tuning
        return LoraSpec(tuning.rank, tuning.alpha, tuning.lora_layers) if tuning.method == "lora" else None

    @property
    def own_parameters(self) -> Params | None:
        """Shapes of the backbone's parameters that every slice has of its own; None where all share the frozen ones.

        Raises `UserError` where the backbone has fewer blocks than are to have adapters.
        """
        _, params, adapters = backbone_lib.graph(self.architecture, self.lora)
        return {"backbone": params, "lora": adapters}.get(self.tuning.method)

    @property
    def prefix(self) -> int:
        """Frozen blocks of a language model below the first one with adapters; their states are computed once."""
        depth = getattr(self.architecture, "depth", 0)
        return depth - self.tuning.lora_layers if self.is_text and self.tuning.lora_layers else 0

    @property
    def is_text(self) -> bool:
        """Whether the task is language modelling."""
        return isinstance(self.input_spec, TextSpec)

    @property
    def image_spec(self) -> ImageSpec:
        """`input_spec` where the task is image classification."""
        assert isinstance(self.input_spec, ImageSpec)
        return self.input_spec

    @property
    def slots(self) -> int:
        """W: slices that one call can hand over per device. Few where each is as large as a backbone."""
        return max(16 if self.tuning.method != "backbone" else 1, 2 * self.tuning.lanes)


class TextRows(NamedTuple):
    """Rows of text on the device."""

    rows: Any  # int32 [B, 2 + T]
    states: Any = None  # [B, T, D] after the frozen blocks, in the compute dtype; None: not computed before


def step_inputs(tuning_spec: TuningSpec, rows: Any, key: jax.Array) -> Any:
    """What a step feeds: augmented and normalised images, features as they come, or text as it comes."""
    if tuning_spec.is_text or tuning_spec.on_features:
        return rows
    return augmented(rows, tuning_spec.image_spec, key)


def bare_features(architecture: Architecture, spec: ImageSpec | TextSpec, params: Params, rows: jax.Array) -> jax.Array:
    """Features float32 [B, D] of stored rows under the frozen backbone: of an image, or of a query (its mean state)."""
    if isinstance(spec, TextSpec):
        tokens, query, _ = tokens_of(rows)
        return backbone_lib.query_features(architecture, params, tokens, query)
    return backbone_lib.features(architecture, params, centred(rows, spec))


def features_of(slice_: Slice, tuning_spec: TuningSpec, params: Any, inputs: jax.Array) -> jax.Array:
    """Features float32 [B, D] of a batch as a slice sees it: with its prompt (Def. 1), adapters, or own backbone.

    `inputs` are normalised images, float32 [B, H, W, C], or [B, D] where `tuning_spec.on_features`; the dtype of
    `params` is the compute dtype.
    """
    if tuning_spec.on_features:
        return inputs
    architecture, width = tuning_spec.architecture, tuning_spec.tuning.active_prompt_width
    if slice_.backbone is not None:
        params = backbone_lib.with_own(params, slice_.backbone)
    if width:
        prompt = place_prompt(slice_.prompt, architecture.image_size, width, architecture.channels)  # [H, W, C]
        inputs = inputs + prompt[None]
    return backbone_lib.features(architecture, params, inputs, tuning_spec.lora)


def outputs_of(slice_: Slice, tuning_spec: TuningSpec, params: Params, inputs: Any) -> jax.Array:
    """Logits float32 of a batch with a slice: [B, Y], or those of the next token, [B, T - 1, V]."""
    if tuning_spec.is_text:
        lora = tuning_spec.lora if slice_.backbone is not None else None
        own = backbone_lib.with_own(params, slice_.backbone) if lora else params
        tokens, _, _ = tokens_of(inputs.rows)
        return backbone_lib.token_logits(
            tuning_spec.architecture, own, tokens, inputs.states, tuning_spec.prefix, lora
        )[:, :-1]
    return features_of(slice_, tuning_spec, params, inputs) @ slice_.kernel + slice_.bias[None]


def targets_of(tuning_spec: TuningSpec, inputs: Any, labels: Any) -> Any:
    """What the outputs are to say: labels int32 [B], or the next tokens int32 [B, T - 1], -1 outside the response."""
    if not tuning_spec.is_text:
        return labels
    tokens, query, count = tokens_of(inputs.rows)
    places = jnp.arange(1, tokens.shape[1])[None]
    return jnp.where((places >= query[:, None]) & (places < count[:, None]), tokens[:, 1:], -1)


def row_losses(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy float32 [B]; of text the mean over the tokens of the response and the end token after them."""
    if targets.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    valid = targets >= 0
    chosen = jnp.take_along_axis(outputs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(valid, jax.nn.logsumexp(outputs, axis=-1) - chosen, 0.0)  # [B, T - 1]
    return jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1).astype(losses.dtype)
