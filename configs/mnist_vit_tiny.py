"""MNIST digits on a real ImageNet ViT-Tiny/16, small enough for two CPU cores."""

from lmeraser_jax.presets import vit_tiny_config


def get_config(arg: str = ""):
    config = vit_tiny_config("mnist_20k_10k.npz", arg, "configs/mnist_vit_tiny.py")
    config.data.train_limit = 6000
    config.data.test_limit = 2000
    config.tuning.prompt_width = 16
    config.tuning.prompt_rate = 0.03
    return config
