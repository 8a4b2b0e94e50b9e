"""CIFAR-100 with the paper's backbones (5.1): 40,000 training, 10,000 hold-out and 10,000 test images.

Command (vit-b-22k, vit-b-1k, swin-b-22k or swin-b-1k; the weights as `lmeraser backbone --list` names them):
  lmeraser prepare --dataset=cifar100
  lmeraser train --config=configs/cifar100.py:vit-b-22k --config.backbone.weights=FOLDER --workdir=runs/cifar100
  lmeraser evaluate --workdir=runs/cifar100

Expected: 0.7275 test accuracy with vit-b-22k (paper, Figure 6 left). This file has not been run in full by us: it
needs the published weights and a GPU. 347 clusters is what the paper states.
"""

from configs import common


def get_config(arg: str = ""):
    config = common.paper_config(arg, "configs/cifar100.py")
    config.data.source = "tfds"
    config.data.dataset = "cifar100"
    config.data.train_split = "train[:40000]"
    config.data.holdout_split = "train[40000:]"
    config.data.augment = "paper"
    config.clustering.cut = "auto:347"
    return config
