"""Your own images: one .npz file and a pretrained ViT.

Command:
  lmeraser train --config=configs/npz.py --workdir=runs/mine \\
    --config.data.path=FILE.npz --config.backbone.weights=PATH --config.data.image_size=64

Keys of FILE.npz: train_images, train_labels, test_images, test_labels (uint8 [N, H, W, 1 or 3], int [N]),
class_names; optional train_ids, train_owners, test_ids. Weights: anything that docs/backbones.md lists.

The sample of 200 suits a few hundred to a few thousand images. With fewer than 200, lower clustering.sample_size; with
more, raise it (the paper: 1000), and cut and max_members with it. Choose settings on a private hold-out, never on the
test images: --config.data.holdout=0.1, then lmeraser evaluate --split=holdout.
"""

from lmeraser_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()
    config.data.source = "npz"
    config.data.image_size = 224
    config.clustering.sample_size = 200
    config.clustering.cut = "auto:12"
    config.clustering.max_members = 25
    config.clustering.min_members = 5
    config.tuning.prompt_width = 8
    config.tuning.prompt_rate = 1e-2
    config.tuning.head_rate = 3e-3
    config.tuning.epochs = 15
    config.tuning.batch = 32
    if arg:
        raise ValueError(f"configs/npz.py:{arg}: takes no argument")
    return config
