"""Adapters of language models: merged kernels give the same logits, and so does `peft` with the exported files."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import merged
from published import LLAMA, QWEN2, hub_folder, hugging_face_decoder, settings_of
from transcriptions import QUICKLY, relative_error

from lmeraser_jax.config import Backbone
from lmeraser_jax.models import convert, peft_files
from lmeraser_jax.models.backbone import graph, with_own
from lmeraser_jax.models.lora import LoraSpec
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.storage.checkpoints import flatten

TOKENS = np.random.default_rng(0).integers(0, LLAMA.vocabulary, (3, 18)).astype(np.int32)
SPECS = {"all layers": LoraSpec(2, 3.0), "the last layer": LoraSpec(2, 3.0, 1)}


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=QUICKLY)
def logits(config, params, tokens, spec=None):
    return nnx.merge(graph(config, spec)[0], params)(tokens)


def adapted(config, spec):
    """Frozen parameters and random adapters."""
    weights = Weights("weights", hugging_face_decoder(config), "", settings_of(config))
    rng = np.random.default_rng(1)
    shapes = graph(config, spec)[2]
    adapters = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
    return convert.freeze(weights, Backbone())[0].params, adapters


@pytest.mark.parametrize("name", ["the last layer", pytest.param("all layers", marks=pytest.mark.slow)])
def test_an_adapted_decoder_is_the_plain_one_with_merged_kernels(name):
    spec = SPECS[name]
    params, adapters = adapted(QWEN2, spec)
    ours = logits(QWEN2, with_own(params, adapters), TOKENS, spec)
    assert relative_error(ours, logits(QWEN2, merged(params, adapters, 1.5), TOKENS)) < 1e-5
    assert relative_error(ours, logits(QWEN2, params, TOKENS)) > 1e-2


def test_files_hold_every_adapter_once_and_transposed(tmp_path):
    from safetensors.numpy import load_file

    _, adapters = adapted(LLAMA, SPECS["the last layer"])
    peft_files.save(tmp_path / "out", SPECS["the last layer"], adapters, "base")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == len(flatten(adapters)) == 14
    place = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
    np.testing.assert_array_equal(stored[place], adapters["blocks"][1]["attention"]["k"]["lora_a"].T)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1] and config["r"] == 2 and config["lora_alpha"] == 3.0
    assert config["target_modules"] == sorted(f"{role}_proj" for role in "q k v o gate up down".split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # transformers about itself
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["Llama", "Qwen2"])
def test_peft_computes_the_same_logits(tmp_path, config, spec):
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = dataclasses.replace(config, epsilon=1e-6)
    base = hub_folder(tmp_path / "base", hugging_face_decoder(config), settings_of(config))
    params, adapters = adapted(config, spec)
    peft_files.save(tmp_path / "out", spec, adapters, str(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        plain = model(tokens).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out")(tokens).logits.numpy()
    with jax.default_matmul_precision("highest"):
        ours = logits(config, with_own(params, adapters), TOKENS, spec)
    assert relative_error(ours, theirs) < 1e-5 and relative_error(theirs, plain) > 1e-2
