"""A ViT in PyTorch with the weights of one of our backbones: what the tuning benchmark compares with.

Shapes: B batch, N tokens, D width. Images are [B, H, W, C], as everywhere else.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.vit import ViTConfig


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads, self.tanh = config.heads, "tanh" if config.gelu == "tanh" else "none"
        self.norm1 = nn.LayerNorm(config.width, config.epsilon)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, config.epsilon)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:  # [B, N, D] -> [B, 1 or N, D]
        (b, n, d), y = x.shape, self.norm1(x)
        if cls_only:
            q = F.linear(y[:, :1], self.qkv.weight[:d], self.qkv.bias[:d]).view(b, 1, self.heads, -1).transpose(1, 2)
            k, v = (
                F.linear(y, self.qkv.weight[d:], self.qkv.bias[d:]).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            )
            x = x[:, :1]
        else:
            q, k, v = self.qkv(y).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate=self.tanh))


class TorchViT(nn.Module):
    """The frozen part of a ViT: normalised images to class-token features."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        assert config.feature == "cls", config.feature
        self.patch = config.patch
        self.embed = nn.Linear(config.patch * config.patch * config.channels, config.width)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.epsilon)

    def forward(self, images: torch.Tensor, cls_only: bool = False) -> torch.Tensor:  # [B, H, W, C] -> [B, D]
        """With `cls_only` the last block computes what the feature needs of it."""
        b, h, w, c = images.shape
        p = self.patch
        x = images.view(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
        x = torch.cat([self.cls.expand(b, -1, -1), self.embed(x)], 1) + self.positions
        for index, block in enumerate(self.blocks):
            x = block(x, cls_only and index == len(self.blocks) - 1)
        return self.norm(x[:, 0])


def frozen_vit(backbone: Backbone) -> TorchViT:
    """The backbone in PyTorch, without gradients for its parameters."""
    assert isinstance(backbone.config, ViTConfig)
    model, tree = TorchViT(backbone.config), backbone.params
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(torch.from_numpy(_array_of(tree, name)))
            leaf.requires_grad_(False)
    return model.eval()


def _array_of(tree, name: str) -> np.ndarray:
    """The array of one of our parameter trees that a PyTorch name stands for; kernels are transposed."""
    within = {"qkv": "attention", "out": "attention", "fc1": "mlp", "fc2": "mlp"}
    leaves = {"weight": ("kernel", "scale"), "bias": ("bias",), "cls": ("cls",), "positions": ("positions",)}
    *path, last = name.split(".")
    for step in path:
        tree = tree[within[step]] if step in within else tree
        tree = tree[int(step) if step.isdecimal() and int(step) in tree else step]
    (array,) = (np.array(tree[leaf]) for leaf in leaves[last] if leaf in tree)
    return array.T if last == "weight" and array.ndim == 2 else array
