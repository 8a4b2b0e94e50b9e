"""CIFAR-10 with the paper's backbones (5.1): 40,000 training, 10,000 hold-out and 10,000 test images.

Command (vit-b-22k, vit-b-1k, swin-b-22k or swin-b-1k; the weights as `lmeraser backbone --list` names them):
  lmeraser prepare --dataset=cifar10
  lmeraser train --config=configs/cifar10.py:vit-b-22k --config.backbone.weights=FOLDER --workdir=runs/cifar10
  lmeraser evaluate --workdir=runs/cifar10

Expected: the paper's Figure 3 has no numbers in its text; a public log of its predecessor reaches 0.92 test accuracy
with one prompt and head on vit-b-22k after 10 epochs. This file has not been run in full by us: it needs the published
weights and a GPU. 194 clusters is what the paper states; without limits on their sizes they are very uneven.

TFDS stores the images in an order of its own, so the first 40,000 are not those of the paper's code, but as
many. `--config.data.augment=crop` switches the flips off.
"""

from configs import common


def get_config(arg: str = ""):
    config = common.paper_config(arg, "configs/cifar10.py")
    config.data.source = "tfds"
    config.data.dataset = "cifar10"
    config.data.train_split = "train[:40000]"
    config.data.holdout_split = "train[40000:]"
    config.data.augment = "paper"
    config.clustering.cut = "auto:194"
    return config
