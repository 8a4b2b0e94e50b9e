"""Accuracy of a published state, overall, per class and per cluster, beside a plain linear head."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import linear_head
from lmeraser_jax.evaluation.predict import Predictions, load_model, predict
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning.run import Run

WEIGHTS = tuple(step / 10 for step in range(11))  # of the common head, to choose from
HINTS = {"holdout": "--config.data.holdout", "test": "--config.data.test_share"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Shares in [0, 1] of right answers; "balanced" is the mean over the classes of the accuracy within the class."""

    split: str  # whose images were used
    images: int
    accuracy: float  # of the published state
    balanced: float
    balanced_error: float  # its standard error, from the number of images of each class
    linear: float | None  # of the plain linear head, None where it was not asked for
    linear_balanced: float | None
    largest: str  # the class with the most training records; the first of several
    majority: float  # of always answering `largest`
    majority_balanced: float
    classes: dict[str, dict[str, Any]]  # of each class its "images" and their "accuracy", None without images
    clusters: tuple[tuple[str, int, float], ...]  # key, images routed there, accuracy; most images first

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        rows = [("LMEraser", self.accuracy, self.balanced)]
        if self.linear is not None:
            rows.append(("plain linear head", self.linear, self.linear_balanced or 0.0))
        rows.append((f"always {self.largest}, the largest class", self.majority, self.majority_balanced))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{self.split}: {self.images} images", f"  {'':<{width}}{'accuracy':>10}{'balanced':>10}"]
        lines += [f"  {name:<{width}}{accuracy:>10.4f}{balanced:>10.4f}" for name, accuracy, balanced in rows]
        lines.append(f"  {'cluster':<14}{'images':>8}{'accuracy':>10}")
        lines += [f"  {key[:12]:<14}{count:>8}{share:>10.4f}" for key, count, share in self.clusters]
        return "\n".join(lines)


def evaluate(run: Run, split: str = "test", linear: bool = True, answers: Predictions | None = None) -> Evaluation:
    """Evaluates the published state, or other `answers` to the images of a split: test | holdout | train.

    With `linear` also a plain linear head, fitted on the features of the live training records. Raises `UserError`
    where the split has no images, or nothing is published.
    """
    records, train = split_records(run.catalog, split), run.catalog.live("train")
    labels, answers = records.labels, answers or predict(load_model(run), run.images[records.rows])
    right, nearest = answers.labels == labels, answers.clusters[:, 0]
    clusters = [
        (answers.keys[k], int((nearest == k).sum()), float(right[nearest == k].mean())) for k in np.unique(nearest)
    ]
    largest = int(np.bincount(train.labels, minlength=len(run.classes)).argmax())
    always_largest = np.full_like(labels, largest)
    linear_answers = None
    if linear:
        linear_answers = linear_head.fit_predict(run.features(train), train.labels, run.features(records))
    return Evaluation(
        split=split,
        images=len(records),
        accuracy=float(right.mean()),
        balanced=balanced_accuracy(labels, answers.labels),
        balanced_error=balanced_error(labels, answers.labels),
        linear=None if linear_answers is None else float((linear_answers == labels).mean()),
        linear_balanced=None if linear_answers is None else balanced_accuracy(labels, linear_answers),
        largest=run.classes[largest],
        majority=float((always_largest == labels).mean()),
        majority_balanced=balanced_accuracy(labels, always_largest),
        classes=class_scores(labels, answers.labels, run.classes),
        clusters=tuple(sorted(clusters, key=lambda row: (-row[1], row[0]))),
    )


def split_records(catalog: Catalog, split: str) -> RecordTable:
    """The live records of a split. Raises `UserError` where there are none."""
    records = catalog.live(split)
    if not len(records):
        hint = f"; set {HINTS[split]} when the workdir is made" if split in HINTS else ""
        raise UserError(f"--split={split}: the workdir has no such records{hint}")
    return records


def balanced_accuracy(labels: np.ndarray, answers: np.ndarray) -> float:
    """Mean over the classes that occur of the share of right answers; both int [N], N > 0."""
    return float(np.mean([(answers[labels == label] == label).mean() for label in np.unique(labels)]))


def balanced_error(labels: np.ndarray, answers: np.ndarray) -> float:
    """Standard error of `balanced_accuracy`, sqrt(sum_y p_y (1 - p_y) / n_y) / Y, for the same arrays.

    p_y and n_y are of a class with one right and one wrong answer added (Agresti and Caffo, 2000): a class with few
    images, all of them right, is not certain.
    """
    hits = [answers[labels == label] == label for label in np.unique(labels)]
    rates = np.array([(right.sum() + 1) / (len(right) + 2) for right in hits])
    counts = np.array([len(right) + 2 for right in hits])
    return float(np.sqrt((rates * (1 - rates) / counts).sum()) / len(hits))


def with_weight(run: Run, weight: float) -> Run:
    """The run with another `inference.common_weight`."""
    inference = dataclasses.replace(run.config.inference, common_weight=weight)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, inference=inference))


def answers_by_weight(run: Run, images: np.ndarray) -> Iterator[tuple[float, Predictions]]:
    """The published state's answers to images, uint8 [N, h, w, c], with each of `WEIGHTS` of the common head.

    The images pass once: answers are linear in the weight, p = (1 - w) p_clusters + w p_common.
    """
    model = load_model(with_weight(run, 1.0))
    common = predict(model, images).probabilities  # [N, Y]
    clusters = predict(dataclasses.replace(model, arrays=model.arrays._replace(common=None)), images)
    for weight in WEIGHTS:
        yield (
            weight,
            dataclasses.replace(clusters, probabilities=(1 - weight) * clusters.probabilities + weight * common),
        )


def best_weight(run: Run, split: str, by: str) -> tuple[float, Predictions]:
    """The weight with the best answers to the images of a split, and these answers; by: accuracy | balanced.

    Of equally good weights the largest: the common head of all records is cheaper to ask, and the safer choice.
    """
    records, best = run.catalog.live(split), (-1.0, 0.0, None)
    for weight, answers in answers_by_weight(run, run.images[records.rows]):
        right = float((answers.labels == records.labels).mean())
        score = right if by == "accuracy" else balanced_accuracy(records.labels, answers.labels)
        best = max(best, (score, weight, answers), key=lambda entry: entry[:2])
    assert best[2] is not None
    return best[1:]


def class_scores(labels: np.ndarray, answers: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Scores of all classes, also of those without images; labels and answers int [N]."""
    counts = np.bincount(labels, minlength=len(names))
    hits = np.bincount(labels[answers == labels], minlength=len(names))
    return {
        name: {"images": int(count), "accuracy": float(right / count) if count else None}
        for name, count, right in zip(names, counts, hits, strict=True)
    }
