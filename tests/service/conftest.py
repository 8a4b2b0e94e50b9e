"""Workdirs to serve, in folders whose name no answer may hold, and one server for each module."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, serving

PLACE = "it's a secret place"  # a shell quotes the beginning, and the end stays readable


@pytest.fixture
def workdir(fast_workdir, tmp_path) -> Path:
    """A copy of the workdir that was trained with the stand-ins, for one test to change."""
    return Path(shutil.move(fast_workdir, tmp_path / PLACE / "run"))


@pytest.fixture
def real_workdir(trained_template, tmp_path) -> Path:
    """A copy of the workdir that was trained with the real program, for one test to change."""
    return Path(shutil.copytree(trained_template, tmp_path / PLACE / "run"))


@pytest.fixture(scope="module")
def server(fast, fast_template, tmp_path_factory) -> Iterator[Server]:
    """A server without tokens, whose requests wait until a test calls `settle`."""
    root = shutil.copytree(fast_template, tmp_path_factory.mktemp(PLACE) / "run")
    with serving(root) as running:
        yield running
