"""The console: pages for the person in charge, rendered here; no script and nothing from elsewhere."""

from fastapi import APIRouter

from lmeraser_jax.service.context import Service


def router(service: Service) -> APIRouter:
    """The pages."""
    return APIRouter(include_in_schema=False)
