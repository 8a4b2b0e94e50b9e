"""Windows of erasure requests drawn at random, beside the formulas of `theory`, and a picture of both.

Only who is named is drawn. Clusters hit, new clusterings and lanes are then counted, not computed from probabilities.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.evaluation import plotting
from lmeraser_jax.experiments import cost_model
from lmeraser_jax.experiments.cost_model import Batch, Clusters, Machine
from lmeraser_jax.hashing import philox
from lmeraser_jax.progress import progress

WINDOWS = 2000
DRAWN = 20_000_000  # windows x clusters of a quick answer
PIECE = 2_000_000  # windows x clusters drawn at a time
ENDS = (2.5, 97.5)  # percentiles of the 95 % band


@dataclasses.dataclass(frozen=True)
class Band:
    """A quantity over all windows: 95 % of them lie in `low` to `high`, its mean is known to +- `error` (95 %)."""

    mean: float
    std: float
    low: float
    high: float
    error: float


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What the drawn windows cost, empty ones included.

    Attributes:
        windows: how many were drawn.
        affected: K_affected, clusters with a named member.
        retuned: those and the ones that a new clustering changed.
        images: passed forward and backward.
        seconds: until the last lane ends, packed without a gap.
        reclustered: share of the windows with a new clustering.
    """

    windows: int
    affected: Band
    retuned: Band
    images: Band
    seconds: Band
    reclustered: float


def simulate(
    clusters: Clusters,
    batch: Batch,
    windows: int = WINDOWS,
    seed: int = 0,
    changed: float = 1.0,
    machine: Machine = Machine(),  # noqa: B008
) -> Simulated:
    """Draws windows and counts; the same arguments give the same numbers.

    Args:
        clusters: K clusters.
        batch: the requests of a window.
        windows: how many to draw.
        seed: of the Philox streams, one for each piece of windows.
        changed: probability that a new clustering changes a cluster whose members stay.
        machine: that tunes.
    """
    size = max(1, PIECE // len(clusters.members))
    found = []
    for start in range(0, windows, size):
        rng = philox(seed, "windows", repr(batch), str(start))
        found.append(_counted(clusters, batch, min(size, windows - start), rng, changed, machine))
    *quantities, again = np.concatenate(found, axis=1)
    return Simulated(windows, *map(_band, quantities), reclustered=float(again.mean()))


def _counted(
    clusters: Clusters, batch: Batch, windows: int, rng: np.random.Generator, changed: float, machine: Machine
) -> np.ndarray:
    """float64 [5, windows]: clusters affected, clusters re-tuned, images, seconds, 1 for a new clustering."""
    share = np.concatenate([clusters.members - clusters.sampled, clusters.sampled]) / clusters.records
    if batch.fixed:
        named = rng.multinomial(int(batch.requests), share, size=windows)
    else:
        named = rng.poisson(batch.requests * share, size=(windows, len(share)))
    unsampled, sampled = np.split(named > 0, 2, axis=1)  # [windows, K] each
    hit, again = unsampled | sampled, np.any(sampled, axis=1)
    retuned = hit | (again[:, None] & (rng.random(hit.shape) < changed))
    images = retuned * clusters.images
    seconds = cost_model.makespan(images, machine.lanes) / machine.lane_speed
    return np.stack([hit.sum(1), retuned.sum(1), images.sum(1), seconds, again]).astype(np.float64)


def _band(values: np.ndarray) -> Band:
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    low, high = np.percentile(values, ENDS)
    return Band(float(values.mean()), std, float(low), float(high), 1.96 * std / len(values) ** 0.5)


def windows_for(clusters: Clusters) -> int:
    """As many windows as are drawn in seconds."""
    return int(np.clip(DRAWN // len(clusters.members), 100, WINDOWS))


class _Panel(NamedTuple):
    """One quantity over lambda T."""

    title: str
    formula: list[float]
    bands: list[Band]
    scale: float  # of the bands
    paper: Mapping[str, Any]  # the paper's lines by name


def figure(
    path: str | Path,
    clusters: Clusters,
    requests: Sequence[float],
    changed: float = 1.0,
    machine: Machine = Machine(),  # noqa: B008
) -> None:
    """Draws clusters, images and seconds of a window over lambda T: formula, simulated 95 % band, the paper's formula.

    Args:
        path: the picture; its ending says the format (.png, .svg, .pdf).
        clusters, changed, machine: see `simulate`.
        requests: values of lambda T.

    Raises:
        UserError: matplotlib is not installed.
    """
    batches, found = [Batch(count) for count in requests], []
    with progress("windows", len(batches)) as shown:
        for batch in batches:
            found.append(simulate(clusters, batch, windows_for(clusters), 0, changed, machine))
            shown.advance(1)
    _draw(path, requests, _panels(clusters, batches, found, changed, machine))


def _panels(
    clusters: Clusters, batches: list[Batch], found: list[Simulated], changed: float, machine: Machine
) -> list[_Panel]:
    full, mean = float(clusters.images.sum()), float(clusters.images.mean())
    affected = np.array([cost_model.expected_affected(clusters.members, batch) for batch in batches])
    bound = [min(cost_model.affected_bound(batch), len(clusters.members)) for batch in batches]
    single = mean / machine.lane_speed  # T_c
    longest = [cost_model.expected_makespan(clusters, batch, changed, machine.lanes) for batch in batches]
    return [
        _Panel(
            "clusters tuned again",
            [cost_model.expected_retuned(clusters, batch, changed) for batch in batches],
            [one.retuned for one in found],
            1.0,
            {"paper, Eq. 9": affected, "paper, Eq. 10 (at most K)": bound},
        ),
        _Panel(
            "share of all images",
            [cost_model.expected_images(clusters, batch, changed) / full for batch in batches],
            [one.images for one in found],
            1 / full,
            {"paper, Eq. 9 x mean size": affected * mean / full},
        ),
        _Panel(
            "seconds",
            [images / machine.lane_speed for images in longest],
            [one.seconds for one in found],
            1.0,
            {"paper, Eq. 19": [cost_model.expected_time(single, batch) for batch in batches]},
        ),
    ]


@plotting.styled
def _draw(path: str | Path, requests: Sequence[float], panels: Sequence[_Panel]) -> None:
    from matplotlib.ticker import LogFormatter

    whole = plotting.blank(13, 5)
    for axes, panel in zip(whole.subplots(1, len(panels)), panels, strict=True):
        low, mean, high = (
            panel.scale * np.array([getattr(band, name) for band in panel.bands]) for name in ("low", "mean", "high")
        )
        axes.fill_between(requests, low, high, alpha=0.25, label="simulated, 95 % of the windows")
        axes.plot(requests, mean, ".", label="simulated, mean")
        axes.plot(requests, panel.formula, label="formula")
        for (name, line), style in zip(panel.paper.items(), ("--", ":")):
            axes.plot(requests, line, style, color="black", label=name)
        axes.set(xscale="log", xlabel="expected requests of a window", title=panel.title, ylim=(0, None))
        axes.xaxis.set_major_formatter(plotting.ticked)
        axes.xaxis.set_minor_formatter(LogFormatter())  # where a decade is all there is
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    plotting.save(whole, path)
