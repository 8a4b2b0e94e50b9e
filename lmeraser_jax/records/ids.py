"""Ids that look alike."""

import unicodedata
from collections.abc import Iterable


def lookalikes(unknown: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """{unknown id: a known id that is equal to it up to case and compatible Unicode forms}."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFKC", name).casefold()

    wanted = {plain(name): name for name in unknown}
    return {wanted[plain(name)]: name for name in known if plain(name) in wanted}
