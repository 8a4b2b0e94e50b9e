"""What can be read of a service: its model, whether it is well, whether all receipts hold, and its figures."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from lmeraser_jax import __version__
from lmeraser_jax.evaluation.overview import overview
from lmeraser_jax.service.auth import Caller
from lmeraser_jax.service.context import Service
from lmeraser_jax.service.problems import Problem
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import verify
from lmeraser_jax.unlearning.receipts import iso_time


def router(service: Service) -> APIRouter:
    """The routes that read."""
    routes, reads = APIRouter(), service.guard.require("read")

    @routes.get("/v1/model", tags=["reading"])
    def _(_: Annotated[Caller, Depends(reads)]) -> dict[str, Any]:
        """The published state: its manifest, clusters and their sizes, backbone, program, and counts of records."""
        with service.catalog() as catalog:
            return describe_model(service, catalog)

    @routes.get("/v1/receipts/verify", tags=["reading"])
    def _(_: Annotated[Caller, Depends(reads)]) -> dict[str, Any]:
        """Whether all receipts are unchanged and in their place, and what they say still holds."""
        with service.catalog() as catalog:
            verdicts = check_receipts(service, catalog)
        fields = ("ok", "request", "signature", "findings", "notes")
        rows = [{name: getattr(each, name) for name in fields} for each in verdicts]
        return {"ok": all(each.ok for each in verdicts), "verdicts": rows}

    @routes.get("/healthz", tags=["probes"], response_class=PlainTextResponse)
    async def _() -> str:
        """200 as long as the process works; 503 when it should be started again."""
        if not service.answering.alive:
            raise Problem(503, "the thread that has the devices has ended")
        return "ok"

    @routes.get("/readyz", tags=["probes"], response_class=PlainTextResponse)
    async def _() -> str:
        """200 once predictions are answered; 503 with the reason before."""
        if service.answering.problem:
            raise Problem(503, service.answering.problem)
        return "ready"

    @routes.get("/metrics", tags=["probes"])
    def _(_: Annotated[Caller, Depends(reads)]) -> Response:
        """Figures for Prometheus."""
        with service.catalog() as catalog:
            return Response(service.metrics.text(catalog), media_type=CONTENT_TYPE_LATEST)

    return routes


def describe_model(service: Service, catalog: Catalog) -> dict[str, Any]:
    """The published state as JSON. Raises `UserError` where nothing is published."""
    state = overview(service.settings.layout, catalog, service.settings.config)
    fields = ("key", "members", "sampled", "approximate", "quarantined")
    return {
        "program": f"lmeraser_jax {__version__}",
        "task": "language" if service.settings.config.is_text else "images",
        "manifest": state.version,
        "published": iso_time(state.published),
        "fingerprint": json.loads(state.fingerprint),
        "backbone": state.backbone,
        "classes": [row.name for row in state.classes],
        "records": {"live": state.records, "erased": requests.count_erased(catalog)},
        "clusters": [{name: getattr(row, name) for name in fields} for row in state.clusters],
        "expected_share": state.expected_share,
        "sampled_share": state.sampled_share,
        "open_requests": state.open_requests,
        "worker": describe_worker(service),
    }


def describe_worker(service: Service) -> dict[str, Any]:
    """Whether requests are being served, and by which policy."""
    worker = service.worker
    alive, problem = (False, "the workdir cannot be written") if worker is None else (worker.alive, worker.problem)
    return {"alive": alive, "problem": problem, **dataclasses.asdict(service.settings.policy)}


def check_receipts(service: Service, catalog: Catalog, request: str = "") -> list[verify.Verdict]:
    """Verdicts without the workdir's path, on everything in the folder of receipts, or on the receipt of a request."""
    layout, keys = service.settings.layout, service.settings.public_keys
    if request:
        verdicts = verify.verify_request(layout, catalog, request, keys)
    else:
        verdicts = verify.verify_all(layout, catalog, keys)
    return [_without_path(layout, verdict) for verdict in verdicts]


def _without_path(layout: Layout, verdict: verify.Verdict) -> verify.Verdict:
    root, fields = str(layout.root), ("findings", "notes")
    texts = {name: tuple(text.replace(root, "the workdir") for text in getattr(verdict, name)) for name in fields}
    return dataclasses.replace(verdict, name=Path(verdict.name).name, **texts)
