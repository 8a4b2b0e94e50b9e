"""The weight of the common head beside the clusters, chosen on images that no slice was tuned on."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lmeraser_jax.evaluation.accuracy import balanced_accuracy
from lmeraser_jax.evaluation.predict import Predictions, load_model, predict
from lmeraser_jax.unlearning.run import Run

WEIGHTS = tuple(step / 10 for step in range(11))


def with_weight(run: Run, weight: float) -> Run:
    """The run with another `inference.common_weight`."""
    inference = dataclasses.replace(run.config.inference, common_weight=weight)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, inference=inference))


def answers_by_weight(run: Run, images: np.ndarray) -> Iterator[tuple[float, Predictions]]:
    """Each of `WEIGHTS` with the published state's answers to images, uint8 [N, h, w, c].

    The images pass once: answers are linear in the weight, p = (1 - w) p_clusters + w p_common.
    """
    model = load_model(with_weight(run, 1.0))
    common = predict(model, images).probabilities  # [N, Y]
    clusters = predict(dataclasses.replace(model, arrays=model.arrays._replace(common=None)), images)
    for weight in WEIGHTS:
        probabilities = (1 - weight) * clusters.probabilities + weight * common
        yield weight, dataclasses.replace(clusters, probabilities=probabilities)


def best_weight(run: Run, split: str, by: str) -> tuple[float, Predictions]:
    """The weight with the best answers to the images of a split, and these answers; by: accuracy | balanced.

    Of equally good weights the largest: the common head of all records is cheaper to ask, and the safer choice.
    """
    records = run.catalog.live(split)
    best = None
    for weight, answers in answers_by_weight(run, run.images[records.rows]):
        right = float((answers.labels == records.labels).mean())
        score = right if by == "accuracy" else balanced_accuracy(records.labels, answers.labels)
        if best is None or score >= best[0]:
            best = score, weight, answers
    assert best is not None
    return best[1:]
