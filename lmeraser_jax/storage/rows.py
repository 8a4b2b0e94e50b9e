"""Rows of the catalog that others work with: trained slices and published states."""

import enum
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class SliceKind(enum.StrEnum):
    """What stands in the place of a cluster's key for a slice that belongs to no single cluster."""

    COMMON = "common"  # the head of all private records


class Edit(NamedTuple):
    """The corrected version of a record, which takes its place."""

    id: str
    label: int
    content: str  # content hash
    row: np.ndarray  # uint8 [h, w, c], an image, or int32 [2 + T], text


class SliceRow(NamedTuple):
    """What the catalog knows of one trained slice."""

    digest: str
    cluster: str
    params_digest: str  # digest of the parameters' bytes
    size: int  # members
    images: int  # passed forward and backward
    steps: int
    loss: float | None  # mean over the last epoch
    seconds: float  # of device time: its share of what all devices of the process spent
    fingerprint: str  # of the program that made it
    created: float
    tuning: str = ""  # the settings, as canonical JSON
    clustering: str = ""  # the last one that called for it


class Manifest(NamedTuple):
    """A published state."""

    version: int
    created: float
    clustering: str  # its digest
    fingerprint: str  # of the program
    recipe_constants_digest: str  # of everything but the members that a recipe depends on
    entries: dict[str, str]  # {cluster key: slice reference}

    @property
    def clusters(self) -> dict[str, str]:
        """The entries without the common head."""
        return {key: ref for key, ref in self.entries.items() if key != SliceKind.COMMON}


class ReceiptLink(NamedTuple):
    """A receipt's place in the chain."""

    sequence: int  # 1, 2, ...
    request: str
    digest: str


def images_of(slices: Mapping[str, SliceRow], ref: str) -> int:
    """Images passed for a slice, "digest" or "digest@step"; 0 for one that the catalog does not know."""
    row = slices.get(ref.partition("@")[0])
    return row.images if row is not None else 0
