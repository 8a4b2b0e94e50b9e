"""Names for things: canonical JSON, digests, keyed hashes, and random streams derived from names.

Nothing here threads a random state: every order, draw and seed is a function of a run's seed and the
name of what it is for, so that one cluster can be made again without any other.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_strict_json(text: str) -> Any:
    """The values in a JSON text that somebody else wrote: it has one meaning or is refused.

    Raises:
        ValueError: no JSON, a key that occurs twice in an object, NaN or infinity, half a character, numbers of
            thousands of digits, or nested so deeply that Python gives up.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key occurs twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        return values
    except RecursionError:
        raise ValueError("nested too deeply") from None


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of arrays, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        sha.update(_form(name, array.dtype, array.shape))
        sha.update(array.tobytes())
    return sha.hexdigest()


@functools.lru_cache(maxsize=1024)  # thousands of slices have the same arrays
def _form(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    return canonical_json([name, str(dtype), shape]).encode()


def keyed_hash(seed: int | str, *names: str) -> bytes:
    """16 bytes that depend on the seed and on every name (BLAKE2b; names are length-prefixed)."""
    sha = hashlib.blake2b(digest_size=16)
    for name in (str(seed), *names):
        raw = name.encode()
        sha.update(len(raw).to_bytes(8, "little") + raw)
    return sha.digest()


def philox(seed: int, *names: str) -> np.random.Generator:
    """A counter-based NumPy generator keyed by the seed and the names."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(keyed_hash(seed, *names), "little")))


def seed_words(name: str) -> np.ndarray:
    """Two uint32 words that stand for a name on the device; `jax.random.fold_in` takes them one by one."""
    return np.frombuffer(keyed_hash("words", name)[:8], np.uint32)
