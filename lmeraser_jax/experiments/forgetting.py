"""Unlearning of a language model's records, method beside method: what is left of them, what the rest loses, the cost.

The exact methods are workdirs with a slice for each cluster or owner, where the request is served: their state equals
training without the records, bit for bit. The others are models of `text_models`.
"""

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.data.text_rows import HEADER, TextSpec, pack
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.evaluation import forgetting as metrics
from lmeraser_jax.evaluation.language import query_rows
from lmeraser_jax.experiments import results, text_draw
from lmeraser_jax.experiments.measure import planned_costs
from lmeraser_jax.experiments.text_draw import Draw, DrawOptions
from lmeraser_jax.experiments.text_models import (
    BEFORE,
    INFLUENCE,
    Laboratory,
    Tuned,
    approximate,
    build_timed,
    case_of,
    common_spec,
    one_adapter,
    tuned,
)
from lmeraser_jax.experiments.text_questions import Questions, questions
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, tokenizers
from lmeraser_jax.models.decoder import generate
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.training.clustering import squared_distances
from lmeraser_jax.training.features import compute_dtype, on_device
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TextRows, TuningSpec, targets_of
from lmeraser_jax.unlearning import erase, influence
from lmeraser_jax.unlearning.approximate import objective_of
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice
from lmeraser_jax.unlearning.binding import differences
from lmeraser_jax.unlearning.run import Run

SCORED = 16  # rows that are scored at a time
STORIES = 16  # texts that the frozen model writes: what tuning does to its own language
PROBES = 200  # requests of one record that are planned, at most
EXACT = {"exact-clusters": "adaptive", "exact-owners": "owner"}  # {method: partition}
TITLES = {
    "base": "the frozen model",
    "before": "before the edit",
    "retrain": "tuned again",
    "floor": "tuned again, another seed",
    "exact-clusters": "exact, a slice per cluster",
    "exact-owners": "exact, a slice per owner",
    "newton": "Newton step",
    "newton-calibrated": "Newton step, calibrated",
    "paper": "the paper's formula",
    "warm": "warm fine-tune",
    "ascent": "gradient ascent",
    "difference": "gradient difference",
    "npo": "NPO",
}
REFERENCES = ("before", "retrain", "floor")  # in every table
METHODS = tuple(name for name in TITLES if name not in ("before", "floor"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetting:
    """One row: a method after one edit with one seed. A number that does not apply is None; losses are means of rows.

    Edited records count in their right form: of a removal as they were, of a correction as they are now.
    """

    edit: str
    method: str
    seed: int
    records: int  # n
    edited: int  # S
    loss_edited: float
    accuracy_edited: float  # of tokens
    loss_kept: float
    accuracy_kept: float
    loss_heldout: float
    accuracy_heldout: float
    loss_base: float | None = None  # of texts that the frozen model wrote
    kl_edited: float | None = None  # from the model that was tuned again
    kl_kept: float | None = None
    recognition: float | None = None  # AUC of edited against held-out records by their loss
    truth_ratio: float | None = None  # TOFU's, the mean
    forget_quality: float | None = None  # TOFU's
    hit_ratio: float | None = None  # at 1, of test records with candidates (`text_questions`)
    answer_auc: float | None = None  # of test records whose response is yes or no
    answer_low: float | None = None  # interval of either
    answer_high: float | None = None
    questions: int | None = None  # these test records
    preference: float | None = None  # share of corrected records whose right response is likelier than the wrong one
    seconds: float = 0.0  # of the computation, without compilation
    processor: float | None = None  # seconds of all threads together, likewise; None: measured in another row
    passes: float = 0.0
    share: float = 0.0  # of the passes of a full tuning
    share_record: float | None = None  # exact: expected share for one record, drawn uniformly
    residual: float | None = None  # of conjugate gradients


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Scores models on rows; all are asked in batches of one shape."""

    spec: TuningSpec
    params: Any  # the frozen model on the device
    base: np.ndarray  # rows of texts that the frozen model wrote
    questions: Questions | None

    def scores(self, slice_: Slice, rows: np.ndarray, reference: Slice | None = None) -> np.ndarray:
        """Losses, accuracies and divergences from a reference (0 without): float64 [3, N]."""
        batches = influence.chunked(rows, SCORED, -(-len(rows) // SCORED))
        parts = [
            np.asarray(_scores(self.spec, self.params, slice_, reference, jnp.asarray(batch))) for batch in batches
        ]
        return np.concatenate(parts, axis=1)[:, : len(rows)].astype(np.float64)


@functools.partial(jax.jit, static_argnames="spec")
def _scores(spec: TuningSpec, params: Any, slice_: Slice, reference: Slice | None, rows: jax.Array) -> jax.Array:
    """As `Scorer.scores`: float32 [3, B]."""
    inputs, outputs = TextRows(rows), objective_of(spec).outputs
    labels, logits = targets_of(spec, inputs, jnp.zeros(0)), outputs(slice_, params, inputs)
    compared = logits if reference is None else outputs(reference, params, inputs)
    far = metrics.divergences(compared, logits, labels)
    return jnp.stack([*metrics.row_scores(logits, labels), far])


def scorer_of(run: Run, seed: int, encoder: Encoder) -> Scorer:
    """A scorer with the backbone of a run; the seed draws the base texts."""
    spec, config = common_spec(run.tuning_spec), run.backbone.config
    params = on_device(run.backbone, compute_dtype(run.config.tuning.dtype, run.mesh), run.mesh)
    assert isinstance(spec.input_spec, TextSpec)
    context = spec.input_spec.context
    start = int(run.images[0, HEADER])  # the start token, where there is one
    graph = backbone_lib.graph(config)[0]
    prompts, lengths = jnp.full((STORIES, 1), start), jnp.ones(STORIES, jnp.int32)
    keys, temperature = jax.random.split(jax.random.key(seed), STORIES), jnp.ones(())
    texts = np.asarray(
        generate(graph, params, prompts, lengths, keys, temperature, jnp.int32(encoder.end), context - 1)
    )
    ends = [text.tolist().index(encoder.end) + 1 if encoder.end in text else len(text) for text in texts]
    base = np.stack([pack([start], text[:end], context) for text, end in zip(texts, ends)])
    return Scorer(spec, params, base, questions(run.config, encoder))


def measure(lab: Laboratory, scorer: Scorer, edit: str, method: str, model: Tuned) -> Forgetting:
    """The row of one slice for all records."""
    draw, edited = lab.draw, lab.draw.edited
    retrained, evaluating = tuned(lab, edit, "retrain").slice, draw.heldout[1::2]
    loss, accuracy, far = scorer.scores(model.slice, draw.rows, retrained)
    heldout = scorer.scores(model.slice, evaluating)
    numbers: dict[str, Any] = {}
    if scorer.questions is not None:
        numbers |= scorer.questions.measured(lambda rows: scorer.scores(model.slice, rows)[0])
    if edit == "response":
        numbers["preference"] = metrics.preference(loss[:edited], scorer.scores(model.slice, draw.wrong[edit])[0])
    if edit == "removal":
        numbers["recognition"] = metrics.recognition(loss[:edited], heldout[0]).value
        if len(draw.paraphrased):
            ratios, reference = (_truth_ratios(scorer, tree, draw) for tree in (model.slice, retrained))
            numbers |= {
                "truth_ratio": float(ratios.mean()),
                "forget_quality": metrics.forget_quality(ratios, reference),
            }
    return Forgetting(
        edit=edit,
        method=method,
        seed=lab.config.seed,
        **_means(loss, accuracy, heldout, edited),
        loss_base=float(scorer.scores(model.slice, scorer.base)[0].mean()),
        kl_edited=float(far[:edited].mean()),
        kl_kept=float(far[edited:].mean()),
        seconds=model.cost.seconds,
        processor=model.cost.processor,
        passes=model.cost.passes,
        share=model.cost.passes / tuned(lab, edit, "before").cost.passes,
        residual=model.cost.residual,
        **numbers,
    )


def _means(loss: np.ndarray, accuracy: np.ndarray, heldout: np.ndarray, edited: int) -> dict[str, Any]:
    """Counts and means of the scores [N] of all records, those that were edited first, and [3, M] of held-out ones."""
    return {
        "records": len(loss),
        "edited": edited,
        "loss_edited": float(loss[:edited].mean()),
        "accuracy_edited": float(accuracy[:edited].mean()),
        "loss_kept": float(loss[edited:].mean()),
        "accuracy_kept": float(accuracy[edited:].mean()),
        "loss_heldout": float(heldout[0].mean()),
        "accuracy_heldout": float(heldout[1].mean()),
    }


def _truth_ratios(scorer: Scorer, slice_: Slice, draw: Draw) -> np.ndarray:
    """TOFU's truth ratios of the edited records: float64 [S]."""
    wrong = scorer.scores(slice_, draw.perturbed.reshape(-1, draw.perturbed.shape[-1]))[0]
    return metrics.truth_ratios(scorer.scores(slice_, draw.paraphrased)[0], wrong.reshape(len(draw.perturbed), -1))


def measure_exact(lab: Laboratory, scorer: Scorer, method: str) -> Forgetting:
    """The row of a workdir with several slices, after one request erased the edited records there."""
    clustering = dataclasses.replace(lab.config.clustering, partition=EXACT[method])
    config, draw = dataclasses.replace(lab.config, clustering=clustering), lab.draw
    with lab.workdir(method, config, draw.rows) as run:
        build_timed(run)
        full = sum(row.images for row in run.catalog.slices().values())
        expected = planned_costs(run, PROBES)[:, 0].mean() / full
    copy = f"{method}_erased"  # the workdir before serves other numbers of records too
    shutil.rmtree(lab.folder / copy, ignore_errors=True)
    shutil.copytree(lab.folder / method, lab.folder / copy)
    with lab.workdir(copy, config, draw.rows) as run:
        processor = time.process_time()
        report = erase.request_erasure(run, [record.item.id for record in draw.records[: draw.edited]]).outcome
        processor = time.process_time() - processor
        assert report is not None
        scores = _routed(run, scorer)
        (losses, accuracies, _), heldout = scores(draw.rows), scores(draw.heldout[1::2])
        numbers = scorer.questions.measured(lambda rows: scores(rows)[0]) if scorer.questions else {}
    return Forgetting(
        edit="removal",
        method=method,
        seed=lab.config.seed,
        **_means(losses, accuracies, heldout, draw.edited),
        recognition=metrics.recognition(losses[: draw.edited], heldout[0]).value,
        seconds=report.seconds,
        processor=processor,
        passes=report.images / lab.n,
        share=report.images / full,
        share_record=float(expected),
        **numbers,
    )


def _routed(run: Run, scorer: Scorer) -> Callable[[np.ndarray], np.ndarray]:
    """Scores rows as `Scorer.scores`, each with the slice of the cluster that its query is nearest to."""
    manifest = run.catalog.manifest()
    assert manifest is not None
    clustering = load_clustering(run.layout, manifest.clustering)
    present = np.array([key in manifest.clusters for key in clustering.keys])
    slice_of = functools.cache(lambda index: load_slice(run, manifest.clusters[clustering.keys[index]]))

    def scores(rows: np.ndarray) -> np.ndarray:
        queries, places = np.unique(query_rows(rows), axis=0, return_inverse=True)
        distances = squared_distances(*map(jnp.asarray, (run.extractor(queries), clustering.prototypes, present)))
        nearest, result = np.asarray(distances).argmin(axis=1)[places], np.zeros((3, len(rows)))
        for index in np.unique(nearest):
            result[:, nearest == index] = scorer.scores(slice_of(index), rows[nearest == index])
        return result

    return scores


class Task(NamedTuple):
    """What a row is of."""

    seed: int
    forget: int
    edit: str
    method: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and where."""

    folder: Path  # everything goes here
    config: Config
    options: DrawOptions
    forget: tuple[int, ...]  # numbers of owners whose records are edited
    methods: tuple[str, ...]
    edits: tuple[str, ...]
    seeds: int

    @property
    def tasks(self) -> list[Task]:
        """The task of every row; references first, and only methods that serve an edit."""
        chosen = (*REFERENCES, *(name for name in self.methods if name not in REFERENCES))
        pairs = [(edit, name) for edit in self.edits for name in chosen if serves(name, edit)]
        return [Task(seed, count, *pair) for seed in range(self.seeds) for count in self.forget for pair in pairs]

    def rows_file(self, task: Task) -> Path:
        return self.folder / "rows" / f"{task.edit}_{task.forget}_{task.method}_{task.seed}.json"


def serves(method: str, edit: str) -> bool:
    """Whether a method is measured with an edit."""
    return edit == "removal" or method in REFERENCES or edit in INFLUENCE.get(method, {})


def compare(comparison: Comparison, source: Mapping[str, str]) -> tuple[list[Forgetting], list[dict[str, str]]]:
    """Makes the rows that are missing, each on disk as soon as it is known; returns all, and where they come from.

    Raises `UserError` where the folder has rows of other settings, or too few records fit.
    """
    _bind(comparison)
    for seed in range(comparison.seeds):
        if missing := [t for t in comparison.tasks if t.seed == seed and not comparison.rows_file(t).is_file()]:
            _compare_seed(comparison, seed, missing, source)
    loaded = [load_row(comparison.rows_file(task)) for task in comparison.tasks]
    return [row for row, _ in loaded], [origin for _, origin in loaded]


def _bind(comparison: Comparison) -> None:
    folder = comparison.folder
    binding = {
        "config": settings.to_dict(comparison.config),
        "options": dataclasses.asdict(comparison.options),
    }
    earlier = results.read_binding(folder)
    if earlier is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--workdir={folder} holds other files and no comparison; name a new or an empty folder")
    problems = [f"--{line.removeprefix('options.')}" for line in differences(earlier or binding, binding)]
    raise_all(problems, f"{folder} compares with other settings; name another --workdir or drop:")
    write_json(folder / results.BINDING, binding)


def _compare_seed(comparison: Comparison, seed: int, tasks: list[Task], source: Mapping[str, str]) -> None:
    config, folder = dataclasses.replace(comparison.config, seed=seed), comparison.folder / f"seed_{seed}"
    architecture = convert.load(config.backbone)[0].config
    encoder = Encoder(tokenizers.beside(config.backbone.weights, architecture), config.text)
    counts = dict.fromkeys(task.forget for task in tasks)
    draws = {count: text_draw.draw(config, encoder, comparison.options, count, seed) for count in counts}
    labs = {count: Laboratory(folder, config, draw) for count, draw in draws.items()}
    first = labs[tasks[0].forget]
    if "exact-owners" in comparison.methods and not all(record.item.owner for record in first.draw.records):
        raise UserError(f"--methods: exact-owners needs an owner of every record of {config.data.path}; leave it out")
    with first.workdir(BEFORE, one_adapter(config), first.draw.rows) as run:
        scorer = scorer_of(run, seed, encoder)
    for task in tasks:
        row = _measured(labs[task.forget], scorer, task)
        write_json(comparison.rows_file(task), {"row": dataclasses.asdict(row), "source": dict(source)})
        shown = f"edited {row.accuracy_edited:.3f}, kept {row.accuracy_kept:.3f}, {row.seconds:.1f} s"
        print(f"seed {seed}, {task.edit} of {task.forget}, {task.method}: {shown}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def _measured(lab: Laboratory, scorer: Scorer, task: Task) -> Forgetting:
    edit, method = task.edit, task.method
    if method in EXACT:
        return measure_exact(lab, scorer, method)
    if method in (*REFERENCES, "base"):
        return measure(lab, scorer, edit, method, tuned(lab, edit, method))
    case = case_of(lab, edit, scorer.spec, scorer.params)
    return measure(lab, scorer, edit, method, approximate(case, edit, method))


def load_row(path: Path) -> tuple[Forgetting, dict[str, str]]:
    """Reads a row and where it comes from. Raises `UserError` where the file is damaged."""
    try:
        tree = json.loads(path.read_text("utf-8"))
        return Forgetting(**tree["row"]), dict(tree["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no row of a comparison: {error}; delete it, and it is made again") from error
