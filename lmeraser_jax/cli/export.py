"""lmeraser export: write the adapters of a language model as folders that the library peft loads.

  lmeraser export --workdir=DIR --out=NEW_FOLDER [--cluster=KEY]

Each published cluster that is not quarantined, or the one whose key begins with KEY, gets a folder with its adapters.
prototypes.npz holds keys and prototypes float32 [K, D], for routing: a query belongs to the nearest prototype of its
feature, the mean of the frozen model's last hidden states over the query's tokens. No erasure reaches an exported
copy: export again after one, and delete the old folder.
"""

from lmeraser_jax.cli import backbone, common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError
from lmeraser_jax.unlearning import rollback

FLAGS = (
    Flag("out", absolute, "new folder"),
    Flag("cluster", "", "key of the only cluster to export, or its beginning; empty: all"),
)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.finished(arguments)
    out = backbone.output_folder(arguments["out"])
    if not config.is_text:
        raise UserError(f"--workdir={workdir} has no language model: peft has no use for its slices")
    with common.catalog_of(workdir) as (_, catalog):
        only = rollback.cluster_key(catalog, arguments["cluster"]) if arguments["cluster"] else ""
    with common.opened(arguments) as run_:
        from lmeraser_jax.evaluation.language import export

        common.warn_if_unfinished(run_)
        folders = export(run_, out, only)
    lines = [f"exported {len(folders)} clusters; no erasure reaches these copies", *map(str, folders.values())]
    common.show(arguments, "\n".join(lines), {"folder": out, "clusters": folders})
    return 0
