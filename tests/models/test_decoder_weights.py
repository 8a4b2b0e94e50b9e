"""Weights of language models: settings that are refused by name, tied matrices, shards, GGUF, tokenizers."""

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from commands import call, refused
from published import LLAMA, QWEN2, hub_folder, hugging_face_decoder, settings_of

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import convert, tokenizers
from lmeraser_jax.models.backbone import Backbone as Frozen
from lmeraser_jax.models.gguf_files import halves_first

TIED = dataclasses.replace(LLAMA, tied=True)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def load(folder: Path, **chosen) -> Frozen:
    return convert.load(Backbone(weights=str(folder), **chosen), note=False)[0]


def refusal(folder: Path, image_size: int = 0, **chosen) -> str:
    with pytest.raises(UserError) as caught:
        convert.load(Backbone(weights=str(folder), **chosen), image_size)
    return str(caught.value)


def with_settings(tmp_path: Path, config=LLAMA, **changes) -> Path:
    """A folder whose config.json has other settings; None removes one."""
    values = {key: value for key, value in (settings_of(config) | changes).items() if value is not None}
    return hub_folder(tmp_path / "weights", hugging_face_decoder(config), values)


def test_everything_that_is_not_supported_is_refused_at_once_by_name(tmp_path):
    changes = {"rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_act": "gelu", "attention_bias": True}
    changes |= {"mlp_bias": True, "sliding_window": 64, "rms_norm_eps": 0, "head_dim": None, "hidden_size": "16"}
    changes |= {"layer_types": ["full_attention", "sliding_attention"], "vocab_size": None}
    changes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}}
    lines = refusal(with_settings(tmp_path, **changes)).splitlines()
    assert "cannot be used, because of what its config.json or its metadata say:" in lines[0]
    assert sorted(lines[1:]) == [
        "- attention_bias=True; known: false",
        '- hidden_act=gelu; known: "silu", "swish"',
        "- hidden_size=16; must be a whole number above 0",
        '- layer_types=sliding_attention; known: "full_attention"',
        "- mlp_bias=True; known: false",
        "- partial_rotary_factor=0.5; known: 1",
        "- rms_norm_eps=0; must be a number above 0",
        "- rope_theta is 50.0 and 7.0",
        "- sliding_window=64 is not supported",
        '- type=linear; known: "default"',
        "- vocab_size is missing",
    ]


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (LLAMA, {"model_type": "mistral"}, 'model_type=mistral; known: "llama", "qwen2"'),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window=True; known: false"),
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        (LLAMA, {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None}, "gives no even head_dim"),
        (LLAMA, {"num_hidden_layers": 3}, "missing: blocks/2/attention/q/kernel [16, 16]"),
        (LLAMA, {"model_type": "qwen2"}, "missing: blocks/0/attention/k/bias [8]"),
        (QWEN2, {"model_type": "llama"}, "not used: blocks/0/attention/k/bias [8]"),
        (QWEN2, {"tie_word_embeddings": None}, "missing: output [40, 16]"),
        (LLAMA, {"tie_word_embeddings": True}, "but lm_head.weight is not model.embed_tokens.weight"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}; known: none"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(tmp_path, config, changes, expected):
    assert expected in refusal(with_settings(tmp_path, config, **changes))


def test_settings_in_other_places_and_by_default(tmp_path, capsys):
    rotary = {"rope_theta": None, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}
    folder = with_settings(tmp_path, **rotary, head_dim=None, rms_norm_eps=None, sliding_window=None, new_key=1)
    backbone, provenance = convert.load(Backbone(weights=str(folder)))
    assert backbone.config == dataclasses.replace(LLAMA, epsilon=1e-6)
    assert "rms_norm_eps=1e-06" in provenance.notes[0] and provenance.notes[1].endswith("not known here: new_key")
    assert "assumed, as config.json does not say it" in capsys.readouterr().err
    (folder / "config.json").unlink()
    assert "config.json is missing beside it" in refusal(folder)


def test_a_tied_matrix_has_either_name(tmp_path):
    arrays = hugging_face_decoder(TIED)
    renamed = {OUTPUT if name == EMBEDDING else name: array for name, array in arrays.items()}
    both = arrays | {OUTPUT: arrays[EMBEDDING]}
    folders = [hub_folder(tmp_path / str(i), a, settings_of(TIED)) for i, a in enumerate((arrays, renamed, both))]
    assert len({load(folder).digest for folder in folders}) == 1
    both[OUTPUT] = both[OUTPUT] + 1
    assert "but lm_head.weight is not" in refusal(hub_folder(tmp_path / "other", both, settings_of(TIED)))


def test_shards_and_a_missing_shard(tmp_path):
    whole = hub_folder(tmp_path / "whole", hugging_face_decoder(), settings_of(LLAMA))
    shards = hub_folder(tmp_path / "shards", hugging_face_decoder(), settings_of(LLAMA), shards=3)
    assert load(shards).digest == load(whole).digest
    (shards / "model-00002-of-00003.safetensors").unlink()
    message = refusal(shards)
    assert "model-00002-of-00003.safetensors is missing; model.safetensors.index.json names it" in message


def test_a_decoder_is_shown_and_image_tasks_refuse_it(tmp_path, capsys):
    folder, out = hub_folder(tmp_path / "text", hugging_face_decoder(), settings_of(LLAMA)), tmp_path / "out"
    code, shown, _ = call(capsys, "backbone", f"--config.backbone.weights={folder}", f"--out={out}")
    assert code == 0 and "Llama or Qwen2" in shown and "licence        unknown" in shown
    assert "decoder: vocabulary 40, context 32, width 16, depth 2" in shown and "tied False" in shown
    assert load(out).digest == load(folder).digest
    expected = "is a language model, which reads no images; take weights of a ViT or a Swin"
    for weights in (folder, out):
        assert expected in refusal(weights, 32)
        command = ("train", f"--workdir={tmp_path / 'run'}", "--config=configs/digits.py:smoke")
        assert expected in refused(capsys, *command, f"--config.backbone.weights={weights}")
    message = refusal(folder, name="vit-b-1k", feature="cls", heads=4, mean="0.5")
    assert all(f"--config.backbone.{flag} is for images" in message for flag in ("feature=cls", "heads=4", "mean=0.5"))


def test_rows_of_queries_and_keys_go_back_to_their_halves():
    """llama.cpp's own order: of each head, row i of the first half and row i of the second become neighbours."""
    rows = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    interleaved = np.concatenate(
        [np.stack([head[:4], head[4:]], axis=1).reshape(8, 5) for head in rows.reshape(3, 8, 5)]
    )
    np.testing.assert_array_equal(halves_first(interleaved, 3), rows)
    assert (halves_first(interleaved, 1) != rows).any()


def gguf_file(path: Path, config, kind: str = "F32", **metadata) -> Path:
    """A GGUF file as llama.cpp's converter writes one of the random decoder."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    architecture = "qwen2" if config.biased else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    facts = {"context_length": config.context, "embedding_length": config.width, "block_count": config.depth}
    facts |= {"attention.head_count": config.heads, "attention.head_count_kv": config.kv_heads}
    facts |= {"feed_forward_length": config.mlp, "rope.dimension_count": config.head_size}
    for key, value in facts.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.epsilon)
    for key, value in metadata.items():
        writer.add_string(f"{architecture}.{key.replace('__', '.')}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.depth)
    for name, array in hugging_face_decoder(config).items():
        heads = {"q": config.heads, "k": config.kv_heads}.get(name.partition("self_attn.")[2][:1])
        if heads and not config.biased:  # as in llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute
            halves = array.reshape(heads, 2, -1, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        number = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        stored = gguf.quantize(array, number)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("config", [LLAMA, TIED, QWEN2], ids=["Llama", "tied", "Qwen2"])
def test_a_gguf_file_is_the_folder_that_it_was_made_from(tmp_path, config):
    folder = hub_folder(tmp_path / "folder", hugging_face_decoder(config), settings_of(config))
    (tmp_path / "gguf").mkdir()
    file = gguf_file(tmp_path / "gguf" / "model.gguf", config)
    assert load(file).digest == load(file.parent).digest == load(folder).digest


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("Q8_0", 0.02), ("Q4_0", 0.2), ("Q4_1", 0.2)])
def test_types_of_gguf_numbers(tmp_path, kind, error):
    config = dataclasses.replace(TIED, width=32, head_size=8, mlp=64)  # rows of whole blocks of 32 numbers
    params = load(gguf_file(tmp_path / "model.gguf", config, kind)).params
    exact = hugging_face_decoder(config)
    for ours, theirs in (("gate", "mlp.gate_proj"), ("down", "mlp.down_proj")):
        expected = exact[f"model.layers.1.{theirs}.weight"].T
        assert 0 < np.abs(params["blocks"][1]["mlp"][ours]["kernel"] - expected).max() < error


def test_gguf_files_that_cannot_be_used(tmp_path):
    config = dataclasses.replace(TIED, width=32, head_size=8, mlp=64)
    message = refusal(gguf_file(tmp_path / "type.gguf", config, "Q5_0"))
    assert "blk.0.attn_q.weight is of type Q5_0; known: F32, F16, Q8_0, Q4_0, Q4_1" in message
    message = refusal(gguf_file(tmp_path / "scaled.gguf", TIED, rope__scaling__type="yarn"))
    assert 'rope_type=yarn; known: "default"' in message
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "type.gguf").read_bytes()[:500])
    assert "cut.gguf is not a readable .gguf: perhaps cut short" in refusal(tmp_path / "cut.gguf")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "text", hugging_face_decoder(), settings_of(LLAMA))

    class AutoTokenizer:
        size = LLAMA.vocabulary

        @classmethod
        def from_pretrained(cls, place, **options):
            assert place == folder and options == {"local_files_only": True}
            if not cls.size:
                raise OSError("no file named tokenizer.json")
            return types.SimpleNamespace(get_vocab=lambda: {f"w{i}": i for i in range(cls.size)})

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=AutoTokenizer))
    assert len(tokenizers.load(folder, LLAMA).get_vocab()) == LLAMA.vocabulary
    AutoTokenizer.size += 1
    with pytest.raises(UserError, match="has tokens up to 40, the model's embedding has 40 rows; take the tokenizer"):
        tokenizers.load(folder / "model.safetensors", LLAMA)
    AutoTokenizer.size = 0
    with pytest.raises(UserError, match="can read no tokenizer there .OSError: no file named tokenizer.json"):
        tokenizers.load(folder, LLAMA)
