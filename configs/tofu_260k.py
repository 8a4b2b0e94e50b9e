"""TOFU's questions about made-up authors on stories260k, the smallest language model: to try every command.

Weights and data are not part of the project (configs/common.py); data as for configs/tofu_656k.py.

Command (a few records; train_limit=0 takes all):
  lmeraser train --config=configs/tofu_260k.py --config.data.train_limit=24 --workdir=runs/tofu-260k
"""

from configs import common


def get_config(arg: str = ""):
    if arg:
        raise ValueError(f"configs/tofu_260k.py:{arg}: the argument must be left out")
    config = common.language_config("stories260k", "tofu_full.jsonl.gz")
    config.data.split_by = "owner"
    config.data.test_share = 0.1
    config.text.names = "id,author,question,answer"
    config.text.context = 256
    config.clustering.partition = "owner"
    config.tuning.epochs = 5
    config.tuning.batch = 10
    config.tuning.lanes = 2
    return config
