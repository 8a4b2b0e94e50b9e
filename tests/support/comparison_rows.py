"""Rows of comparisons: plain ones to change, and recorded ones of real comparisons."""

import dataclasses
from pathlib import Path

from lmeraser_jax.experiments import methods, results
from lmeraser_jax.experiments.results import Measurement, Results

RECORDED = Path(__file__).resolve().parents[2] / "docs" / "results" / "digits" / "results.json"
TITLES = {method.name: method.title for method in methods.METHODS.values()} | {"cifar10": "CIFAR-10"}


def row(**changes) -> Measurement:
    """A row with plain values where nothing else is said."""
    plain = Measurement(
        experiment="methods",
        dataset="cifar10",
        backbone="vit-b-22k",
        method="lmeraser",
        seed=0,
        records=100,
        clusters=4,
        accuracy=0.9,
        balanced=0.8,
        images_full=1000,
        images_request=50.0,
        seconds_request=0.5,
    )
    return dataclasses.replace(plain, **changes)


def recorded() -> Results:
    """A real comparison: every experiment on digits with the methods' rows of five seeds."""
    return results.load(RECORDED)
