"""What the routes of a service share."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from lmeraser_jax.service.answering import Answering
from lmeraser_jax.service.auth import Guard
from lmeraser_jax.service.metrics import Metrics
from lmeraser_jax.service.settings import Settings
from lmeraser_jax.service.supervisor import Supervisor
from lmeraser_jax.storage.catalog import Catalog


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """A running service."""

    settings: Settings
    answering: Answering
    guard: Guard
    metrics: Metrics
    worker: Supervisor | None  # None where the workdir cannot be written, so that nothing can be served
    estimating: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def catalog(self) -> Iterator[Catalog]:
        """A connection of the calling thread's own."""
        with contextlib.closing(Catalog(self.settings.layout.catalog)) as catalog:
            yield catalog
