"""CIFAR-10 photographs on a real ImageNet ViT-Tiny/16, small enough for two CPU cores.

The data (10,000 training and 2,000 test images in an .npz) and the weights (timm names, .npz) are not part of
the project; by default they are looked for beside it.

Command (the subset flag is data.train_limit; 0 takes all 10,000):
  lmeraser train --config=configs/cifar10_vit_tiny.py --workdir=runs/cifar10
  lmeraser evaluate --workdir=runs/cifar10
  python benchmarks/bench_requests.py --workdir=runs/cifar10 --count=20

One prompt and head for everything, the same otherwise:
  lmeraser train --config=configs/cifar10_vit_tiny.py:single --workdir=runs/cifar10-single
"""

from lmeraser_jax.config import default_config


def get_config(arg: str = ""):
    config = default_config()
    config.data.source = "npz"
    config.data.path = "../shared/data/cifar10_10k_2k.npz"
    config.data.image_size = 64
    config.data.augment = "paper"
    config.data.train_limit = 5000
    config.backbone.weights = "../shared/weights/vit_tiny_patch16_224_imagenet1k.npz"
    config.backbone.heads = 3
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
    elif arg:
        raise ValueError(f"configs/cifar10_vit_tiny.py:{arg}: the argument must be single or left out")
    return config
