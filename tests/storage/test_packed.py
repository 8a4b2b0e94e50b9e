"""Packed slices: a file that safetensors reads too, with the bits of every slice, mapped and not copied."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lmeraser_jax.errors import Damaged
from lmeraser_jax.storage import packed

SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=3)


@st.composite
def states(draw):
    """Slices of one to three forms: {reference: arrays}."""
    slices = {}
    for number, shapes in enumerate(draw(st.lists(SHAPES, min_size=1, max_size=3))):
        for k in range(draw(st.integers(1, 3))):
            rng = np.random.default_rng([number, k])
            arrays = {f"leaf{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}
            slices[f"{number}-{k}"] = arrays
    return slices


@given(states())
def test_every_slice_has_its_bits(tmp_path, slices):
    path = tmp_path / "packed"
    packed.write(path, slices)
    stacks = packed.read(path)
    assert {ref for stack in stacks for ref in stack.places} == slices.keys() == packed.references(tmp_path)
    for stack in stacks:
        for ref in stack.places:
            restored = stack.slice(ref)
            assert restored.keys() == slices[ref].keys()
            for name, leaf in slices[ref].items():
                assert restored[name].dtype == np.float32 and restored[name].tobytes() == leaf.tobytes()
                assert restored[name].shape == leaf.shape


@given(states())
def test_safetensors_reads_the_file(tmp_path, slices):
    """An independent reader finds the same numbers, row by row."""
    path = tmp_path / "packed"
    packed.write(path, slices)
    with safe_open(path, "np") as file:
        rows = {tuple(row.tolist()) for name in file.keys() for row in file.get_tensor(name)}
    flat = {
        tuple(np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).tolist()) for arrays in slices.values()
    }
    assert rows == flat


def test_a_file_that_is_cut_or_no_packed_file_is_damaged(tmp_path):
    path = tmp_path / "packed"
    with pytest.raises(Damaged, match="does not exist"):
        packed.read(path)
    packed.write(path, {"a": {"w": np.ones(5, np.float32)}, "b": {"w": np.zeros(5, np.float32)}})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            packed.read(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(Damaged, match="shorter than its header says"):
        packed.read(path)
    assert packed.references(tmp_path) == set()
