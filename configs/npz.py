"""Your own images: one .npz file and a pretrained ViT.

Command:
  lmeraser train --config=configs/npz.py --workdir=runs/mine \\
    --config.data.path=FILE.npz --config.backbone.weights=WEIGHTS.npz --config.data.image_size=64

Keys of FILE.npz: train_images, train_labels, test_images, test_labels (uint8 [N, H, W, 1 or 3], int [N]),
class_names; optional train_ids, train_owners, test_ids. WEIGHTS.npz: a ViT with timm's names.

The sample shrinks to a tenth of the records where there are fewer than 10,000; choose other settings on a
private hold-out: --config.data.holdout=0.1, then lmeraser evaluate --split=holdout.
"""

from lmeraser_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()
    config.data.source = "npz"
    config.data.image_size = 224
    config.backbone.heads = 0  # width / 64
    config.clustering.sample_size = 1000
    config.clustering.cut = "auto:20"
    config.clustering.max_members = 50
    config.clustering.min_members = 5
    config.tuning.prompt_width = 8
    config.tuning.epochs = 15
    config.tuning.batch = 32
    if arg:
        raise ValueError(f"configs/npz.py:{arg}: takes no argument")
    return config
