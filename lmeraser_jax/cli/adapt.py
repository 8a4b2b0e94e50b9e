"""lmeraser adapt: train published weights on, on public records, and write a backbone for --config.backbone.weights.

  lmeraser adapt --config=FILE.py --config.backbone.weights=WEIGHTS --config.public.source=npz --config.public.path=FILE
                 --config.data.image_size=64 --config.pretraining.epochs=3 --out=DIR

Any number of workdirs can use the backbone; train adapts one of its own with --config.pretraining.start=weights. Public
images that are private or test images of --config.data too are named and left out. The same command resumes after an
interruption, from .DIR.checkpoints beside DIR.
"""

import shutil

from lmeraser_jax import config as settings
from lmeraser_jax.cli import common
from lmeraser_jax.cli.backbone import output_folder, show
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import zoo

FLAGS = (common.Flag("out", absolute, "new folder for the adapted backbone"),)


def run(arguments: common.Arguments) -> int:
    out = output_folder(arguments["out"])
    tree = arguments["config"].to_dict()
    config = settings.from_dict(tree | {"pretraining": tree["pretraining"] | {"start": "weights"}})
    if config.public.source == "data":
        raise UserError(
            "--config.public.source=data: must be npz, folder or tfds, the set to train on; whoever has none takes tfds"
            f" after lmeraser prepare --dataset={config.public.dataset}"
        )
    zoo.refuse_absent(config.backbone)
    common.log_devices()
    from lmeraser_jax.models import adapt, public_sets
    from lmeraser_jax.models import backbone as backbone_lib
    from lmeraser_jax.training.fingerprint import pinned
    from lmeraser_jax.training.train_step import mesh_of
    from lmeraser_jax.unlearning import binding

    is_private = public_sets.private_contents(config.data).__contains__
    public = public_sets.read_public(config, is_private, public_sets.labels_learned(config))
    checkpoints = out.with_name(f".{out.name}.checkpoints")  # hidden: what a user keeps beside it is not touched
    with pinned():
        backbone, provenance, _ = adapt.adapt(checkpoints, public, config, mesh_of())
    backbone_lib.save(out, backbone, binding.backbone_inputs(config), provenance)
    shutil.rmtree(checkpoints, ignore_errors=True)
    show(arguments, out, backbone, provenance)
    return 0
