"""The service as an ASGI app, and the server that runs it."""

import contextlib
import logging
from collections.abc import AsyncIterator

import anyio.to_thread
import uvicorn
from fastapi import FastAPI

from lmeraser_jax import __version__
from lmeraser_jax.service import erasures, pages, predictions, problems, reading
from lmeraser_jax.service.answering import Answering
from lmeraser_jax.service.auth import Guard
from lmeraser_jax.service.context import Service
from lmeraser_jax.service.limits import Gate, protocol_of
from lmeraser_jax.service.metrics import Metrics
from lmeraser_jax.service.settings import Settings
from lmeraser_jax.service.supervisor import Supervisor

THREADS = 64  # that decode images, read the catalog and wait for answers to queries
GRACE = 10  # seconds for calls under way when the service ends


def create_app(settings: Settings) -> FastAPI:
    """The app of a workdir; its threads and its worker run while it does."""
    metrics = Metrics()
    worker = Supervisor(settings, metrics) if settings.serves_requests else None
    answering = Answering(settings.layout, settings.config.inference, settings.limits.queue, metrics)
    service = Service(settings, answering, Guard(settings.tokens), metrics, worker)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        answering.start()
        if worker is not None:
            worker.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(answering.stop)
            if worker is not None:
                await anyio.to_thread.run_sync(worker.stop)

    # Swagger's pages load their scripts from elsewhere: the description itself is at /openapi.json.
    app = FastAPI(title="lmeraser_jax", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    problems.install(app, settings.layout)
    for module in (predictions, erasures, reading, pages):
        app.include_router(module.router(service))
    local_only = settings.tokens is None
    app.add_middleware(Gate, limits=settings.limits, guard=service.guard, metrics=metrics, local_only=local_only)
    return app


def serve(settings: Settings, host: str, port: int, certificate: str = "", key: str = "") -> None:
    """Runs the service until SIGTERM or Ctrl+C. TLS with a certificate and its key in PEM files."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    problems.log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    make_server(settings, host, port, certificate, key).run()


def make_server(settings: Settings, host: str, port: int, certificate: str = "", key: str = "") -> uvicorn.Server:
    """The server of a service, which its `run` runs."""
    config = uvicorn.Config(
        create_app(settings),
        host=host,
        port=port,
        http=protocol_of(settings.limits),
        ws="none",
        log_config=None,
        access_log=False,  # it would hold the ids in paths
        server_header=False,
        limit_concurrency=settings.limits.connections,
        timeout_graceful_shutdown=GRACE,
        ssl_certfile=certificate or None,
        ssl_keyfile=key or None,
    )
    return uvicorn.Server(config)
