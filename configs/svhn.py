"""SVHN, cropped digits, with the paper's backbones (5.1): 58,605 training, 14,652 hold-out and 26,032 test images.

Command (vit-b-22k, vit-b-1k, swin-b-22k or swin-b-1k; the weights as `lmeraser backbone --list` names them):
  lmeraser prepare --dataset=svhn_cropped
  lmeraser train --config=configs/svhn.py:vit-b-22k --config.backbone.weights=FOLDER --workdir=runs/svhn
  lmeraser evaluate --workdir=runs/svhn

Expected: no figure in the paper's text. This file has not been run in full by us: it needs the published weights and
a GPU. 30 clusters is what the paper states.

A mirrored digit is another one or none, so images are cropped but not flipped; the paper's code flips them:
--config.data.augment=paper.
"""

from configs import common


def get_config(arg: str = ""):
    config = common.paper_config(arg, "configs/svhn.py")
    config.data.source = "tfds"
    config.data.dataset = "svhn_cropped"
    config.data.train_split = "train[:58605]"
    config.data.holdout_split = "train[58605:]"
    config.data.augment = "crop"
    config.clustering.cut = "auto:30"
    return config
