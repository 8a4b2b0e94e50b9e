"""HAM10000 skin lesions at 64 px on a real ImageNet ViT-Tiny/16, small enough for two CPU cores."""

from lmeraser_jax.presets import vit_tiny_config


def get_config(arg: str = ""):
    config = vit_tiny_config("ham10000_64.npz", arg, "configs/ham10000_vit_tiny.py")
    config.data.augment = "paper"
    return config
