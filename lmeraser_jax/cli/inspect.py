"""lmeraser inspect: show what a workdir holds: clusters, sizes, slices, versions, disk use.

lmeraser inspect --workdir=DIR [--records]
"""

from lmeraser_jax import config as settings
from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError

TAKES_CONFIG = False
FLAGS = (
    common.Flag(
        "records", False, "list the live private records instead: id and owner as a shell reads them, class, cluster"
    ),
)


def run(arguments: common.Arguments) -> int:
    workdir = common.workdir_of(arguments)
    from lmeraser_jax.evaluation import overview
    from lmeraser_jax.storage.workdir import read_config

    with common.catalog_of(workdir) as (layout, catalog):
        if arguments["records"]:
            common.show(arguments, *overview.record_list(catalog))
            return 0
        stored = read_config(layout)
        if stored is None:
            raise UserError(f"{layout.root} is not complete yet; run: lmeraser train {layout.flag}")
        result = overview.overview(layout, catalog, settings.from_dict(stored))
    common.show(arguments, result.table(), result.values())
    return 0
