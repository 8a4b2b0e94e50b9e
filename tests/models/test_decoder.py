"""Llama and Qwen2: the NumPy transcription, padding, the frozen prefix, generation with a cache, likelihoods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from published import LLAMA, QWEN2, hugging_face_decoder, settings_of
from transcriptions import QUICKLY, TOLERANCE, language_model, relative_error

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, decoder
from lmeraser_jax.models.lora import LoraSpec, init_adapters
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.training.tasks import row_losses

OTHER = dataclasses.replace(LLAMA, theta=9.0)
WIDE = dataclasses.replace(LLAMA, head_size=6, kv_heads=1, tied=True)
TOKENS = np.random.default_rng(0).integers(0, LLAMA.vocabulary, (3, 18)).astype(np.int32)


@functools.cache
def frozen(config: decoder.DecoderConfig = LLAMA) -> backbone_lib.Backbone:
    return convert.freeze(Weights("weights", hugging_face_decoder(config), "", settings_of(config)), Backbone())[0]


@functools.partial(jax.jit, static_argnames=("config", "method", "first"), compiler_options=QUICKLY)
def call(config, params, *arguments, method="__call__", **options):
    return getattr(nnx.merge(backbone_lib.graph(config)[0], params), method)(*arguments, **options)


def generated(backbone, prompts, lengths, new, temperature=0.0, stop=-1, key=0) -> np.ndarray:
    graph, temperature = backbone_lib.graph(backbone.config)[0], jnp.float32(temperature)
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths, jnp.int32)
    keys = jax.random.split(jax.random.key(key), len(prompts))
    return np.asarray(
        decoder.generate(graph, backbone.params, prompts, lengths, keys, temperature, jnp.int32(stop), new)
    )


@pytest.mark.parametrize("config", [LLAMA, QWEN2, OTHER, WIDE], ids=["untied", "biased, tied", "theta", "one kv head"])
def test_logits_match_the_transcription(config):
    ours = call(config, frozen(config).params, TOKENS)
    assert ours.dtype == jnp.float32
    for row, tokens in zip(ours, TOKENS):
        assert relative_error(row, language_model(hugging_face_decoder(config), config, tokens)) < TOLERANCE


def test_no_token_sees_what_comes_after_it_and_so_no_padding():
    params, other = frozen(QWEN2).params, TOKENS.copy()
    other[:, 6:] = (TOKENS[:, 6:] + 1) % QWEN2.vocabulary
    np.testing.assert_array_equal(call(QWEN2, params, TOKENS)[:, :6], call(QWEN2, params, other)[:, :6])
    lengths = np.array([6, 3, 1])
    features = call(QWEN2, params, TOKENS, lengths, method="features")
    np.testing.assert_array_equal(features, call(QWEN2, params, other, lengths, method="features"))
    alone = call(QWEN2, params, TOKENS[1:2, :3], np.array([3]), method="features")
    np.testing.assert_allclose(features[1:2], alone, rtol=1e-5, atol=1e-6)


def test_the_frozen_prefix_is_computed_once_bit_for_bit():
    params = frozen().params
    states = call(LLAMA, params, TOKENS, method="hidden_states")
    assert len(states) == 1 + LLAMA.depth
    for first, kept in enumerate(states):
        last = call(LLAMA, params, kept, method="forward", first=first)
        np.testing.assert_array_equal(call(LLAMA, params, last, method="logits"), call(LLAMA, params, TOKENS))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generation_with_a_cache_is_recomputation_token_by_token(temperature):
    """Rows of three lengths; the padding of the prompts is overwritten."""
    backbone, lengths, new = frozen(QWEN2), [10, 4, 1], 8
    ours = generated(backbone, TOKENS[:, :10], lengths, new, temperature)
    rows = np.zeros((3, 10 + new), np.int32)
    for row, length in enumerate(lengths):
        rows[row, :length] = TOKENS[row, :length]
    for step in range(new):
        ends = np.array(lengths) + step
        scores = call(QWEN2, backbone.params, rows)[np.arange(3), ends - 1]
        keys = jax.random.split(jax.random.key(0), 3)
        drawn = [jax.random.categorical(jax.random.fold_in(k, step), s / 1.5) for k, s in zip(keys, scores)]
        rows[np.arange(3), ends] = drawn if temperature else jnp.argmax(scores, axis=-1)
    expected = np.stack([rows[row, length : length + new] for row, length in enumerate(lengths)])
    np.testing.assert_array_equal(ours, expected)


def test_generation_stops_and_traces_once_for_each_shape():
    backbone = frozen(QWEN2)
    free = generated(backbone, TOKENS[:, :10], [10, 4, 1], 8)
    stop = int(free[0, 2])
    for row, tokens in zip(free, generated(backbone, TOKENS[:, :10], [10, 4, 1], 8, stop=stop)):
        end = list(row).index(stop) if stop in row else len(row)
        np.testing.assert_array_equal(tokens[:end], row[:end])
        assert (tokens[end:] == stop).all()
    traces = decoder.generate._cache_size()
    draws = [generated(backbone, TOKENS[:, :10], [2, 3, 9], 8, temperature=2.0, key=key) for key in (1, 1, 2)]
    assert decoder.generate._cache_size() == traces
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    with pytest.raises(UserError, match="10 tokens of a prompt and 23 new ones are more than the model's context 32"):
        generated(backbone, TOKENS[:, :10], [10, 4, 1], 23)


def test_the_likelihood_of_a_response():
    response = np.zeros(TOKENS.shape, bool)
    response[0, 6:9], response[1, 1:] = True, True  # none in the third
    logits = call(LLAMA, frozen().params, TOKENS)
    targets = np.where(response, TOKENS, -1)[:, 1:]
    ours = -row_losses(logits[:, :-1], targets) * (targets >= 0).sum(axis=1).astype(np.float32)
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    for row in range(3):
        places = np.flatnonzero(response[row])
        expected = sum(np.log(probabilities[row, place - 1, TOKENS[row, place]]) for place in places)
        assert ours[row] == pytest.approx(expected, rel=1e-5)


def test_an_adapter_starts_as_the_model_and_is_the_merged_kernel():
    """All seven dense layers of the last block have one; the first block is the frozen prefix of every adapter."""
    params, spec = frozen(QWEN2).params, LoraSpec(rank=2, alpha=6.0, layers=1)
    graph, _, shapes = backbone_lib.graph(QWEN2, spec)
    adapters = init_adapters(jax.random.key(0), shapes)
    assert list(adapters["blocks"]) == [1] and len(jax.tree.leaves(adapters)) == 14

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def logits(adapters):
        return nnx.merge(graph, backbone_lib.with_own(params, adapters))(TOKENS)

    np.testing.assert_allclose(logits(adapters), call(QWEN2, params, TOKENS), atol=1e-5)
    draws = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: jnp.asarray(0.3 * draws.normal(size=leaf.shape), jnp.float32), adapters)
    merged = flatten_dict(params)
    for path, leaf in flatten_dict(adapters).items():
        if path[-1] == "lora_a":
            kernel = (*path[:-1], "kernel")
            merged[kernel] = merged[kernel] + 3.0 * leaf @ flatten_dict(adapters)[*path[:-1], "lora_b"]
    assert relative_error(logits(adapters), call(QWEN2, unflatten_dict(merged), TOKENS)) < 1e-5
    assert relative_error(logits(adapters), call(QWEN2, params, TOKENS)) > 0.01


def test_bfloat16_computes_norms_and_scores_in_float32():
    backbone = frozen(QWEN2)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), backbone.params)
    ours = call(QWEN2, params, TOKENS)
    assert ours.dtype == jnp.float32
    assert relative_error(ours, call(QWEN2, backbone.params, TOKENS)) < 0.05
    assert call(QWEN2, params, TOKENS, method="hidden_states")[-1].dtype == jnp.bfloat16


def test_a_saved_decoder_is_the_same_and_its_digest_covers_its_settings(tmp_path):
    backbone = frozen()
    backbone_lib.save(tmp_path / "saved", backbone, {}, {"origin": "Llama or Qwen2", "published_size": 0})
    assert backbone_lib.load(tmp_path / "saved")[0].digest == backbone.digest
    assert convert.load(Backbone(weights=str(tmp_path / "saved")))[0].digest == backbone.digest
    changed = dataclasses.replace(LLAMA, theta=9.0)
    assert backbone_lib.make(changed, backbone.params, (), ()).digest != backbone.digest
