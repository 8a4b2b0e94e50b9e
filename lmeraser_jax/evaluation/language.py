"""Answers of language models: each query goes to the nearest cluster, whose adapters answer it.

Adapters are gathered row by row, so a batch mixes clusters. `score` and `Respond` are programs of
`serving.Predictor.answer`.

Shapes: N rows, B rows of a call, T tokens of a row, V vocabulary, K clusters.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax.data.source import content_hash
from lmeraser_jax.data.text_rows import HEADER, tokens_of
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.accuracy import split_records
from lmeraser_jax.evaluation.forgetting import RowScores, row_scores
from lmeraser_jax.evaluation.predict import Model, ModelArrays, draws, load_model
from lmeraser_jax.hashing import seed_words
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import peft_files
from lmeraser_jax.models.decoder import generate
from lmeraser_jax.training.clustering import squared_distances
from lmeraser_jax.training.fingerprint import pinned
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TextRows, TuningSpec, bare_features, outputs_of, targets_of
from lmeraser_jax.unlearning.run import Run

AT_A_TIME = 8  # rows whose logits [T, V] are in memory at the same time


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What a model finds of the responses of N rows."""

    losses: np.ndarray  # float32 [N], mean cross-entropy of the response's tokens and the end token
    accuracies: np.ndarray  # float32 [N], share of these tokens that are the likeliest
    tokens: np.ndarray  # int32 [N], how many there are
    clusters: np.ndarray  # int32 [N, 1], indices into `keys`
    keys: tuple[str, ...]
    approximate: frozenset[str]  # keys of clusters that answered with an approximate slice

    @property
    def log_likelihoods(self) -> np.ndarray:
        """log p(response and its end | query), float32 [N]."""
        return -self.losses * self.tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Continuations of N queries."""

    tokens: np.ndarray  # int32 [N, new], each ending with end tokens if it ended
    clusters: np.ndarray  # int32 [N, 1], indices into `keys`
    keys: tuple[str, ...]
    approximate: frozenset[str]  # keys of clusters that answered with an approximate slice


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    new: int  # most tokens of a response
    temperature: float = 0.0  # 0: the likeliest token
    seed: int = 0


def longest_query(run: Run, new: int) -> int:
    """Most tokens that a query may have for so many new ones. Raises `UserError` where there is room for none."""
    context = getattr(run.backbone.config, "context", 0)
    if new >= context:
        raise UserError(f"--max_tokens={new}: must be below {context}, the model's context")
    return min(run.config.text.context, context - new)


def query_rows(rows: np.ndarray) -> np.ndarray:
    """Rows without their responses, int32 [N, 2 + T]: routing depends on the query alone."""
    tokens, query, _ = tokens_of(rows)
    kept = np.where(np.arange(tokens.shape[1])[None] < query[:, None], tokens, 0)
    return np.concatenate([query[:, None], query[:, None], kept], axis=1)


def nearest_cluster(spec: TuningSpec, arrays: ModelArrays, rows: jax.Array, drawn: jax.Array | None) -> jax.Array:
    """The cluster, int32 [B], that is present and nearest to each query; `drawn` is as `predict.draws` gives it."""
    distances = drawn
    if distances is None:
        features = bare_features(spec.architecture, spec.input_spec, arrays.params, rows)
        distances = squared_distances(features, arrays.prototypes, arrays.present)
    return jnp.argmin(jnp.where(arrays.present[None], distances, jnp.inf), axis=1).astype(jnp.int32)


@functools.lru_cache(maxsize=8)
def _router(spec: TuningSpec):
    return jax.jit(functools.partial(nearest_cluster, spec))


@functools.lru_cache(maxsize=8)
def _scorer(spec: TuningSpec):
    """Compiled `(arrays, slices with a leading axis B, rows [B, 2 + T]) -> RowScores`."""

    def scores(arrays: ModelArrays, slices: Slice, rows: jax.Array) -> RowScores:
        inputs = TextRows(rows)
        return row_scores(outputs_of(slices, spec, arrays.params, inputs), targets_of(spec, inputs, rows))

    return jax.jit(scores)


def score(model: Model, rows: np.ndarray, adapted: bool = True) -> Scores:
    """Scores of stored rows, int32 [N, 2 + T], by the adapters of their clusters or by the frozen model."""
    clusters, scored = route(model, query_rows(rows)), np.zeros((2, len(rows)), np.float32)
    for places, batch in _batches(rows):
        slices = _slices(model.arrays, padded(clusters[places]))
        with pinned():
            own = slices if adapted else slices._replace(backbone=None)
            scored[:, places] = np.stack(_scorer(model.run.tuning_spec)(model.arrays, own, batch))[:, : len(places)]
    losses, accuracies = scored
    _, query, count = tokens_of(rows)
    return Scores(
        losses, accuracies, (count - query).astype(np.int32), clusters[:, None], model.keys, model.approximate
    )


def route(model: Model, queries: np.ndarray) -> np.ndarray:
    """The nearest cluster of each query: rows int32 [N, 2 + T] without responses -> int32 [N]."""
    clusters = np.zeros(len(queries), np.int32)
    for places, rows in _batches(queries):
        with pinned():
            drawn = draws(model, padded(queries[places]))
            clusters[places] = _router(model.run.tuning_spec)(model.arrays, rows, drawn)[: len(places)]
    return clusters


@dataclasses.dataclass(frozen=True)
class Respond:
    """Continues queries, rows int32 [N, 2 + T] without responses and of at most `longest_query` tokens.

    What is drawn depends on the seed and the query alone, not on the queries beside it.
    """

    sampling: Sampling

    def __call__(self, model: Model, queries: np.ndarray) -> Texts:
        run, spec, sampling = model.run, model.run.tuning_spec, self.sampling
        clusters, tokens = route(model, queries), np.zeros((len(queries), sampling.new), np.int32)
        graph, width = backbone_lib.graph(spec.architecture, spec.lora)[0], longest_query(run, sampling.new)
        for places, rows in _batches(queries):
            prompts, lengths, _ = tokens_of(rows)
            slices = _slices(model.arrays, padded(clusters[places]))
            words = [seed_words(f"answer {sampling.seed} {content_hash(query)}") for query in queries[places]]
            with pinned():
                keys = jax.random.wrap_key_data(jnp.asarray(padded(np.stack(words))))  # [B]
                arguments = prompts[:, :width], np.maximum(lengths, 1), keys, np.float32(sampling.temperature)
                params = backbone_lib.with_own(model.arrays.params, slices.backbone)
                new = generate(graph, params, *arguments, np.int32(run.encoder.end), sampling.new)
            tokens[places] = new[: len(places)]
        return Texts(tokens, clusters[:, None], model.keys, model.approximate)


def _slices(arrays: ModelArrays, clusters: np.ndarray) -> Slice:
    """The slices of some clusters [B], with a leading axis B."""
    return jax.tree.map(lambda leaf: leaf[clusters], arrays.stack)


def padded(values: np.ndarray) -> np.ndarray:
    """At most `AT_A_TIME` values, with zeros behind them."""
    return np.concatenate([values, np.zeros((AT_A_TIME - len(values), *values.shape[1:]), values.dtype)])


def _batches(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places among rows int32 [N, 2 + T], and the rows there with less padding, int32 [AT_A_TIME, 2 + t].

    The number t is a power of two, for few programs, or T. It depends on a row's own length, so that the bits that a
    row gives do not depend on the rows beside it.
    """
    lengths = np.array([1 << (max(16, int(count)) - 1).bit_length() for count in rows[:, 1]], np.int32)
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for start in range(0, len(alike), AT_A_TIME):
            places = alike[start : start + AT_A_TIME]
            yield places, padded(rows[places])[:, : HEADER + length]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over the rows of a split: of the mean loss of a row's response, and of the share of its likeliest tokens.

    "base" is the frozen model.
    """

    split: str
    rows: int
    loss: float
    accuracy: float
    base_loss: float
    base_accuracy: float
    clusters: tuple[dict[str, Any], ...]  # the same of the rows of each cluster, under its "key"; most rows first

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        lines = [f"{self.split}: {self.rows} rows", f"  {'':<14}{'rows':>8}{'loss':>10}{'tokens':>10}"]
        lines.append(f"  {'LMEraser':<14}{self.rows:>8}{self.loss:>10.4f}{self.accuracy:>10.4f}")
        lines.append(f"  {'frozen model':<14}{self.rows:>8}{self.base_loss:>10.4f}{self.base_accuracy:>10.4f}")
        lines.append(f"  {'cluster':<14}")
        lines += [f"  {c['key'][:12]:<14}{c['rows']:>8}{c['loss']:>10.4f}{c['accuracy']:>10.4f}" for c in self.clusters]
        return "\n".join(lines)


def evaluate(run: Run, split: str = "test") -> Evaluation:
    """Evaluates the published state on a split: test | holdout | train.

    Raises `UserError` where the split has no rows, or nothing is published.
    """
    records = split_records(run.catalog, split)
    model, rows = load_model(run), run.images[records.rows]
    scores, base = score(model, rows), score(model, rows, adapted=False)
    nearest = scores.clusters[:, 0]
    fields = {"loss": scores.losses, "accuracy": scores.accuracies}
    fields |= {"base_loss": base.losses, "base_accuracy": base.accuracies}

    def means(chosen: np.ndarray) -> dict[str, Any]:  # of rows, bool [N]
        values = {name: float(values[chosen].mean(dtype=np.float64)) for name, values in fields.items()}
        return {"rows": int(chosen.sum()), **values}

    clusters = [{"key": scores.keys[k], **means(nearest == k)} for k in np.unique(nearest)]
    ordered = sorted(clusters, key=lambda cluster: (-cluster["rows"], cluster["key"]))
    return Evaluation(split, clusters=tuple(ordered), **means(nearest >= 0))


def export(run: Run, out: Path, only: str = "") -> dict[str, Path]:
    """Writes the adapters of all clusters that predictions may use, or of one: {cluster key: its folder in `out`}.

    Raises `UserError` as `load_model` does, and where that one is quarantined.
    """
    model = load_model(run)
    spec, base = run.tuning_spec, run.config.backbone.weights
    places = {key: k for k, (key, ref) in enumerate(zip(model.keys, model.refs, strict=True)) if ref}
    if only and only not in places:
        raise UserError(f"--cluster={only[:12]} is quarantined by an accepted erasure; run: lmeraser process")
    assert spec.lora is not None
    folders = {key: out / key[:12] for key in ([only] if only else places)}
    for key, folder in folders.items():
        adapters = jax.tree.map(lambda leaf, k=places[key]: np.asarray(leaf[k]), model.arrays.stack.backbone)
        peft_files.save(folder, spec.lora, adapters, base)
    kept = [places[key] for key in folders]
    np.savez(out / "prototypes.npz", keys=np.array(list(folders)), prototypes=np.asarray(model.arrays.prototypes)[kept])
    return folders
