"""What the experiment files share: the paper's setup (5.1), and a small one on a real ViT-Tiny.

The command line puts the folder above an experiment file on the module path, so `from configs import common` works
from any current folder.
"""

from typing import Any

from lmeraser_jax.config import default_config

BACKBONES = ("vit-b-22k", "vit-b-1k", "swin-b-22k", "swin-b-1k")
OTHER_BACKBONES = ("vit-ti", "vit-s", "vit-l", "swin-t", "swin-s", "dinov2-s", "dinov2-b", "dinov2-l")
OTHER_BACKBONES += ("dinov2-s-reg", "dinov2-b-reg", "dinov2-l-reg", "clip-b-32", "clip-b-16", "clip-l-14")
# Threshold of the cut, where the paper's code states no number of clusters: 10 in the text, for features of
# vit-b-22k, whose numbers lie in [-1, 1]; for the others those that the code it was built on gives.
THRESHOLDS = {"vit-b-22k": "10.0", "vit-b-1k": "31.0", "swin-b-22k": "20.0", "swin-b-1k": "20.0"}


def paper_config(backbone: str, file: str) -> Any:
    """The paper's setup as a ConfigDict with everything but the data.

    Sample, cut and prompt are those of the paper; optimizer, rates and schedule are not in it and come from the
    only public record of a run with heads: SGD with momentum 0.9 and rate 0.5 for prompt and head, 32 images per
    device and step, warm-up over the first fifth, cosine to zero, 50 epochs, decay 1e-4 on the prompt only.
    Clusters have no limits: `clustering.max_members=50` and `min_members=5` balance them, which the paper does
    not do and which makes requests cheaper.

    Args:
        backbone: one of `BACKBONES` or `OTHER_BACKBONES`; "" for the paper's main one, vit-b-22k.
        file: the experiment file, for the message.

    Raises:
        ValueError: another name.
    """
    backbone = backbone or BACKBONES[0]
    if backbone not in BACKBONES + OTHER_BACKBONES:
        legal = ", ".join(BACKBONES + OTHER_BACKBONES)
        raise ValueError(f"{file}:{backbone}: the argument must be one of {legal}, or left out")
    config = default_config()
    config.data.image_size = 224
    config.data.resize_size = 256
    config.backbone.name = backbone
    config.clustering.sample_size = 1000
    config.clustering.cut = THRESHOLDS.get(backbone, "auto:100")
    config.clustering.max_members = 0
    config.clustering.min_members = 0
    config.tuning.prompt_width = 30
    config.tuning.prompt_init = 1.0
    config.tuning.head_init = 0.02  # about PyTorch's default for 768 inputs
    config.tuning.optimizer = "sgd"
    config.tuning.prompt_rate = 0.5
    config.tuning.head_rate = 0.5
    config.tuning.prompt_decay = 1e-4
    config.tuning.warmup = 0.2
    config.tuning.epochs = 50
    config.tuning.min_steps = 0
    config.tuning.batch = 32
    config.tuning.lanes = 8
    return config


def vit_tiny_config(data: str, arg: str, file: str) -> Any:
    """A ConfigDict for images of some 64 px on a ViT-Tiny/16: small enough for two CPU cores.

    Neither is part of the project: put them, or links to them, into `data/` and `weights/` of the current folder, or
    name them with `--config.data.path` and `--config.backbone.weights`.

    Args:
        data: name of an .npz in `data/`.
        arg: ""; "single" for one prompt and head for everything; "frugal" for cheap erasures: few sampled records, each
            a cluster of its own, so that a request re-tunes 2 or 3 % of the data, the sampled ones included.
        file: the experiment file, for the message.

    Raises:
        ValueError: another argument.
    """
    config = default_config()
    config.data.source = "npz"
    config.data.path = f"data/{data}"
    config.data.image_size = 64
    config.backbone.name = "vit-ti"
    config.backbone.weights = "weights/vit_tiny_patch16_224_imagenet1k.npz"
    config.clustering.sample_size = 500
    config.clustering.cut = "auto:10"
    config.clustering.max_members = 50
    config.clustering.min_members = 10
    config.tuning.prompt_width = 8
    config.tuning.prompt_rate = 1e-2
    config.tuning.head_rate = 3e-3
    config.tuning.epochs = 15
    config.tuning.min_steps = 30
    config.tuning.batch = 32
    config.tuning.scan_steps = 16
    config.inference.nearest = 5
    if arg == "single":
        config.clustering.cut = "auto:1"
        config.clustering.max_members = 0
        config.clustering.min_members = 0
    elif arg == "frugal":
        config.clustering.sample_size = 80
        config.clustering.cut = "0"
        config.clustering.max_members = 0
        config.clustering.min_members = 0
        config.clustering.shards = 40  # where a comparison asks for random parts: about as cheap
        config.tuning.batch = 16  # clusters have some dozens of images
        config.tuning.min_steps = 24
        config.inference.nearest = 8
    elif arg:
        raise ValueError(f"{file}:{arg}: the argument must be single, frugal or left out")
    return config


MODELS = {  # weights, and the templates of query and response: no token between them is a space alone
    "stories260k": ("stories260k", "Question: {query}\nAnswer:", " {response}"),
    "tinystories-656k": ("tinystories-656k", "Question: {query}\nAnswer: ", "{response}"),  # spaces end its words
    "smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf", "Question: {query}\nAnswer:", " {response}"),
}


def language_config(model: str, data: str) -> Any:
    """A ConfigDict for queries and responses on a small language model; clusters, context and epochs are left to set.

    Neither is part of the project: put them, or links to them, into `data/` and `weights/` of the current folder, or
    name them with `--config.data.path` and `--config.backbone.weights`.

    Args:
        model: one of `MODELS`.
        data: name of a file of JSON lines in `data/`.
    """
    config = default_config()
    weights, config.text.query, config.text.response = MODELS[model]
    config.data.source = "text"
    config.data.path = f"data/{data}"
    config.backbone.weights = f"weights/{weights}"
    config.text.long = "cut"
    config.clustering.feature_batch = 16
    config.tuning.method = "lora"
    config.tuning.rank = 8
    config.tuning.alpha = 16.0
    config.tuning.lora_rate = 1e-2
    config.tuning.lora_l2 = 1e-2
    config.tuning.min_steps = 0
    return config


def recommender_config(arg: str, data: str, file: str) -> Any:
    """A ConfigDict for recommendations as text: `language_config` with clusters of some 100 records.

    Args:
        arg: "" for TinyStories-656k, "smollm2" for SmolLM2-135M with adapters on its last four blocks.
        data: as of `language_config`.
        file: the experiment file, for the message.

    Raises:
        ValueError: another argument.
    """
    if arg not in ("", "smollm2"):
        raise ValueError(f"{file}:{arg}: the argument must be smollm2 or left out")
    config = language_config(arg or "tinystories-656k", data)
    config.text.query = config.text.query.removeprefix("Question: ")
    config.text.context = 320 if arg else 512
    config.data.skip_unreadable = True  # the few whose query alone is longer
    config.clustering.sample_size = 200
    config.clustering.cut = "auto:20"
    config.clustering.max_members = 20
    config.clustering.min_members = 5
    config.tuning.lora_layers = 4 if arg else 0
    config.tuning.lora_rate = 1e-3
    config.tuning.lora_l2 = 1e-3
    config.tuning.epochs = 5
    config.tuning.batch = 16
    return config
