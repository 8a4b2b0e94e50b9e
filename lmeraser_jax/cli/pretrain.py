"""lmeraser pretrain: import the data and train the backbone on public images (paper Eq. 2).

  lmeraser pretrain --config=configs/digits.py --workdir=runs/digits

With --config.backbone.weights=FILE it converts the weights instead. After an interruption it resumes from the last
checkpoint.
"""

from lmeraser_jax.cli import common
from lmeraser_jax.storage.workdir import Layout


def run(arguments: common.Arguments) -> int:
    workdir, config = common.begun(arguments)
    from lmeraser_jax.unlearning.run import prepare_run

    common.log_devices()
    with prepare_run(workdir, config) as (opened, imported):
        architecture, name = opened.backbone.config, opened.backbone.digest
    kind, size = type(architecture).__name__.removesuffix("Config"), architecture.image_size
    lines = [f"backbone {name[:12]}: {kind}, {size} px, feature of {architecture.feature_size} numbers"]
    if imported:
        lines.append(common.imported_text(imported, f"lmeraser train --reimport {Layout(workdir).flag}"))
    lines.append(f"next: lmeraser train {Layout(workdir).flag}")
    common.show(arguments, "\n".join(lines), {"backbone": name, "imported": imported.added if imported else 0})
    return 0
