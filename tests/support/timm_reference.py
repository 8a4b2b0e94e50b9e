"""python timm_reference.py FOLDER: random timm models, their weights as safetensors, their answers as npz.

A program of its own, because timm imports torchvision, which its models do not need: stand-ins take its place.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import numpy as np

SIZES = {"vit": (16, 24, 8), "swin": (32,)}  # of the images; other than the first: positions interpolated
NAMED = {"vit_small_patch14_dinov2": (518, 70), "vit_small_patch14_reg4_dinov2": (518, 70)}  # timm's names, sizes
NAMED |= {"vit_base_patch32_clip_quickgelu_224.openai": (224, 64), "vit_base_patch32_clip_224": (224, 64)}
ACTS = ("gelu", "gelu_tanh", "quick_gelu")
NO_TIMM = 3  # exit code


class StandIn(mock.MagicMock):
    """A module whose every name is there."""

    __path__: list[str] = []
    __file__ = "stand-in"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and every module inside it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(name=spec.name, __spec__=spec)

    def exec_module(self, module):
        pass


def main(folder: Path) -> int:
    if not importlib.util.find_spec("timm"):
        return NO_TIMM
    sys.meta_path.insert(0, Finder())
    import timm
    import torch
    from published import SWIN, VIT, spread
    from safetensors.torch import save_file
    from timm.layers import resample_abs_pos_embed
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer
    from transcriptions import pictures

    torch.manual_seed(0)
    shared = {"img_size": VIT.image_size, "patch_size": VIT.patch, "embed_dim": VIT.width, "num_classes": VIT.classes}
    vit = {**shared, "depth": VIT.depth, "num_heads": VIT.heads, "mlp_ratio": VIT.mlp / VIT.width}
    shared = {"img_size": SWIN.image_size, "patch_size": SWIN.patch, "embed_dim": SWIN.width}
    swin = {**shared, "depths": SWIN.depths, "num_heads": SWIN.heads, "num_classes": SWIN.classes}
    swin |= {"window_size": SWIN.window, "mlp_ratio": SWIN.mlp_ratio}
    models = {"vit": VisionTransformer(**vit), "swin": SwinTransformer(**swin)}
    for name, model in models.items():
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(*spread(key))
        weights = model.state_dict()
        save_file(weights, folder / f"{name}.safetensors")
        answers = {}
        for size in SIZES[name]:
            if size != SIZES[name][0]:
                positions = resample_abs_pos_embed(weights["pos_embed"], [size // VIT.patch, size // VIT.patch])
                model = VisionTransformer(**{**vit, "img_size": size})
                model.load_state_dict({**weights, "pos_embed": positions})
            model.eval()
            with torch.no_grad():
                tokens = model.forward_features(torch.tensor(pictures(2, size).transpose(0, 3, 1, 2)))
                answers[f"features{size}"] = model.forward_head(tokens, pre_logits=True).numpy()
                answers[f"logits{size}"] = model.forward_head(tokens).numpy()
        np.savez(folder / f"{name}.npz", **answers)
    for act in ACTS:
        model = timm.create_model("test_vit", act_layer=act).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(*spread(key))
            tokens = model.forward_features(torch.tensor(pictures(2, 160).transpose(0, 3, 1, 2)))
            np.savez(folder / f"{act}.npz", features=model.forward_head(tokens, pre_logits=True).numpy())
        timm.models.save_for_hf(model, folder / act, safe_serialization=True)
    for name, sizes in NAMED.items():
        model = timm.create_model(name, depth=2, dynamic_img_size=True, num_classes=0).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(*spread(key))
                parameter.mul_(4 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1)
            xs = {str(size): torch.tensor(pictures(1, size).transpose(0, 3, 1, 2)) for size in sizes}
            np.savez(folder / f"{name}.npz", **{size: model(x).numpy() for size, x in xs.items()})
        timm.models.save_for_hf(model, folder / name, safe_serialization=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
