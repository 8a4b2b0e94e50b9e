"""What a service is given: its workdir, its limits, and when its worker serves requests."""

import dataclasses
import os
from pathlib import Path

from lmeraser_jax.config import Config
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning.signatures import PublicKeys


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a call may ask for; beyond it a problem document says so."""

    body: int = 32 << 20  # bytes of a request
    inputs: int = 64  # images or queries of a call
    queue: int = 512  # images or queries that wait for the devices
    tokens: int = 256  # most new tokens of a response
    seconds: float = 60.0  # for a request to arrive, and again for its answer
    connections: int = 256  # at the same time


@dataclasses.dataclass(frozen=True)
class Policy:
    """When waiting requests are served; None: no such limit. Without any, at once."""

    max_wait: float | None = None  # seconds since the oldest was accepted
    max_batch: int | None = None  # requests


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one service."""

    layout: Layout
    config: Config
    limits: Limits = Limits()
    policy: Policy = Policy()
    tokens: Path | None = None  # file of tokens; None: everyone who reaches the service may do everything
    signing_key: Path | None = None  # signs the receipts of the requests that the worker serves
    public_keys: PublicKeys = dataclasses.field(default_factory=dict)  # that receipts must be signed with, if any

    @property
    def serves_requests(self) -> bool:
        """Whether a worker serves requests: nobody can where the workdir cannot be written."""
        return os.access(self.layout.root, os.W_OK)
