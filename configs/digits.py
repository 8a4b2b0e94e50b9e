"""scikit-learn's digits: the embedded experiment, the defaults of every setting.

Command:
  lmeraser train --config=configs/digits.py --workdir=runs/digits
  lmeraser train --config=configs/digits.py:smoke --workdir=runs/smoke    (a few seconds, low accuracy)
"""

from lmeraser_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()
    if arg == "smoke":
        config.pretraining.epochs = 5
        config.tuning.epochs = 2
        config.tuning.min_steps = 4
    elif arg:
        raise ValueError(f"configs/digits.py:{arg}: the argument must be smoke or left out")
    return config
