"""Tokenizers of language models, as transformers reads them: beside published weights, and kept in folders of ours."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from lmeraser_jax.errors import UserError, shorten
from lmeraser_jax.hashing import digest
from lmeraser_jax.models.architectures import Architecture, DecoderConfig
from lmeraser_jax.storage.atomic_files import replace_folder

KEPT = "tokenizer"  # the folder of a tokenizer in a folder that `lmeraser backbone` wrote


def load(path: Path, config: Architecture) -> Any:
    """The tokenizer of a model's weights, a file or a folder, or of a folder that `save` wrote.

    Raises `UserError` where there is none, or its vocabulary is larger than the model's.
    """
    from lmeraser_jax.models.weight_files import TOKENIZERS, file_of  # loads JAX, which `read` does without

    assert isinstance(config, DecoderConfig)
    folder = path / KEPT if (path / KEPT).is_dir() else path
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZERS):
        folder = file_of(folder)
    tokenizer = read(folder)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocabulary:
        raise UserError(
            f"{path}: the tokenizer has tokens up to {largest}, the model's embedding has {config.vocabulary} rows;"
            " take the tokenizer that was published with the weights"
        )
    return tokenizer


def read(path: Path) -> Any:
    """The tokenizer of a folder that has one, or of a GGUF file. Raises `UserError` where it cannot be read."""
    from transformers import AutoTokenizer

    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        place = path if path.is_dir() else path.parent
        return AutoTokenizer.from_pretrained(place, local_files_only=True, **options)
    except Exception as error:  # it raises nearly every kind over missing and damaged files
        first = shorten("".join(str(error).splitlines()[:1]), 300)
        raise UserError(
            f"{path}: transformers can read no tokenizer there ({type(error).__name__}: {first})"
        ) from error


def beside(weights: str, config: Architecture) -> Any:
    """The tokenizer that lies beside what `backbone.weights` names. Raises as `load` and `weight_files.path_of` do."""
    from lmeraser_jax.models.weight_files import path_of

    return load(path_of(weights), config)


def save(folder: Path, tokenizer: Any) -> str:
    """Writes a tokenizer into a folder, completely or not at all, in the place of an older one; returns its digest."""
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    tokenizer.save_pretrained(scratch)
    replace_folder(scratch, folder)
    return digest_of(folder)


def digest_of(folder: Path) -> str:
    """The digest of a folder's files, by their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
