"""Accuracy of a published state, overall and per cluster, beside a plain linear head."""

import dataclasses
from typing import Any

import numpy as np

from lmeraser_jax.baselines import linear as linear_head
from lmeraser_jax.errors import UserError
from lmeraser_jax.inference import load_model, predict
from lmeraser_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Shares in [0, 1] of right answers.

    Attributes:
        split: images that were used.
        images: their number.
        accuracy: over images.
        balanced: mean over classes of the accuracy within the class.
        linear: accuracy of the linear head, None where it was not asked for.
        clusters: (key, images routed there, accuracy), most images first.
    """

    split: str
    images: int
    accuracy: float
    balanced: float
    linear: float | None
    clusters: tuple[tuple[str, int, float], ...]

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        lines = [
            f"{self.split}: {self.images} images",
            f"  accuracy            {self.accuracy:.4f}",
            f"  balanced accuracy   {self.balanced:.4f}",
        ]
        if self.linear is not None:
            lines.append(f"  plain linear head   {self.linear:.4f}")
        lines.append(f"  {'cluster':<14}{'images':>8}{'accuracy':>10}")
        lines += [f"  {key[:12]:<14}{count:>8}{share:>10.4f}" for key, count, share in self.clusters]
        return "\n".join(lines)


def evaluate(run: Run, split: str = "test", linear: bool = True) -> Evaluation:
    """Evaluates the published state.

    Args:
        run: an opened workdir.
        split: test | holdout | train.
        linear: also fit the plain linear head on the features of the live training records.

    Raises:
        UserError: the split has no images, or nothing is published.
    """
    records = run.catalog.live(split)
    if not len(records):
        hint = "; set --config.data.holdout when the workdir is made" if split == "holdout" else ""
        raise UserError(f"--split={split}: the workdir has no such images{hint}")
    model = load_model(run)
    found = predict(model, run.images[records.rows])
    right = found.labels == records.labels
    by_class = [right[records.labels == label].mean() for label in np.unique(records.labels)]
    first = found.clusters[:, 0]
    clusters = [(model.keys[k], int((first == k).sum()), float(right[first == k].mean())) for k in np.unique(first)]
    return Evaluation(
        split=split,
        images=len(records),
        accuracy=float(right.mean()),
        balanced=float(np.mean(by_class)),
        linear=linear_accuracy(run, split) if linear else None,
        clusters=tuple(sorted(clusters, key=lambda row: (-row[1], row[0]))),
    )


def linear_accuracy(run: Run, split: str) -> float:
    """Accuracy of the plain linear head, fitted on the live training records."""
    train, wanted = run.catalog.live("train"), run.catalog.live(split)
    found = linear_head.fit_predict(run.features(train), train.labels, run.features(wanted))
    return float((found == wanted.labels).mean())
