"""JSON from others: one meaning or none."""

import json
from typing import Any


def loads(text: str) -> Any:
    """The values in a JSON text.

    Raises:
        ValueError: no JSON, a key that occurs twice in an object, NaN or infinity, half a character, numbers of
            thousands of digits, or nested so deeply that Python gives up.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        return values
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found
