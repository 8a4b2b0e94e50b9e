"""Llama and Qwen2: the NumPy transcription, padding, the frozen prefix, generation with a cache, likelihoods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import LLAMA, QWEN2, hugging_face_decoder, settings_of
from transcriptions import QUICKLY, TOLERANCE, language_model, relative_error

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, decoder
from lmeraser_jax.models.weight_files import Weights

OTHER = dataclasses.replace(LLAMA, theta=9.0)
WIDE = dataclasses.replace(LLAMA, head_size=6, kv_heads=1, tied=True)
TOKENS = np.random.default_rng(0).integers(0, LLAMA.vocabulary, (3, 10)).astype(np.int32)


def frozen(config: decoder.DecoderConfig = LLAMA) -> backbone_lib.Backbone:
    return convert.freeze(Weights("weights", hugging_face_decoder(config), "", settings_of(config)), Backbone())[0]


def compiled(config: decoder.DecoderConfig, method):
    """A jitted `method(model, *arguments)` as a function of (params, *arguments)."""
    graph = backbone_lib.graph(config)[0]
    return jax.jit(lambda params, *arguments: method(nnx.merge(graph, params), *arguments), compiler_options=QUICKLY)


def generated(backbone, prompts, lengths, new, temperature=0.0, stop=-1, key=0) -> np.ndarray:
    graph, temperature = backbone_lib.graph(backbone.config)[0], jnp.float32(temperature)
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths, jnp.int32)
    return np.asarray(
        decoder.generate(
            graph, backbone.params, prompts, lengths, jax.random.key(key), temperature, jnp.int32(stop), new
        )
    )


@pytest.mark.parametrize("config", [LLAMA, QWEN2, OTHER, WIDE], ids=["untied", "biased, tied", "theta", "one kv head"])
def test_logits_match_the_transcription(config):
    ours = compiled(config, lambda model, tokens: model(tokens))(frozen(config).params, TOKENS)
    assert ours.dtype == jnp.float32
    for row, tokens in zip(ours, TOKENS):
        assert relative_error(row, language_model(hugging_face_decoder(config), config, tokens)) < TOLERANCE


def test_no_token_sees_what_comes_after_it_and_so_no_padding():
    backbone, other = frozen(QWEN2), TOKENS.copy()
    other[:, 6:] = (TOKENS[:, 6:] + 1) % QWEN2.vocabulary
    logits = compiled(QWEN2, lambda model, tokens: model(tokens))
    np.testing.assert_array_equal(logits(backbone.params, TOKENS)[:, :6], logits(backbone.params, other)[:, :6])
    feature = compiled(QWEN2, lambda model, tokens, lengths: model.features(tokens, lengths))
    lengths = np.array([6, 3, 1])
    np.testing.assert_array_equal(feature(backbone.params, TOKENS, lengths), feature(backbone.params, other, lengths))
    alone = feature(backbone.params, TOKENS[1:2, :3], np.array([3]))
    np.testing.assert_allclose(feature(backbone.params, other, lengths)[1:2], alone, rtol=1e-5, atol=1e-6)


def test_the_frozen_prefix_is_computed_once_bit_for_bit():
    backbone = frozen()
    whole = compiled(LLAMA, lambda model, tokens: model(tokens))(backbone.params, TOKENS)
    states = compiled(LLAMA, lambda model, tokens: model.hidden_states(tokens))(backbone.params, TOKENS)
    assert len(states) == 1 + LLAMA.depth
    for first, kept in enumerate(states):
        rest = compiled(LLAMA, lambda model, x, first=first: model.logits(model.forward(x, first)))
        np.testing.assert_array_equal(rest(backbone.params, kept), whole)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generation_with_a_cache_is_recomputation_token_by_token(temperature):
    """Rows of three lengths; the padding of the prompts is overwritten."""
    backbone, lengths, new = frozen(QWEN2), [10, 4, 1], 8
    ours = generated(backbone, TOKENS, lengths, new, temperature)
    logits = compiled(QWEN2, lambda model, tokens: model(tokens))
    rows = np.zeros((3, 10 + new), np.int32)
    for row, length in enumerate(lengths):
        rows[row, :length] = TOKENS[row, :length]
    for step in range(new):
        ends = np.array(lengths) + step
        scores = logits(backbone.params, rows)[np.arange(3), ends - 1]
        drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(0), step), scores / 1.5)
        rows[np.arange(3), ends] = drawn if temperature else jnp.argmax(scores, axis=-1)
    expected = np.stack([rows[row, length : length + new] for row, length in enumerate(lengths)])
    np.testing.assert_array_equal(ours, expected)


def test_generation_stops_and_traces_once_for_each_shape():
    backbone = frozen(QWEN2)
    free = generated(backbone, TOKENS, [10, 4, 1], 8)
    stop = int(free[0, 2])
    for row, tokens in zip(free, generated(backbone, TOKENS, [10, 4, 1], 8, stop=stop)):
        end = list(row).index(stop) if stop in row else len(row)
        np.testing.assert_array_equal(tokens[:end], row[:end])
        assert (tokens[end:] == stop).all()
    traces = decoder.generate._cache_size()
    draws = [generated(backbone, TOKENS, [2, 3, 9], 8, temperature=2.0, key=key) for key in (1, 1, 2)]
    assert decoder.generate._cache_size() == traces
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    with pytest.raises(UserError, match="10 tokens of a prompt and 23 new ones are more than the model's context 32"):
        generated(backbone, TOKENS, [10, 4, 1], 23)


def test_the_likelihood_of_a_response():
    backbone, response = frozen(), np.zeros((3, 10), bool)
    response[0, 6:9], response[1, 1:] = True, True  # none in the third
    logits = compiled(LLAMA, lambda model, tokens: model(tokens))(backbone.params, TOKENS)
    ours = decoder.log_likelihood(logits, TOKENS, response)
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    for row in range(3):
        places = np.flatnonzero(response[row])
        expected = sum(np.log(probabilities[row, place - 1, TOKENS[row, place]]) for place in places)
        assert ours[row] == pytest.approx(expected, rel=1e-5)


def test_bfloat16_computes_norms_and_scores_in_float32():
    backbone = frozen(QWEN2)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), backbone.params)
    logits = compiled(QWEN2, lambda model, tokens: model(tokens))
    ours = logits(params, TOKENS)
    assert ours.dtype == jnp.float32
    assert relative_error(ours, logits(backbone.params, TOKENS)) < 0.05
    states = compiled(QWEN2, lambda model, tokens: model.forward(model.embed(tokens)))(params, TOKENS)
    assert states.dtype == jnp.bfloat16


def test_a_saved_decoder_is_the_same_and_its_digest_covers_its_settings(tmp_path):
    backbone = frozen()
    backbone_lib.save(tmp_path / "saved", backbone, {}, {"origin": "Llama or Qwen2", "published_size": 0})
    assert backbone_lib.load(tmp_path / "saved")[0].digest == backbone.digest
    assert convert.load(Backbone(weights=str(tmp_path / "saved")))[0].digest == backbone.digest
    changed = dataclasses.replace(LLAMA, theta=9.0)
    assert backbone_lib.make(changed, backbone.params, (), ()).digest != backbone.digest
