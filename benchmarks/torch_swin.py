"""A Swin in PyTorch and the same in ours: Hugging Face's model with random weights, read through the public path."""

import tempfile

import torch
import transformers
from torch import nn

from lmeraser_jax import config as settings
from lmeraser_jax.models import convert
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.swin import SwinConfig


class TorchSwin(nn.Module):
    """The frozen part of a Swin: normalised images [B, H, W, C] to the mean token [B, D]."""

    def __init__(self, config: SwinConfig, weights: str):
        super().__init__()
        known = transformers.SwinConfig(
            image_size=config.image_size,
            patch_size=config.patch,
            num_channels=config.channels,
            embed_dim=config.width,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=config.window,
            mlp_ratio=config.mlp_ratio,
            layer_norm_eps=config.epsilon,
            drop_path_rate=0.0,
        )
        torch.manual_seed(0)
        model = transformers.SwinModel
        self.swin = (model.from_pretrained(weights) if weights else model(known)).eval()

    def forward(self, images: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        """There is no class token, so `cls_only` saves nothing."""
        return self.swin(images.permute(0, 3, 1, 2)).pooler_output


def swin_pair(config: SwinConfig, weights: str = "") -> tuple[TorchSwin, Backbone]:
    """The same network in PyTorch, without gradients for its parameters, and in ours: random, or of a folder."""
    model = TorchSwin(config, weights).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        model.swin.save_pretrained(folder)
        backbone, _ = convert.load(settings.Backbone(weights=folder, mean="0.5", std="0.5"), config.image_size)
    return model, backbone
