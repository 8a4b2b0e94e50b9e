"""The experiments of a comparison. Each takes a workdir of its own and yields its rows in order.

A workdir begins as a copy of one that has the images, the backbone and no slice yet. What was interrupted carries on:
slices that are there are not made again.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.evaluation import montage, overview
from lmeraser_jax.evaluation.accuracy import evaluate
from lmeraser_jax.evaluation.predict import Model, load_model, with_slices
from lmeraser_jax.experiments import sequences
from lmeraser_jax.experiments.costs import passes, planned, seconds_spent, served, sizes
from lmeraser_jax.experiments.methods import Method
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.hashing import digest, philox
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.rows import SliceRow
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import reference
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import Run, prepare_run

REMOVED = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of the records (paper, Fig. 6 left)
MONTAGE = "clusters.png"
SNAPSHOTS = 5  # points of an accuracy over epochs, beside the last
EVERY = 10**6  # snapshots of a slice that are kept: all, at most one a step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured of each method.

    Attributes:
        dataset, backbone: names for people.
        probes: records whose erasure is planned.
        split: images that are asked about: test, or holdout to choose settings by.
        requests: erasures that are really served and timed, of records that are sampled and of such that are not; one
            of each where every request makes everything again.
        cuts: values of clustering.cut.
        sequences: kinds of sequences.
        length: batches of a sequence.
        montage: draw the clusters of the first method of the first seed (Fig. 10); the picture shows private images.
    """

    dataset: str
    backbone: str
    split: str = "test"
    probes: int = 100
    requests: int = 2
    cuts: tuple[str, ...] = ()
    sequences: tuple[str, ...] = tuple(sequences.KINDS)
    length: int = 10
    montage: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """One workdir's worth of work: an experiment with a method and a seed.

    Attributes:
        experiment: one of `EXPERIMENTS`.
        method: the method.
        seed: of the run.
        variant: a cut or a kind of sequence; "" elsewhere.
        config: the experiment file's config with the method's changes and the seed.
    """

    experiment: str
    method: Method
    seed: int
    variant: str
    config: Config

    @property
    def name(self) -> str:
        """Names its folder and its rows: rows of a task are there all together or not at all."""
        parts = (self.experiment, self.method.name, str(self.seed), self.variant.replace(":", "-").replace("/", "-"))
        return "_".join(part for part in parts if part)

    @property
    def settings(self) -> str:
        """Names all settings that its rows depend on."""
        return digest(settings.to_dict(self.config))

    @property
    def tunes(self) -> str:
        """Names what is tuned: tasks of the same name differ in who answers and in what is measured only."""
        tree = settings.to_dict(self.config)
        del tree["inference"], tree["common"]
        return digest(tree)[:16]


def tasks(experiment: str, method: Method, seed: int, config: Config, plan: Plan) -> list[Task]:
    """The tasks of an experiment with one method and seed."""
    changed = method.of(dataclasses.replace(config, seed=seed))
    variants = {"cut": plan.cuts, "sequence": plan.sequences}.get(experiment, ("",))
    found = []
    for variant in variants:
        own = changed
        if experiment == "cut":
            own = dataclasses.replace(own, clustering=dataclasses.replace(own.clustering, cut=variant))
        if experiment == "epochs":
            every = max(1, own.tuning.epochs // (SNAPSHOTS + 1))
            own = dataclasses.replace(
                own, checkpoints=dataclasses.replace(own.checkpoints, every_epochs=every, keep=EVERY)
            )
        found.append(Task(experiment, method, seed, variant, own))
    return found


def rows(task: Task, plan: Plan, base: Path, folder: Path, tuned: Path | None = None) -> list[Measurement]:
    """Does a task in a folder, which begins as a copy of `base` and is left as the task leaves it.

    Args:
        task, plan: what to measure.
        base: a workdir with images and a backbone.
        folder: the task's workdir.
        tuned: where other tasks that tune the same find the tuned workdir, or put it; None if there are none.
    """
    if folder.exists() and _asked(folder, task):
        shutil.rmtree(folder)  # killed after its first erasure: the state before is what is to be measured
    if not folder.exists():
        _copy(tuned if tuned is not None and tuned.exists() else base, folder)
    with prepare_run(folder, task.config, retune=True) as (run, _):  # the common head may be another
        build(run)
        picture = base.parent / MONTAGE
        if plan.montage and task.experiment == "methods" and not picture.exists():
            montage.save_montage(run, picture)
    if tuned is not None and not tuned.exists():
        _copy(folder, tuned)
    with prepare_run(folder, task.config) as (run, _):
        return list(EXPERIMENTS[task.experiment](run, task, plan))


def _copy(source: Path, target: Path) -> None:
    """The target is there completely or not at all."""
    making = target.with_name(f".{target.name}.copy")
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(source, making)
    making.rename(target)


def _asked(folder: Path, task: Task) -> bool:
    with prepare_run(folder, task.config, retune=True) as (run, _):
        return bool(requests.listed(run.catalog))


def _measured(run: Run, task: Task, plan: Plan, model: Model | None = None, **others: object) -> Measurement:
    """A row of the published state, or of what `model` holds, without what requests cost."""
    found, made = evaluate(run, plan.split, linear=False, model=model), run.catalog.slices()
    shown, (own, common) = overview.overview(run.layout, run.catalog, run.config), sizes(run)
    slices = len({cluster.slice for cluster in shown.clusters})
    facts = {
        "experiment": task.experiment,
        "dataset": plan.dataset,
        "backbone": plan.backbone,
        "method": task.method.name,
        "seed": task.seed,
        "records": shown.records["train"],
        "clusters": len(shown.clusters),
        "accuracy": found.accuracy,
        "balanced": found.balanced,
        "majority": found.majority,
        "images_full": 0 if run.tuning_spec.on_features else sum(row.images for row in made.values()),
        "parameters": own * slices + common,
        "expected_share": shown.expected_share,
        "sampled_share": shown.sampled_share,
        "tested": found.images,
        "passes": passes(run, len(shown.clusters)),
    }
    return Measurement(**(facts | others))  # pyright: ignore[reportArgumentType]


def methods(run: Run, task: Task, plan: Plan) -> Iterator[Measurement]:
    """Accuracy, and what a request costs: planned for many records, served for a few (Figs. 3, 7, Table 3)."""
    spent, row, costs = seconds_spent(run), _measured(run, task, plan), planned(run, plan.probes)
    images = costs.images * (not run.tuning_spec.on_features)
    everything = row.images_full > 0 and images.min() > 0.999 * row.images_full * (1 - 1 / row.records)
    found = served(run, min(plan.requests, 1) if everything else plan.requests)  # such a one lasts long, and all alike
    yield dataclasses.replace(
        row,
        seconds_full=spent,
        images_request=float(images.mean()),
        images_worst=float(images.max()),
        records_request=float(costs.records.mean()),
        parameters_request=float(costs.parameters.mean()),
        seconds_request=(1 - row.sampled_share) * found.unsampled + row.sampled_share * found.sampled,
        seconds_unsampled=found.unsampled,
        seconds_sampled=found.sampled,
    )


def removal(run: Run, task: Task, plan: Plan) -> Iterator[Measurement]:
    """Accuracy while more and more records are erased (Fig. 6 left)."""
    ids = run.catalog.live("train").ids
    order, gone = philox(run.config.seed, "removal").permutation(len(ids)), 0
    yield _measured(run, task, plan)
    for share in REMOVED:
        upto = round(share * len(ids))
        erase.request_erasure(run, [ids[i] for i in order[gone:upto]])
        gone = upto
        yield _measured(run, task, plan, x=share)


def cut(run: Run, task: Task, plan: Plan) -> Iterator[Measurement]:
    """Accuracy and number of prompts for a cut of the tree (Fig. 6 right)."""
    yield _measured(run, task, plan, x=float(task.variant.removeprefix("auto:")), series=_axis(task.variant))


def _axis(text: str) -> str:
    return "K" if text.startswith("auto:") else "threshold"


def epochs(run: Run, task: Task, plan: Plan) -> Iterator[Measurement]:
    """Accuracy over the epochs of tuning, from the snapshots of every cluster (Fig. 5).

    After x of e epochs a cluster is as it was after x / e of its own steps, which `tuning.min_steps` makes more for a
    small one; the snapshot nearest to that.
    """
    manifest, made, every = run.catalog.manifest(), run.catalog.slices(), run.config.checkpoints.every_epochs
    assert manifest is not None
    for x in range(every, run.config.tuning.epochs, every):
        then = {key: snapshot(run, made[name], x / run.config.tuning.epochs) for key, name in manifest.clusters.items()}
        yield _measured(run, task, plan, with_slices(load_model(run), then), x=float(x))
    yield _measured(run, task, plan, x=float(run.config.tuning.epochs))


def snapshot(run: Run, made: SliceRow, share: float) -> str:
    """Reference of a slice as it was after about such a share of its steps; of equally near ones the earlier."""
    steps = (*run.catalog.epochs(made.digest), made.steps)
    nearest = min(steps, key=lambda step: (abs(step - share * made.steps), step))
    return reference(made.digest, nearest % made.steps)


def sequence(run: Run, task: Task, plan: Plan) -> Iterator[Measurement]:
    """Images spent and accuracy along a sequence of requests."""
    spent, batches = 0, sequences.KINDS[task.variant](run, plan.length)
    yield _measured(run, task, plan, series=task.variant)
    for number, batch in enumerate(batches, 1):
        outcome = erase.request_erasure(run, batch).outcome
        assert outcome is not None
        spent += 0 if run.tuning_spec.on_features else outcome.images
        yield _measured(run, task, plan, x=float(number), series=task.variant, spent=float(spent))


EXPERIMENTS: dict[str, Callable[[Run, Task, Plan], Iterator[Measurement]]] = {
    "methods": methods,
    "removal": removal,
    "cut": cut,
    "epochs": epochs,
    "sequence": sequence,
}
