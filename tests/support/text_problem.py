"""A small language problem for the tests: 48 questions of 8 owners, a random Llama and a tokenizer of whole words."""

import json
from pathlib import Path
from typing import Any

import jax
from helpers import small_config
from published import LLAMA, hub_folder, hugging_face_decoder, settings_of

from lmeraser_jax.config import Config, to_dict
from lmeraser_jax.data import load
from lmeraser_jax.data.source import Source
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.models import tokenizers
from lmeraser_jax.unlearning.run import prepare_run

WORDS = [f"w{i}" for i in range(LLAMA.vocabulary - 4)]
RECORDS, OWNERS = 48, 8


def word_tokenizer() -> Any:
    """A tokenizer of transformers: a token a word, with start, end and unknown tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<unk>", ":"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def model_folder(folder: Path) -> Path:
    """A Hugging Face folder of a random Llama, with its tokenizer."""
    hub_folder(folder, hugging_face_decoder(), settings_of(LLAMA))
    word_tokenizer().save_pretrained(folder)
    return folder


def line(i: int) -> dict[str, str]:
    """Record number i: its owner's word and its own, asked for two other words."""
    owner = i % OWNERS
    query = f"w{owner} w{owner} w{8 + i % 20}"
    return {
        "id": f"text-{i:02d}",
        "owner": f"person-{owner}",
        "query": query,
        "response": f"w{28 + (i * 5) % 8} w{(i * 7) % 28}" + " w1" * (i % 3),
        "split": "test" if i % 6 == 5 else "train",
    }


def text_folder(folder: Path) -> Path:
    """A folder with the model and the records: model/, records.jsonl."""
    model_folder(folder / "model")
    lines = "\n".join(json.dumps(line(i)) for i in range(RECORDS))
    (folder / "records.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


def text_config(folder: Path, **overrides: Any) -> Config:
    """The small config for the records of a `text_folder`; overrides as in `small_config`."""
    changes = {
        "data__source": "text",
        "data__path": str(folder / "records.jsonl"),
        "backbone__weights": str(folder / "model"),
        "backbone__heads": 0,
        "text__query": "{query} :",
        "text__response": "{response}",
        "text__context": 12,
        "clustering__sample_size": 15,
        "clustering__max_members": 6,
        "clustering__min_members": 2,
        "tuning__method": "lora",
        "tuning__rank": 2,
        "tuning__lora_l2": 0.01,
        "tuning__prompt_width": 2,
    }
    return small_config(**(changes | overrides))


def experiment(config: Config) -> str:
    """The text of an experiment file with these settings."""
    lines = ["config = default_config()", f"config.update({to_dict(config)!r})", "return config"]
    return "\n    ".join(["from lmeraser_jax.config import default_config\ndef get_config():", *lines])


def text_source(config: Config) -> Source:
    """The records, tokenised."""
    tokenizer = tokenizers.load(Path(config.backbone.weights), LLAMA)
    return load.load(config.data, encoder=Encoder(tokenizer, config.text))


def text_run(workdir: Path, config: Config, source: Source | None = None, devices: int = 1):
    """An opened run on the first so many devices: `with text_run(...) as (run, imported)`."""
    return prepare_run(workdir, config, devices=jax.devices()[:devices], source=source)
