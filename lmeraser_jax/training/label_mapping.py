"""The fixed head of prompts that are tuned without one (DAM-VP, head-missing): features that stand for classes.

No label is looked at and nothing is learnt: the features that noise excites most become the logits, in the order of
their place. A prompt then has to move the image until the right one is the largest.
"""

import functools

import jax
import numpy as np

from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import philox
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Backbone

IMAGES, BATCH = 512, 64


def noise_activation(backbone: Backbone, classes: int) -> tuple[int, ...]:
    """The Y features with the largest standard deviation over 512 images of Gaussian noise, in ascending order.

    Args:
        backbone: the frozen network; the noise is drawn as its normalised input, N(0, 1).
        classes: Y.

    Raises:
        UserError: the backbone has fewer features than there are classes.
    """
    config = backbone.config
    if classes > config.feature_size:
        raise UserError(
            f"--config.tuning.method=prompt: {classes} classes need a feature each, the backbone has"
            f" {config.feature_size}; use prompt+head"
        )
    features = jax.jit(functools.partial(backbone_lib.features, config))
    shape = (IMAGES, config.image_size, config.image_size, config.channels)
    noise = philox(0, "noise activation").standard_normal(shape, np.float32)
    found = np.concatenate([features(backbone.params, noise[i : i + BATCH]) for i in range(0, IMAGES, BATCH)])
    strongest = np.argsort(-found.std(axis=0), kind="stable")[:classes]
    return tuple(sorted(strongest.tolist()))
