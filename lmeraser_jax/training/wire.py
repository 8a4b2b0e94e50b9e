"""Messages between processes: dataclasses as JSON, arrays as their bytes. No pickles: what is read can run no code.

A message is a frame of JSON, [value, [[dtype, shape], ...]], and a frame of bytes for each array. In the value a
dataclass is {its name: {field: value}}, an array {"array": its place}. Whoever opens a message says which dataclasses
it expects, and every value must be of the type that its field is declared with.
"""

import contextlib
import dataclasses
import functools
import json
import math
import types
import typing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmeraser_jax.errors import UserError

if TYPE_CHECKING:  # help and typing errors are answered without it
    import numpy as np

HEAD_BYTES = 1 << 26  # thousands of slices to tune are a few MiB
ARRAY_BYTES = 1 << 35  # all arrays of a message
DTYPES = frozenset({"uint8", "int32", "int64", "float32"})
SCALARS = (bool, int, float, str, types.NoneType)
DIGITS = 18  # of a whole number that is a key


class Malformed(UserError):
    """What came is no message, or none of those expected."""

    def __init__(self, what: str):
        super().__init__(f"a message cannot be read ({what}); is the same version installed everywhere?")


@dataclasses.dataclass(frozen=True, eq=False)
class Sealed:
    """A message as it came: {name: {field: value}}, and its arrays."""

    value: dict[str, dict[str, Any]]
    arrays: "list[np.ndarray]"

    @property
    def name(self) -> str:
        """Of its dataclass."""
        return next(iter(self.value))

    def open(self, *kinds: type) -> Any:
        """The message, an instance of one of the dataclasses. Its arrays are read-only.

        Raises:
            Malformed: it is none of these, or a value is not of its field's type.
        """
        kind = {kind.__name__: kind for kind in kinds}.get(self.name)
        if kind is None:
            raise Malformed(f"{ascii(self.name)[:80]} is not expected")
        return _built(kind, self.value, self.arrays)


def send(connection: Connection, message: object) -> None:
    """Sends a dataclass. Its fields hold scalars, paths and arrays, and tuples, dicts and dataclasses of them."""
    arrays: list[np.ndarray] = []
    value = _plain(message, arrays)
    connection.send_bytes(json.dumps([value, [[str(leaf.dtype), leaf.shape] for leaf in arrays]]).encode())
    for leaf in arrays:
        connection.send_bytes(leaf.tobytes())


def receive(connection: Connection) -> Sealed:
    """Reads a message.

    Raises:
        Malformed: it is none.
        EOFError, OSError: the connection ended, or a frame is longer than it may be.
    """
    import numpy as np

    try:
        value, described = json.loads(connection.recv_bytes(HEAD_BYTES))
        sizes = [_size(dtype, shape) for dtype, shape in described]
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(str(error)[:200]) from error
    if not (isinstance(value, dict) and len(value) == 1 and all(isinstance(fields, dict) for fields in value.values())):
        raise Malformed("its head names no fields")
    if sum(sizes) > ARRAY_BYTES:
        raise Malformed(f"arrays of {sum(sizes)} bytes")
    arrays = []
    for (dtype, shape), size in zip(described, sizes, strict=True):
        raw = connection.recv_bytes(size)
        if len(raw) != size:
            raise Malformed(f"{len(raw)} of {size} bytes of an array")
        arrays.append(np.frombuffer(raw, dtype).reshape(shape))
    return Sealed(value, arrays)


def _size(dtype: object, shape: Any) -> int:
    """Bytes of an array. Raises ValueError where that is described as none of ours."""
    import numpy as np

    if dtype not in DTYPES or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"{ascii([dtype, shape])[:80]} is no array")
    return math.prod(shape) * np.dtype(str(dtype)).itemsize


def _plain(value: Any, arrays: "list[np.ndarray]") -> Any:
    """A value as JSON has it; arrays are collected."""
    import numpy as np

    fields = _fields(type(value))
    if fields is not None:
        return {type(value).__name__: {name: _plain(getattr(value, name), arrays) for name in fields}}
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, tuple):
        return [_plain(one, arrays) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one, arrays) for name, one in value.items()}
    return str(value) if isinstance(value, Path) else value


def _built(kind: Any, value: Any, arrays: "list[np.ndarray]") -> Any:
    """The inverse of `_plain` for a value that must be of a kind. Raises `Malformed` where it is not."""
    import numpy as np

    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for one in inner:
            with contextlib.suppress(Malformed):
                return _built(one, value, arrays)
    if kind in SCALARS and type(value) is kind or origin is typing.Literal and value in inner:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) == len(value):
            return tuple(_built(one, part, arrays) for one, part in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        if inner[0] is str or all(name.isdecimal() and len(name) <= DIGITS for name in value):
            return {inner[0](name): _built(inner[1], part, arrays) for name, part in value.items()}
    name, content = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)
    if kind is np.ndarray and name == "array" and type(content) is int and 0 <= content < len(arrays):
        return arrays[content]
    fields = _fields(kind)
    if fields is not None and name == kind.__name__ and isinstance(content, dict) and content.keys() == fields.keys():
        return kind(**{name: _built(fields[name], part, arrays) for name, part in content.items()})
    raise Malformed(f"{ascii(value)[:80]} is no {getattr(kind, '__name__', kind)}")


@functools.cache
def _fields(kind: Any) -> dict[str, Any] | None:
    """{field: type} of a dataclass or a NamedTuple; None of everything else."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return typing.get_type_hints(kind) if hasattr(kind, "_fields") else None
