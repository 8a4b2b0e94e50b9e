"""What a comparison does: its tasks, where their rows go, and why it cannot work: checked before JAX is loaded."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config, parse_cut
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.experiments import results, sequences
from lmeraser_jax.experiments.methods import Method
from lmeraser_jax.experiments.results import load_task
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage.ingest import import_settings
from lmeraser_jax.unlearning.binding import differences, without_paths

EXPERIMENTS = ("methods", "removal", "cut", "epochs", "sequence")
FREE_OPTIONS = ("cuts", "sequences")  # they add tasks and change no number
SNAPSHOTS = 5  # points of an accuracy over epochs, beside the last one


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured of each method."""

    dataset: str  # name for people
    backbone: str  # name for people
    split: str = "test"  # images that are predicted: test, or holdout to choose settings by
    probes: int = 100  # records whose erasure is planned
    requests: int = 2  # erasures that are served and timed, of so many sampled records and of as many others
    cuts: tuple[str, ...] = ()  # values of clustering.cut
    sequences: tuple[str, ...] = tuple(sequences.KINDS)
    length: int = 10  # batches of a sequence
    by: str = ""  # accuracy or balanced: the split chooses the weight of the common head by it; "": the config's weight


@dataclasses.dataclass(frozen=True)
class Task:
    """An experiment with a method and a seed, in one workdir."""

    experiment: str  # one of `EXPERIMENTS`
    method: Method
    seed: int
    variant: str  # a cut or a kind of sequence; "" elsewhere
    config: Config  # of the comparison, with the method's changes and the seed

    @property
    def name(self) -> str:
        """The name of its workdir and of the file of its rows."""
        words = (self.experiment, self.method.name, str(self.seed), self.variant.replace(":", "-"))
        return "_".join(filter(None, words))

    @property
    def settings(self) -> str:
        """The digest of all settings that its rows depend on."""
        return digest(without_paths(self.config))

    @property
    def tuning_digest(self) -> str:
        """The digest of the settings of its slices: tasks that share it differ only in prediction and measurement."""
        tree = without_paths(self.config)
        del tree["inference"], tree["common"]
        return digest(tree)[:16]


def tasks_of(experiment: str, method: Method, seed: int, config: Config, options: Options) -> list[Task]:
    """The tasks of an experiment with one method and seed."""
    config = method.configure(dataclasses.replace(config, seed=seed))
    configs = {"": config}
    if experiment == "cut":
        clusterings = {cut: dataclasses.replace(config.clustering, cut=cut) for cut in options.cuts}
        configs = {cut: dataclasses.replace(config, clustering=value) for cut, value in clusterings.items()}
    elif experiment == "sequence":
        configs = dict.fromkeys(options.sequences, config)
    elif experiment == "epochs":
        every = max(1, config.tuning.epochs // (SNAPSHOTS + 1))
        snapshots = dataclasses.replace(config.checkpoints, every_epochs=every, keep=10**6)  # all of them
        configs = {"": dataclasses.replace(config, checkpoints=snapshots)}
    return [Task(experiment, method, seed, variant, changed) for variant, changed in configs.items()]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What to compare, and where. Each method is combined with each seed and experiment."""

    folder: Path  # everything goes here
    config: Config  # of the experiment, without any method's changes
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    experiments: tuple[str, ...]
    options: Options

    @property
    def tasks(self) -> list[Task]:
        return [
            task
            for seed in self.seeds
            for experiment in self.experiments
            for method in self.methods
            for task in tasks_of(experiment, method, seed, self.config, self.options)
        ]

    def base(self, seed: int) -> Path:
        """The workdir that those of a seed begin as; one for all if neither backbone nor records depend on the seed."""
        depends = not self.config.backbone.weights or "seed" in import_settings(self.config)
        return self.folder / (f"base_{seed}" if depends else "base")

    def tuned(self, task: Task) -> Path:
        """The workdir that tasks with the same tuning begin as, as long as there are several to do."""
        return self.folder / f"tuned_{task.tuning_digest}"

    def rows_file(self, task: Task) -> Path:
        return self.folder / "rows" / f"{task.name}.json"


def check(comparison: Comparison) -> None:
    """Raises `UserError` with everything that cannot work, before anything is done."""
    options, config, problems = comparison.options, comparison.config, []
    named = "candidates" if options.by else "methods"  # the flag
    for flag, values, legal in (
        (named, [method.name for method in comparison.methods], ()),
        ("experiments", comparison.experiments, EXPERIMENTS),
        ("sequences", options.sequences, sequences.KINDS),
    ):
        if not values:
            problems.append(f"--{flag}: name at least one")
        if unknown := [name for name in values if legal and name not in legal]:
            problems.append(f"--{flag}: {join_limited(unknown)} unknown; legal: {', '.join(legal)}")
    for cut in options.cuts:
        try:
            parse_cut(cut)
        except ValueError:
            problems.append(f"--cuts={cut}: must be a distance of 0 or more, or auto:K with K >= 1")
    if "cut" in comparison.experiments and not options.cuts:
        problems.append("--cuts is missing: the values of clustering.cut to try, such as auto:5,auto:10,auto:20")
    if options.split == "holdout" and not (config.data.holdout or config.data.holdout_split):
        problems.append(
            f"there is no hold-out: --config.data.holdout={config.data.holdout:g} must be above 0, the share that is"
            " held out, or name one with --config.data.holdout_split"
        )
    for name, count in collections.Counter(method.name for method in comparison.methods).items():
        if count > 1:
            problems.append(f"--{named}: {count} are called {name}; name each once (a file's name is its method's)")
    for method in comparison.methods:
        problems += _method_problems(method, comparison)
    raise_all(problems)
    _check_folder(comparison)


def _method_problems(method: Method, comparison: Comparison) -> list[str]:
    """Why a method does not go with the config or with an experiment."""
    problems = []
    try:
        config = method.configure(comparison.config)
    except UserError as error:
        return [str(error)]
    partition = config.clustering.partition
    if "cut" in comparison.experiments and partition != "adaptive":
        problems.append(f"--experiments=cut: {method.name} cuts no tree; its partition is {partition}")
    if "epochs" in comparison.experiments and config.tuning.closed:
        problems.append(f"--experiments=epochs: {method.name} has a closed form and no epochs")
    return problems


def _check_folder(comparison: Comparison) -> None:
    """Refuses a folder with rows of other settings, or with files that are no comparison's."""
    folder, binding = comparison.folder, results.read_binding(comparison.folder)
    if binding is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--workdir={folder} holds other files and no comparison; name a new or an empty folder")
    if binding is not None and has_rows(comparison):
        changes = differences(binding, binding_of(comparison))
        problems = [f"--{line.removeprefix('options.')}" for line in changes]  # each names the flag to change
        raise_all(problems, f"{folder} compares with other settings; name another --workdir or drop:")
    files = [(comparison.rows_file(task), task) for task in comparison.tasks]
    stale = [path for path, task in files if path.is_file() and load_task(path).settings != task.settings]
    if stale:
        raise UserError(
            "made by a method of the same name with other settings; delete them, or give the method's file another"
            f" name: {join_limited(stale)}"
        )


def has_rows(comparison: Comparison) -> bool:
    return any((comparison.folder / "rows").glob("*.json"))


def binding_of(comparison: Comparison) -> dict[str, Any]:
    """The settings that a folder of rows is bound to."""
    options = {n: value for n, value in dataclasses.asdict(comparison.options).items() if n not in FREE_OPTIONS}
    return {"config": settings.to_dict(comparison.config), "options": options}
