"""Packed slices: all slices of a published state in one file, which readers map into memory instead of reading folders.

A safetensors file. Slices of one form (names and shapes of their arrays) are the float32 rows [K, n] of one tensor: a
row has the arrays of a slice, end to end. The file has no digest of its own: whoever reads a slice compares the digest
of its arrays with the catalog's, as with a checkpoint, so that no byte is used that is not checked, or checked twice.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.errors import Damaged
from lmeraser_jax.storage.atomic_files import entries, write_pieces

ALIGNED = 8  # safetensors: the length of the header is a multiple of so many bytes
Arrays = Mapping[str, np.ndarray]


class Stack(NamedTuple):
    """Slices of one form."""

    places: Mapping[str, int]  # {reference: k}
    arrays: Arrays  # {name: float32 [K, ...]}, memory-mapped

    def slice(self, ref: str) -> dict[str, np.ndarray]:
        """The arrays of one slice, by name."""
        return {name: leaf[self.places[ref]] for name, leaf in self.arrays.items()}


def write(path: Path, slices: Mapping[str, Arrays]) -> None:
    """Replaces a file in one step by one with these slices, {reference: float32 arrays by name}."""
    forms: dict[tuple[tuple[str, tuple[int, ...]], ...], list[str]] = {}
    for ref in sorted(slices):
        forms.setdefault(tuple((name, slices[ref][name].shape) for name in sorted(slices[ref])), []).append(ref)
    header: dict[str, Any] = {"__metadata__": {}}
    end = 0
    for number, (form, refs) in enumerate(forms.items()):
        numbers = sum(math.prod(shape) for _, shape in form)
        start, end = end, end + 4 * numbers * len(refs)
        header[str(number)] = {"dtype": "F32", "shape": [len(refs), numbers], "data_offsets": [start, end]}
        header["__metadata__"][str(number)] = json.dumps({"slices": refs, "arrays": form})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for form, refs in forms.items():
            for ref in refs:
                yield np.concatenate([slices[ref][name].ravel() for name, _ in form], dtype="<f4").tobytes()

    write_pieces(path, pieces())


def read(path: Path) -> list[Stack]:
    """Maps a file; looks at its header alone.

    Raises:
        Damaged: it is missing, or something else than was written.
        OSError: it cannot be read now.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("it is shorter than its header says")
            header = json.loads(file.read(size))
            numbers = np.asarray(np.memmap(file, "<f4", "r", offset=8 + size))
        return [_stack(numbers, header[key], json.loads(text)) for key, text in header["__metadata__"].items()]
    except FileNotFoundError as error:
        raise Damaged(f"{path} does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error


def _stack(numbers: np.ndarray, tensor: Mapping[str, Any], form: Mapping[str, Any]) -> Stack:
    start, end = tensor["data_offsets"]
    rows = numbers[start // 4 : end // 4].reshape(tensor["shape"])  # [K, n]
    arrays, column = {}, 0
    for name, shape in form["arrays"]:
        width = math.prod(shape)
        arrays[name] = rows[:, column : column + width].reshape(len(rows), *shape)  # a view
        column += width
    places = {ref: place for place, ref in enumerate(form["slices"])}
    if (len(places), column) != rows.shape:
        raise ValueError(f"{len(places)} slices of {column} numbers are not {list(rows.shape)}")
    return Stack(places, arrays)


def references(folder: Path) -> set[str]:
    """The references of all slices in the packed files of a folder, as far as their headers can be read."""
    names: set[str] = set()
    for path in entries(folder):
        with contextlib.suppress(Damaged):
            names.update(*(stack.places for stack in read(path)))
    return names
