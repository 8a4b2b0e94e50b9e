"""What the command and the parts of the GPU suite share. Importing it loads no JAX."""

import dataclasses
from typing import Any


class Unavailable(Exception):
    """A part cannot be measured on this machine; says what it needs."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of every part."""

    quick: bool = False  # tiny networks and short rounds
    vit: str = ""  # file or folder of a ViT-B/16's weights; empty: random
    swin: str = ""  # Hugging Face folder of a Swin-B's; empty: random

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)
