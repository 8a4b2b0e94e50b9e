"""What the service counts, for Prometheus. Nothing here names a record, an owner or a token."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FILL = (0.1, 0.25, 0.5, 0.75, 0.9, 1)


class Metrics:
    """The figures of one service."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.seconds = Histogram(
            "lmeraser_http_seconds", "time of a call", ("method", "route", "status"), buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("lmeraser_queue_inputs", "images or queries that wait for the devices", registry=registry)
        self.fill = Histogram("lmeraser_batch_fill", "share of a device batch in use", buckets=FILL, registry=registry)
        self.swaps = Counter("lmeraser_swaps", "published states that took over", registry=registry)
        self.manifest = Gauge("lmeraser_manifest", "version of the state that answers", registry=registry)
        self.restarts = Counter(
            "lmeraser_worker_restarts", "times that the worker was started again", registry=registry
        )
        self._requests = Gauge("lmeraser_requests", "requests by state", ("state",), registry=registry)
        self._oldest = Gauge("lmeraser_oldest_request_seconds", "age of the oldest unfinished one", registry=registry)

    def text(self, catalog: Catalog) -> bytes:
        """All figures in the text format of Prometheus; those of requests are of this moment."""
        counts = requests.count_by_state(catalog)
        for state in requests.STATES:
            self._requests.labels(state).set(counts.get(state, 0))
        self._oldest.set(requests.due(catalog).age)
        return generate_latest(self.registry)
