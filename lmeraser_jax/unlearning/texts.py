"""What a workdir of texts has beside its records: the tokenizer, and the source that the config names."""

from typing import TYPE_CHECKING

from lmeraser_jax.config import Config, Text
from lmeraser_jax.data import load
from lmeraser_jax.data.source import Source
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import tokenizers
from lmeraser_jax.models.architectures import DecoderConfig
from lmeraser_jax.storage.atomic_files import is_there
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout

if TYPE_CHECKING:
    from lmeraser_jax.models.backbone import Backbone  # loads JAX, which an encoder does without


def keep_tokenizer(layout: Layout, catalog: Catalog, weights: str, backbone: "Backbone") -> None:
    """Copies the tokenizer beside the weights into the workdir, and notes its digest."""
    catalog.set("tokenizer", tokenizers.save(layout.tokenizer, tokenizers.beside(weights, backbone.config)))


def encoder_of(layout: Layout, catalog: Catalog, text: Text) -> Encoder:
    """Queries and responses -> tokens, with the workdir's own tokenizer. Raises `UserError` where it was changed."""
    if tokenizers.digest_of(layout.tokenizer) != catalog.get("tokenizer"):
        raise UserError(f"{layout.tokenizer} is not the tokenizer that the texts were read with; restore the folder")
    return Encoder(tokenizers.read(layout.tokenizer), text)


def open_source(config: Config, layout: Layout, backbone: "Backbone | None") -> Source:
    """The data that the config names; text with the workdir's tokenizer, which is taken from the weights at first."""
    if not config.is_text:
        return load.load(config.data)
    from lmeraser_jax.models import convert

    architecture = (backbone or convert.load(config.backbone)[0]).config
    if not isinstance(architecture, DecoderConfig):
        weights = f"--config.backbone.weights={config.backbone.weights}"
        raise UserError(f"{weights} are not of a language model, which texts need")
    if config.text.context > architecture.context:
        flag = f"--config.text.context={config.text.context}"
        raise UserError(f"{flag}: must be at most {architecture.context}, the model's own context")
    if is_there(layout.backbone):
        tokenizer = tokenizers.load(layout.tokenizer, architecture)
    else:
        tokenizer = tokenizers.beside(config.backbone.weights, architecture)
    return load.load(config.data, encoder=Encoder(tokenizer, config.text))
