"""TOFU's questions about made-up authors (Maini et al., 2024) on TinyStories-656k: a language model for two CPU cores.

Neither is part of the project: put them, or links to them, into `data/` and `weights/` of the current folder, or name
them with `--config.data.path` and `--config.backbone.weights`. Of TOFU a file of JSON lines with the keys id, author,
question, answer; paraphrased_answer and perturbed_answer serve comparisons.

Command:
  lmeraser train --config=configs/tofu_656k.py --config.text.context=192 --config.text.long=cut \\
    --workdir=runs/tofu    (a slice for each author; most rows have more than 64 tokens)
  lmeraser compare --config=configs/tofu_656k.py --seeds=3 --workdir=runs/forgetting
  lmeraser compare --config=configs/tofu_656k.py --owners=196 --owner_records=20 --forget=1%,5%,10% \\
    --methods=base,retrain,exact-owners,exact-clusters --config.text.context=96 --config.text.long=cut \\
    --config.clustering.sample_size=200 --config.tuning.epochs=3 --workdir=runs/tofu-full    (nearly all rows)

Result: docs/language.md.
"""

from lmeraser_jax.config import default_config


def get_config(arg: str = ""):
    if arg:
        raise ValueError(f"configs/tofu_656k.py:{arg}: the argument must be left out")
    config = default_config()
    config.data.source = "text"
    config.data.path = "data/tofu_full.jsonl.gz"
    config.text.names = "id,author,question,answer"
    config.text.query = "{query}"
    config.text.context = 64
    config.backbone.weights = "weights/tinystories-656k"
    config.clustering.partition = "owner"
    config.clustering.sample_size = 24
    config.clustering.cut = "0"
    config.clustering.max_members = 0
    config.clustering.min_members = 0
    config.clustering.feature_batch = 16
    config.tuning.method = "lora"
    config.tuning.lora_rate = 1e-2
    config.tuning.lora_l2 = 1e-2
    config.tuning.epochs = 70
    config.tuning.min_steps = 0
    config.tuning.batch = 2  # a slice has few records
    config.tuning.lanes = 4
    config.inference.nearest = 1
    return config
